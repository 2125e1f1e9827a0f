"""One device, eight with jit, eight with pmap: the same run."""

import dataclasses
import itertools
from contextlib import closing

import jax
import numpy as np
import pytest

from vit_jax.build import build
from vit_jax.config import default_config
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate
from vit_jax.parallel import Parallel

NUM_STEPS = 10


def stochastic_config():
    """Everything that is random at training is on, in float32."""
    config = default_config()
    config.model.name = 'ConViT-Ti/2'
    config.model.kwargs = {
        'width': 16,
        'depth': 3,
        'mlp_dim': 24,
        'num_heads': 4,
        'num_local_layers': 2,
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
    config.optim.label_smoothing = 0.1
    return config


def losses_and_evaluation(mode, num_devices):
    run = build(stochastic_config())
    parallel = Parallel(mode, tuple(jax.devices()[:num_devices]))
    run = dataclasses.replace(run, parallel=parallel)
    state = parallel.init(run.init)
    step = parallel.train_step(run.train_step)
    losses = []
    with closing(run.train_data(0)) as data:
        for batch in itertools.islice(parallel.prefetch(data), NUM_STEPS):
            state, metrics = step(state, batch)
            total, weight = metrics['loss']
            losses.append(float(total / weight))
    return losses, evaluate(run, state.variables)


@pytest.fixture(scope='module')
def on_one_device():
    return losses_and_evaluation('jit', 1)


@pytest.mark.parametrize('mode', ['jit', 'pmap'])
def test_eight_devices_give_the_losses_of_one(on_one_device, mode):
    losses, evaluation = losses_and_evaluation(mode, 8)
    expected_losses, expected_evaluation = on_one_device
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert evaluation['examples'] == 83  # prime: the last batch is not full
    for name, value in expected_evaluation.items():
        np.testing.assert_allclose(evaluation[name], value, rtol=1e-5)


def test_the_run_is_stochastic(on_one_device):
    losses, _ = on_one_device
    run = build(stochastic_config())
    state = run.init()
    with closing(run.train_data(0)) as data:
        batch = next(data)
    step = jax.jit(run.train_step)
    _, first = step(state, batch)
    _, again = step(state, batch)
    _, later = step(dataclasses.replace(state, step=state.step + 1), batch)
    assert first['loss'][0] == again['loss'][0]
    assert first['loss'][0] != later['loss'][0]
    np.testing.assert_allclose(first['loss'][0] / 16, losses[0], rtol=1e-5)


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


def test_an_unknown_mode_offers_the_nearest():
    with pytest.raises(UserError, match="did you mean 'pmap'"):
        Parallel('pmaps', tuple(jax.devices()))
