"""The GAN: its losses, who learns from what, devices, interruptions, distances."""

import dataclasses
import itertools
import shutil
from contextlib import closing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import vit_jax.sharding
from vit_jax.axes import example_keys
from vit_jax.build import build
from vit_jax.checkpoint import Checkpoints, shapes_on
from vit_jax.config import default_config
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate
from vit_jax.frechet import frechet_distance
from vit_jax.generation import Sampler, draw_latents
from vit_jax.models import build_model
from vit_jax.parallel import Parallel
from vit_jax.pretrained import load_variables
from vit_jax.tasks import gan
from vit_jax.train import train
from vit_jax.update import Updates
from vit_jax.writer import read_metrics

SIZE, CHANNELS = 8, 1
DATA = f'synthetic:size={SIZE},channels={CHANNELS},num_examples=37,num_classes=3'
SAGAN = {
    'image_shape': (SIZE, SIZE, CHANNELS),
    'latent_dim': 5,
    'generator_widths': (8,),
    'discriminator_widths': (8,),
}
CNN = {'widths': (5,), 'strides': (2,), 'num_groups': 1}


def make_config(task='gan', **values):
    config = default_config(task)
    config.model.name = 'SAGAN' if task == 'gan' else 'CNN'
    config.model.kwargs = SAGAN if task == 'gan' else CNN
    config.dataset.name = DATA
    config.batch_size = 16
    config.num_steps = 5
    config.eval.every_steps = 2
    config.checkpoint.every_steps = 2
    config.log.every_steps = 1
    config.log.tensorboard = False
    if task == 'gan':
        config.optim.rules = (('discriminator/', 4.0, None),)
        config.optim.b1 = 0.0
        config.optim.b2 = 0.9
        config.optim.weight_decay = 0.0
        config.optim.ema_decay = 0.5
    for key, value in values.items():
        config.update_from_flattened_dict({key: value})
    return config


# --- Steps --------------------------------------------------------------------


@pytest.fixture(scope='module')
def model():
    return build_model('SAGAN', None, **SAGAN)


@pytest.fixture(scope='module')
def state(model):
    """Random, with gammas that are not zero."""
    init = partial(
        gan.init_state,
        model=model,
        tx=optax.sgd(1.0),
        rng=jax.random.key(0),
        inputs=(jax.ShapeDtypeStruct((1, SIZE, SIZE, CHANNELS), np.float32),),
        settings=gan.Settings(),
    )
    fresh = jax.jit(init)()

    def fill(path, x):
        return jnp.float32(0.7) if path[-1].key == 'gamma' else x

    variables = jax.tree_util.tree_map_with_path(fill, fresh.variables)
    return fresh.replace(variables=variables)


def make_batch(num_rows=6, seed=0):
    rng = np.random.default_rng(seed)
    shape = (num_rows, SIZE, SIZE, CHANNELS)
    return {
        'image': jnp.asarray(rng.integers(0, 256, shape), jnp.uint8),
        'label': jnp.zeros(num_rows, jnp.int32),
        'weight': jnp.ones(num_rows).at[-1].set(0.0),
    }


def make_step(model, **settings):
    step = partial(
        gan.train_step,
        model=model,
        tx=optax.sgd(1.0),
        rng=jax.random.key(3),
        settings=gan.Settings(Updates(**settings)),
    )
    return jax.jit(step)


@pytest.fixture(scope='module')
def stepped(model, state):
    return make_step(model)(state, make_batch())


def logits_by_hand(model, state, params=None):
    """Of real and of generated images, as the step of number 0 sees them."""
    batch = make_batch()
    variables = {**state.variables, 'params': params or state.variables['params']}
    rng = jax.random.fold_in(jax.random.key(3), 0)
    latents = draw_latents(example_keys(rng, 6), 5)
    apply = partial(model.apply, mutable=['batch_stats'])
    fake, _ = apply(variables, latents, train=True, method='generate')
    real = batch['image'].astype(jnp.float32) / 127.5 - 1.0
    return model.apply(variables, real), model.apply(variables, fake)


def test_the_losses_are_the_hinges_of_the_paper(model, state, stepped):
    """Example by example; the last has weight 0."""
    _, metrics = stepped
    real, fake = (np.asarray(x, np.float64) for x in logits_by_hand(model, state))
    of_real = [max(0.0, 1.0 - x) for x in real[:-1]]
    of_fake = [max(0.0, 1.0 + x) for x in fake[:-1]]
    hits = sum(x > 0 for x in real[:-1])
    expected = {
        'real_loss': (sum(of_real), 5),
        'loss': (sum(of_real) + sum(of_fake), 5),
        'generator_loss': (-sum(fake[:-1]), 5),
        'real_accuracy': (hits, 5),
        'accuracy': (hits + sum(x < 0 for x in fake[:-1]), 10),
        'generator_attention_gamma': (0.7, 1),
        'discriminator_attention_gamma': (0.7, 1),
    }
    assert set(metrics) == {*expected, 'grad_norm', 'nonfinite_leaf'}
    for name, pair in expected.items():
        np.testing.assert_allclose(metrics[name], pair, rtol=1e-4, err_msg=name)
    assert len({*of_real}) > 1 < len({*of_fake})


def test_each_net_has_the_gradient_of_its_own_loss(model, state, stepped):
    new, _ = stepped
    weight = make_batch()['weight']

    def losses(generator, discriminator):
        params = {'generator': generator, 'discriminator': discriminator}
        real, fake = logits_by_hand(model, state, params)
        judged = jnp.maximum(1 - real, 0) + jnp.maximum(1 + fake, 0)
        return jnp.sum(judged * weight) / 5, -jnp.sum(fake * weight) / 5

    params = state.variables['params']
    nets = params['generator'], params['discriminator']
    expected = {
        'discriminator': jax.jit(jax.grad(lambda d, g: losses(g, d)[0]))(*nets[::-1]),
        'generator': jax.jit(jax.grad(lambda g, d: losses(g, d)[1]))(*nets),
    }
    moved = jax.tree.map(jnp.subtract, params, new.variables['params'])
    moved, expected = (flatten_dict(x, sep='/') for x in (moved, expected))
    assert moved.keys() == expected.keys()
    for path, x in expected.items():
        tolerance = 2e-4 * float(jnp.abs(x).max()) + 1e-6
        np.testing.assert_allclose(moved[path], x, atol=tolerance, err_msg=path)
    moving = [path for path, x in expected.items() if jnp.abs(x).max() > 1e-5]
    assert len(moving) > 0.8 * len(expected)


@pytest.mark.parametrize('held', ['generator', 'discriminator'])
def test_what_a_net_learns_is_nothing_to_the_other(model, state, stepped, held):
    """The gradient of one net does not touch the parameters of the other."""
    new, _ = make_step(model, freeze=(held,))(state, make_batch())
    free, _ = stepped
    for net in ('generator', 'discriminator'):
        before, after, other = (
            jax.tree.leaves(x.variables['params'][net]) for x in (state, new, free)
        )
        for x, y, z in zip(before, after, other, strict=True):
            if net == held:
                np.testing.assert_array_equal(x, y)
            else:
                np.testing.assert_allclose(y, z, atol=1e-5)


def test_both_nets_keep_what_power_iteration_finds(state, stepped):
    """And the generator the statistics of its norms."""
    new, _ = stepped
    before, after = (
        flatten_dict(x.variables['batch_stats'], sep='/') for x in (state, new)
    )
    assert before.keys() == after.keys()
    same = [k for k, x in before.items() if np.array_equal(x, after[k])]
    assert all(before[k].size == 1 for k in same)  # 1x1: the vector is 1 already


def test_a_row_of_weight_0_changes_nothing_of_the_discriminator(model, state, stepped):
    batch = make_batch()
    image = batch['image'].at[-1].set(255 - batch['image'][-1])
    other, metrics = make_step(model)(state, {**batch, 'image': image})
    new, expected = stepped
    for name, pair in expected.items():
        np.testing.assert_allclose(metrics[name], pair, rtol=1e-5, atol=1e-6)
    for x, y in zip(*(jax.tree.leaves(z.variables['params']) for z in (other, new))):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_latents_are_new_in_every_step(model, state):
    step, batch = make_step(model), make_batch()
    first, again, second = (
        step(state.replace(step=jnp.int32(n)), batch)[1]['generator_loss'][0]
        for n in (0, 0, 1)
    )
    assert first == again != second


def test_evaluation_is_of_real_images_alone(model, state):
    batch = make_batch()
    step = jax.jit(partial(gan.eval_step, model=model, settings=gan.Settings()))
    metrics = step(state.variables, batch)
    real, _ = logits_by_hand(model, state)
    expected = [max(0.0, 1.0 - float(x)) for x in real[:-1]]
    np.testing.assert_allclose(metrics['loss'], (sum(expected), 5), rtol=1e-4)
    assert metrics['accuracy'] == (np.sum(real[:-1] > 0), 5)


# --- Devices ------------------------------------------------------------------


def losses_and_evaluation(num_devices, mode, **mesh):
    run = build(make_config(accum_steps=2, **{'augment.flip': True}))
    parallel = Parallel(mode, tuple(jax.devices()[:num_devices]), accum_steps=2, **mesh)
    run = dataclasses.replace(run, parallel=parallel)
    state = parallel.init(run.init)
    step = parallel.train_step(run.train_step, run.state_shape)
    values = []
    with closing(run.train_data(0)) as data:
        for batch in itertools.islice(parallel.prefetch(data), 4):
            state, metrics = step(state, batch)
            names = 'loss', 'generator_loss', 'real_loss', 'generator_attention_gamma'
            values.append([float(metrics[x][0] / metrics[x][1]) for x in names])
    pixels = Sampler(run.model, parallel, 16)(state.average, 21)
    return values, evaluate(run, state.variables), pixels


@pytest.fixture(scope='module')
def on_one_device():
    return losses_and_evaluation(1, 'jit')


@pytest.mark.parametrize(
    ('mode', 'mesh'), [('jit', {}), ('pmap', {}), ('jit', {'fsdp': 2, 'tensor': 2})]
)
def test_eight_devices_give_the_losses_of_one(on_one_device, mode, mesh, monkeypatch):
    """Latents, norms, averages, micro-batches; and the samples."""
    monkeypatch.setattr(vit_jax.sharding, 'MIN_SIZE', 2)  # so that all is sharded
    values, found, pixels = losses_and_evaluation(8, mode, **mesh)
    expected_values, expected, expected_pixels = on_one_device
    np.testing.assert_allclose(values, expected_values, rtol=1e-4, atol=1e-6)
    assert found['examples'] == 37
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4)
    assert pixels.shape == (21, SIZE, SIZE, CHANNELS)
    assert np.abs(pixels.astype(int) - expected_pixels).max() <= 1  # of 255
    assert len({image.tobytes() for image in pixels}) == 21


def test_an_image_does_not_depend_on_the_batch(model, state):
    parallel = Parallel('jit', tuple(jax.devices()))
    sample = Sampler(model, parallel, 8)
    images = sample(state.variables, 11)
    wider = dataclasses.replace(sample, batch_size=24)(state.variables, 13)
    assert np.abs(images.astype(int) - wider[:11]).max() <= 1
    other = dataclasses.replace(sample, seed=1)(state.variables, 11)
    assert np.abs(images.astype(int) - other).max() > 1


# --- Runs ---------------------------------------------------------------------


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    """The workdir of a CNN that has learned something."""
    workdir = tmp_path_factory.mktemp('classifier')
    train(build(make_config('classify', num_steps=2)), workdir)
    return workdir


@pytest.fixture(scope='module')
def trained(classifier, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('gan')
    values = {'gan.classifier': str(classifier), 'gan.num_samples': 21}
    run = build(make_config(**values, **{'checkpoint.keep_best': 'ema_frechet'}))
    return run, workdir, train(run, workdir)


def test_a_run_tells_how_close_its_images_are(trained):
    run, workdir, result = trained
    assert result['examples'] == 37
    assert result['frechet'] > 0 < result['ema_frechet'] != result['frechet']
    lines = [x for x in read_metrics(workdir) if 'train/generator_loss' in x]
    assert [x['step'] for x in lines] == [1, 2, 3, 4, 5]
    gammas = [x['train/discriminator_attention_gamma'] for x in lines]
    assert gammas[0] == 0.0 != gammas[-1]
    assert run.metadata['model']['num_classes'] is None
    assert '21 samples against the images trained on' in run.score.signature


def test_a_run_that_goes_on_ends_like_one_that_was_not_interrupted(trained, tmp_path):
    run, workdir, result = trained
    shutil.copytree(workdir, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '5')  # step 4 is there too
    assert train(run, tmp_path / 'run') == result

    def state(folder):
        with Checkpoints(folder) as checkpoints:
            like = shapes_on(run.parallel.replicated, run.state_shape)
            return checkpoints.restore_latest(like)

    left, right = state(workdir), state(tmp_path / 'run')
    assert left.step == right.step == 5
    for a, b in zip(*map(jax.tree.leaves, (left.state, right.state)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_who_judges_may_change(trained, tmp_path):
    """It has no influence on what is trained."""
    _, workdir, result = trained
    shutil.copytree(workdir, tmp_path / 'run')
    assert train(build(make_config()), tmp_path / 'run') == result


def test_the_average_is_what_it_was(trained):
    """Spectral normalisation's vectors have names with slashes."""
    run, workdir, result = trained
    variables, _ = load_variables(f'{workdir}@ema', run.model, run.inputs)
    assert jax.tree.structure(variables) == jax.tree.structure(
        run.state_shape.variables
    )
    found = evaluate(run, variables)
    for name in ('loss', 'frechet'):
        assert found[name] == pytest.approx(result[f'ema_{name}'], rel=1e-4)


def test_the_distance_is_that_of_the_classifiers_features(trained, classifier):
    """Of single images: the mean of the last map, before the classifier."""
    run, workdir, _ = trained
    variables, _ = load_variables(workdir, run.model, run.inputs)
    cnn = build_model('CNN', None, **CNN)
    judge, _ = load_variables(classifier, cnn, run.inputs)
    apply = jax.jit(partial(cnn.apply, judge))

    def features(images):
        pixels = np.asarray(images, np.float32) / 127.5 - 1
        return np.concatenate([apply(x[None]) for x in pixels]).astype(np.float64)

    fake = features(run.score.sampler(variables, 21))
    with closing(run.probe_data()) as data:
        rows = [(batch['image'], batch['weight']) for batch in data]
    images, weight = map(np.concatenate, zip(*rows))
    real = features(images[weight > 0])
    assert (len(fake), len(real)) == (21, 37)
    gaussians = [x for y in (fake, real) for x in (y.mean(0), np.cov(y.T))]
    expected = frechet_distance(*gaussians)
    assert run.score(variables, {})['frechet'] == pytest.approx(expected, rel=1e-3)
    assert run.score.distance(real) == pytest.approx(0.0, abs=1e-6)


# --- Mistakes -----------------------------------------------------------------


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'model.name': 'CNN', 'model.kwargs': CNN}, '^a CNN does not generate images'),
        ({'dataset.image_size': (4, 4)}, r'is of images of 8x8x1, not 4x4x1; set conf'),
        ({'augment.mixup': 0.2}, "^task='gan' neither erases nor mixes"),
        ({'augment.erasing': 0.2}, "^task='gan' neither erases nor mixes"),
        ({'optim.label_smoothing': 0.1}, 'label_smoothing is set to 0.1, but this run'),
        (
            {'gan.num_samples': 7},
            'config.gan.num_samples is set to 7, but this run',
        ),
        ({'gan.classifier': '/none'}, '^no such file or folder: /none$'),
        (
            {'optim.rules': (('critic/', 4.0, None),)},
            "'critic/' is found in no ",
        ),
        ({'checkpoint.keep_best': 'frechet'}, 'unknown metric in checkpoint.keep_best'),
    ],
)
def test_bad_input(values, message):
    config = make_config()
    if 'model.kwargs' in values:
        with config.unlocked():
            config.model.kwargs = values.pop('model.kwargs')
    config.update_from_flattened_dict(values)
    with pytest.raises(UserError, match=message) as error:
        build(config)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'gan.num_samples': 1}, 'config.gan.num_samples must be 2 or more, not 1'),
        (
            {'dataset.name': DATA.replace('classes=3', 'classes=7')},
            'the classifier .* knows 3 classes, the data has 7$',
        ),
    ],
)
def test_a_classifier_that_does_not_fit(classifier, values, message):
    with pytest.raises(UserError, match=message):
        build(make_config(**{'gan.classifier': str(classifier), **values}))


def test_pixels_that_a_generator_cannot_make():
    colour = {
        'dataset.name': DATA.replace('channels=1', 'channels=3'),
        'dataset.normalize': 'imagenet',
    }
    with pytest.raises(UserError, match=r'makes images in \[-1, 1\]: leave config'):
        build(make_config(**colour))


def test_a_sagan_is_no_classifier():
    config = default_config()
    config.model.name = 'SAGAN'
    config.num_steps = 3
    with pytest.raises(UserError, match=r"^a SAGAN makes images.*config.task='gan'"):
        build(config)
