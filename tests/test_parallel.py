"""One device, eight with jit, with pmap, with a sharded state: the same run."""

import dataclasses
import itertools
import types
from contextlib import closing

import jax
import numpy as np
import pytest

import vit_jax.sharding
from vit_jax.build import build
from vit_jax.config import default_config
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate
from vit_jax.models import build_model
from vit_jax.optim import make_optimizer
from vit_jax.parallel import Parallel, bytes_per_device

NUM_STEPS = 10


def stochastic_config():
    """Everything that is random at training is on, in float32."""
    config = default_config()
    config.model.name = 'ConViT-Ti/2'
    config.model.kwargs = {
        'width': 16,
        'depth': 2,
        'mlp_dim': 24,
        'num_heads': 4,
        'num_local_layers': 1,
        'drop_path_rate': 0.5,
        'dropout_rate': 0.1,
        'attention_dropout_rate': 0.1,
    }
    config.dataset.name = 'synthetic:size=10,channels=1,num_examples=83'
    config.dataset.image_size = (6, 10)
    config.augment.crop = 'resized'
    config.augment.flip = True
    config.batch_size = 16
    config.num_steps = NUM_STEPS
    config.optim.learning_rate = 3e-3
    config.optim.clip_norm = 1.0
    config.augment.erasing = 0.5
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.augment.mix_mode = 'elem'
    config.augment.repeats = 2
    config.accum_steps = 2
    config.optim.label_smoothing = 0.1
    config.optim.ema_decay = 0.5
    return config


def losses_and_evaluation(num_devices, *args, **kwargs):
    run = build(stochastic_config())
    parallel = Parallel(*args, tuple(jax.devices()[:num_devices]), **kwargs)
    run = dataclasses.replace(run, parallel=parallel)
    state = parallel.init(run.init)
    step = parallel.train_step(run.train_step, run.state_shape)
    losses = []
    with closing(run.train_data(0)) as data:
        for batch in itertools.islice(parallel.prefetch(data), NUM_STEPS):
            state, metrics = step(state, batch)
            total, weight = metrics['loss']
            losses.append(float(total / weight))
    evaluations = [evaluate(run, v) for v in (state.variables, state.average)]
    return losses, evaluations, (step, state, batch)


@pytest.fixture(scope='module')
def on_one_device():
    return losses_and_evaluation(1, 'jit')


@pytest.mark.parametrize(
    ('mode', 'mesh'),
    [
        ('jit', {}),
        ('pmap', {}),
        ('jit', {'fsdp': 2, 'tensor': 2}),
    ],
)
def test_eight_devices_give_the_losses_of_one(on_one_device, mode, mesh, monkeypatch):
    """Random augmentation, mixing, dropout, micro-batches: everything is on."""
    monkeypatch.setattr(vit_jax.sharding, 'MIN_SIZE', 2)  # so that all is sharded
    losses, evaluations, _ = losses_and_evaluation(8, mode, **mesh)
    expected_losses, expected, _ = on_one_device
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for found, values in zip(evaluations, expected):
        assert found['examples'] == 83  # prime: the last batch is not full
        for name, value in values.items():
            np.testing.assert_allclose(found[name], value, rtol=2e-5)


def test_the_run_is_stochastic(on_one_device):
    *_, (step, state, batch) = on_one_device

    def loss(number):
        # A copy, for the step consumes its state.
        given = jax.tree.map(jax.numpy.copy, state).replace(
            step=jax.numpy.int32(number)
        )
        return float(step(given, batch)[1]['loss'][0])

    assert loss(7) == loss(7) != loss(8)


@pytest.mark.parametrize('name', ['ViT-S/16', 'ConViT-S/16'])
@pytest.mark.parametrize('optimizer', ['adamw', 'lamb', 'adafactor'])
def test_fsdp_divides_the_state(name, optimizer):
    """Eight ways: an eighth of the optimizer's state on a device, and 10% of that."""
    parallel = Parallel('jit', tuple(jax.devices()), fsdp=8)
    model = build_model(name, 1000)
    image = np.zeros((1, 224, 224, 3), np.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)['params']
    opt_state = jax.eval_shape(make_optimizer(optimizer, lambda _: 1.0).init, params)
    whole_state = jax.tree.map(lambda _: parallel.replicated, opt_state)
    whole = bytes_per_device(opt_state, whole_state)
    part = bytes_per_device(opt_state, parallel.state_sharding(opt_state))
    assert whole / 8 < part < 1.1 * whole / 8


def test_a_sharded_state_lies_as_it_says(monkeypatch):
    monkeypatch.setattr(vit_jax.sharding, 'MIN_SIZE', 2)
    parallel = Parallel('jit', tuple(jax.devices()), fsdp=4, tensor=2)
    run = build(stochastic_config())
    state = parallel.init(run.init)
    held = sum(
        shard.data.nbytes
        for x in jax.tree.leaves(state.opt_state)
        for shard in x.addressable_shards
        if shard.device == jax.devices()[3]
    )
    shardings = parallel.state_sharding(run.state_shape).opt_state
    assert held == bytes_per_device(run.state_shape.opt_state, shardings)
    query = state.variables['params']['block00']['attention']['query']['kernel']
    assert query.addressable_shards[0].data.shape == (16 // 4, 4 // 2, 4)


@pytest.mark.parametrize('mode', ['jit', 'pmap'])
def test_every_device_holds_its_rows(mode):
    parallel = Parallel(mode, tuple(jax.devices()))
    image = np.arange(16 * 3).reshape(16, 3)
    placed = parallel.put({'image': image})['image']
    for device, shard in zip(jax.devices(), placed.addressable_shards):
        assert shard.device == device
        first = 2 * device.id
        np.testing.assert_array_equal(
            np.asarray(shard.data).reshape(2, 3), image[first : first + 2]
        )


def test_prefetch_keeps_every_batch_in_order():
    parallel = Parallel('jit', tuple(jax.devices()[:1]))
    batches = ({'x': np.full((2,), i)} for i in range(7))
    seen = [int(batch['x'][0]) for batch in parallel.prefetch(batches, ahead=3)]
    assert seen == list(range(7))


@pytest.mark.parametrize(
    ('batch_size', 'nearest'), [(13, '8 or 16'), (3, '8'), (0, '8')]
)
def test_a_batch_that_cannot_be_split_is_refused(batch_size, nearest):
    parallel = Parallel('jit', tuple(jax.devices()))
    with pytest.raises(UserError, match=f'{batch_size} .* 8 device.*: {nearest}$'):
        parallel.check_batch_size(batch_size, 'config.batch_size')


def test_heads_are_not_divided_over_processes():
    """Two processes would read different rows for the same part of the batch."""
    devices = [types.SimpleNamespace(process_index=i // 2) for i in range(8)]
    assert Parallel('jit', tuple(devices), fsdp=4, tensor=2).data == 1
    with pytest.raises(UserError, match=r'parallel.tensor 4 must divide .* process, 2'):
        Parallel('jit', tuple(devices), tensor=4)


def test_an_unknown_mode_offers_the_nearest():
    with pytest.raises(UserError, match="did you mean 'pmap'"):
        Parallel('pmaps', tuple(jax.devices()))
