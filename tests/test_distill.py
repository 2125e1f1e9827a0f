"""Distillation: its losses, who learns from whom, and the runs around them."""

import dataclasses
import functools
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

from vit_jax.build import build
from vit_jax.checkpoint import Checkpoints, shapes_on
from vit_jax.config import ConfigReader, default_config
from vit_jax.data.augment import BatchAugment
from vit_jax.errors import UserError
from vit_jax.frozen import Frozen, check_fits
from vit_jax.image_data import make_image_data
from vit_jax.models import build_model
from vit_jax.parallel import Parallel, make_parallel
from vit_jax.pretrained.source import open_source
from vit_jax.tasks import classify, distill
from vit_jax.train import train
from vit_jax.update import Updates
from vit_jax.writer import read_metrics

B, V, SIZE, CHANNELS = 4, 3, 6, 1
DATA = f'synthetic:size={SIZE},channels={CHANNELS},num_examples=37,num_classes={V}'
CNN = {'widths': (5,), 'strides': (2,), 'num_groups': 1}
VIT = {'width': 8, 'depth': 1, 'mlp_dim': 12, 'num_heads': 2}
DISTILLED = 'DeiT-Ti/3-distilled'


# --- Losses -------------------------------------------------------------------


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference_loss(logits, taught, kind, temperature):
    """One example at a time, in float64."""
    losses = []
    for z, t in zip(logits.astype(np.float64), taught.astype(np.float64)):
        if kind == 'hard':
            losses.append(-np.log(softmax(z)[np.argmax(t)]))
        else:
            p, q = softmax(t / temperature), softmax(z / temperature)
            losses.append(temperature**2 * sum(p * np.log(p / q)))
    return np.array(losses)


@pytest.mark.parametrize(
    ('kind', 'temperature'), [('hard', 1.0), ('soft', 1.0), ('soft', 3.0)]
)
def test_the_teachers_loss_is_that_of_the_paper(kind, temperature):
    rng = np.random.default_rng(0)
    logits, taught = rng.normal(0, 3, (2, 5, 7)).astype(np.float32)
    loss = distill.teacher_loss(logits, taught, kind, temperature)
    expected = reference_loss(logits, taught, kind, temperature)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_soft_gradients_keep_their_size_at_high_temperatures():
    """Towards (z - t) / V, for logits of mean 0: arXiv 1503.02531, equation 4."""
    rng = np.random.default_rng(1)
    z, t = rng.normal(size=(2, 1, 5))
    z, t = z - z.mean(), t - t.mean()
    grad = jax.grad(lambda z: distill.teacher_loss(z, t, 'soft', 100.0).sum())(z)
    np.testing.assert_allclose(grad, (z - t) / 5, atol=5e-3)


# --- Steps --------------------------------------------------------------------


def make_settings(**values):
    teacher = Frozen(
        role='teacher',
        path='/none',
        model=build_model('CNN', V, **CNN),
        image_shape=(SIZE, SIZE, CHANNELS),
        mean=values.pop('mean', (0.5,)),
        std=values.pop('std', (0.5,)),
    )
    return distill.Settings(num_classes=V, teacher=teacher, **values)


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), tree
    )


def make_batch(num_rows=B, seed=0):
    rng = np.random.default_rng(seed)
    shape = (num_rows, SIZE, SIZE, CHANNELS)
    return {
        'image': jnp.asarray(rng.integers(0, 256, shape), jnp.uint8),
        'label': jnp.asarray(rng.integers(0, V, num_rows), jnp.int32),
        'weight': jnp.ones(num_rows).at[-1].set(0.0),
    }


def make_model(name):
    return build_model(name, V, **(CNN if name == 'CNN' else VIT))


@functools.cache  # compiled once
def make_step(settings, name):
    step = partial(
        distill.train_step,
        model=make_model(name),
        tx=optax.sgd(1.0),
        rng=jax.random.key(3),
        settings=settings,
    )
    return jax.jit(step)


def make_state(settings, name, teacher_seed=2):
    init = partial(
        distill.init_state,
        model=make_model(name),
        tx=optax.sgd(1.0),
        rng=jax.random.key(0),
        inputs=(jax.ShapeDtypeStruct((1, SIZE, SIZE, CHANNELS), np.float32),),
        settings=settings,
    )
    shapes = jax.eval_shape(init)
    return shapes.replace(
        step=jnp.zeros((), jnp.int32),
        variables=random_like(shapes.variables, 1),
        teacher=random_like(shapes.teacher, teacher_seed),
    )


def gradient(settings, name=DISTILLED, teacher_seed=2, num_rows=B):
    """(gradient by path, metrics) of a step of plain SGD."""
    state = make_state(settings, name, teacher_seed)
    new, metrics = make_step(settings, name)(state, make_batch(num_rows))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for old, kept in zip(*map(jax.tree.leaves, (state.teacher, new.teacher))):
        np.testing.assert_array_equal(old, kept)
    grads = jax.tree.map(jnp.subtract, state.variables, new.variables)['params']
    return flatten_dict(grads, sep='/'), metrics


def logits_by_hand(settings, name):
    """Both outputs of the student and the teacher's, from the models themselves."""
    model, state, batch = make_model(name), make_state(settings, name), make_batch()
    pixels = np.asarray(batch['image'], np.float64) / 255
    ours = jnp.float32((pixels - settings.mean) / settings.std)
    teacher = settings.teacher
    theirs = jnp.float32((pixels - teacher.mean) / teacher.std)
    student = jax.jit(partial(model.apply, mutable=['distillation']))
    logits, sown = student(state.variables, ours)
    both = jax.tree.leaves(sown) or [logits, logits]
    taught = teacher.model.apply(state.teacher, theirs)
    return *map(np.asarray, both), np.asarray(taught), batch


@pytest.mark.parametrize(
    ('name', 'kind'), [(DISTILLED, 'soft'), ('CNN', 'hard'), ('CNN', 'soft')]
)
def test_the_loss_of_a_step(name, kind):
    values = {'kind': kind, 'weight': 0.3, 'temperature': 2.0, 'label_smoothing': 0.1}
    # The teacher saw other pixels; they are given back to it.
    settings = make_settings(mean=(0.4,), std=(0.2,), **values)
    by_cls, by_dist, taught, batch = logits_by_hand(settings, name)
    label = np.asarray(batch['label'])
    target = np.full((B, V), 0.1 / V) + 0.9 * np.eye(V)[label]
    from_label = -(target * np.log(softmax(by_cls.astype(np.float64)))).sum(-1)
    from_teacher = reference_loss(by_dist, taught, kind, 2.0)
    losses = (0.7 * from_label + 0.3 * from_teacher)[:-1]  # the last row has weight 0
    _, metrics = gradient(settings, name)
    np.testing.assert_allclose(metrics['loss'][0], losses.sum(), rtol=1e-5)
    assert metrics['loss'][1] == B - 1
    total, weight = metrics['teacher_loss']
    np.testing.assert_allclose(total, from_teacher[:-1].sum(), rtol=1e-5)
    hits = (np.argmax(taught, -1) == label)[:-1]
    assert metrics['teacher_accuracy'] == (hits.sum(), weight)
    student_hits = (np.argmax(by_cls + by_dist, -1) == label)[:-1]
    assert metrics['accuracy'][0] == student_hits.sum()


def test_accuracies_count_hits_of_the_label_with_the_largest_share():
    """Of a row that is mostly its neighbour, the neighbour's label."""
    mix = BatchAugment(mixup=1.0, mix_mode='elem')
    settings, batch = make_settings(augment=mix), make_batch(num_rows=12)
    augment_rng, _ = jax.random.split(jax.random.fold_in(jax.random.key(3), 0))
    mixed = classify.prepare(batch, augment_rng, settings)
    own, share = np.asarray(batch['label']), np.asarray(mixed['target'])
    partner = own.reshape(-1, 2)[:, ::-1].ravel()
    larger = np.where(share[np.arange(12), own] > 0.5, own, partner)
    assert (larger != own).sum() > 2
    np.testing.assert_array_equal(mixed['label'], larger)
    state = make_state(settings, 'CNN')
    teacher, student = settings.teacher.model, make_model('CNN')
    taught = teacher.apply(state.teacher, mixed['image'])
    logits = student.apply(state.variables, mixed['image'], train=True)
    _, metrics = make_step(settings, 'CNN')(state, batch)
    for name, output in (('accuracy', logits), ('teacher_accuracy', taught)):
        hits = np.argmax(np.asarray(output), -1) == larger
        assert metrics[name] == (hits[:-1].sum(), 11)  # the last row has weight 0


def test_each_head_has_its_own_teacher():
    settings = make_settings(kind='hard', weight=0.25)
    grads, _ = gradient(settings)
    other, _ = gradient(settings, teacher_seed=7)
    smoothed, _ = gradient(dataclasses.replace(settings, label_smoothing=0.3))
    cls, dist = 'head/logits/kernel', 'head/dist_logits/kernel'
    assert jnp.abs(grads[cls]).max() > 1e-3
    np.testing.assert_array_equal(grads[cls], other[cls])
    assert jnp.abs(grads[dist] - other[dist]).max() > 1e-3
    np.testing.assert_array_equal(grads[dist], smoothed[dist])
    assert jnp.abs(grads[cls] - smoothed[cls]).max() > 1e-3


def test_without_the_teachers_part_it_is_classification():
    settings = make_settings(weight=0.0)
    grads, metrics = gradient(settings, 'CNN')
    state = make_state(settings, 'CNN').replace(teacher=None)
    step = partial(
        classify.train_step,
        model=make_model('CNN'),
        tx=optax.sgd(1.0),
        rng=jax.random.key(3),
        settings=classify.Settings(num_classes=V),
    )
    new, expected = jax.jit(step)(state, make_batch())
    np.testing.assert_allclose(metrics['loss'][0], expected['loss'][0], rtol=1e-6)
    old, params = state.variables['params'], new.variables['params']
    for path, x in flatten_dict(
        jax.tree.map(jnp.subtract, old, params), sep='/'
    ).items():
        np.testing.assert_allclose(grads[path], x, atol=1e-6)


def test_two_micro_batches_are_one_batch():
    settings = make_settings(kind='soft')
    whole, metrics = gradient(settings, 'CNN', num_rows=6)
    settings = dataclasses.replace(settings, updates=Updates(accum_steps=2))
    halves, other = gradient(settings, 'CNN', num_rows=6)
    for path, grad in whole.items():
        np.testing.assert_allclose(halves[path], grad, atol=1e-6, err_msg=path)
    for name in ('loss', 'teacher_loss', 'teacher_accuracy'):
        np.testing.assert_allclose(other[name], metrics[name], rtol=1e-5)


def test_attention_weights_are_not_formed_for_the_logits_of_both_heads():
    """To ask for 'intermediates' would make attention dense, and sow its weights."""
    settings, model = make_settings(), make_model(DISTILLED)
    variables = make_state(settings, DISTILLED).variables
    assert variables.keys() == {'params'}
    image = jnp.zeros((2, SIZE, SIZE, CHANNELS))
    forward = partial(model.apply, mutable=['distillation'])
    _, sown = jax.eval_shape(forward, variables, image)
    assert sown.keys() == {'distillation'}
    assert [x.shape for x in jax.tree.leaves(sown)] == [(2, V), (2, V)]


# --- Runs ---------------------------------------------------------------------


def make_config(task='distill', **values):
    config = default_config(task)
    config.model.name, config.model.kwargs = DISTILLED, VIT
    config.dataset.name = DATA
    config.batch_size = 16
    config.num_steps = 5
    config.checkpoint.every_steps = 2
    config.log.every_steps = 2
    config.log.tensorboard = False
    for key, value in values.items():
        if key == 'model.kwargs':
            config.model.kwargs = value
        else:
            config.update_from_flattened_dict({key: value})
    return config


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """The workdir of a CNN that has learned something."""
    workdir = tmp_path_factory.mktemp('teacher')
    values = {'model.name': 'CNN', 'model.kwargs': CNN, 'num_steps': 2}
    train(build(make_config('classify', **values)), workdir)
    return workdir


@pytest.fixture(scope='module')
def distilled(teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('distilled')
    run = build(make_config(**{'distill.teacher': str(teacher)}))
    return run, workdir, train(run, workdir)


def test_a_student_learns_from_a_run(distilled, teacher):
    run, workdir, result = distilled
    assert result['examples'] == 37
    pinned = run.train_step.keywords['settings'].teacher.path
    assert pinned.startswith(f'{teacher}@')  # its run may go on, the teacher stays
    assert run.metadata['teacher'] == pinned
    lines = [x for x in read_metrics(workdir) if 'train/teacher_loss' in x]
    assert [x['step'] for x in lines] == [2, 4, 5]
    # The loss is the mean of both parts, the label's and the teacher's.
    assert all(x['train/loss'] > x['train/teacher_loss'] / 2 for x in lines)


def test_the_teacher_is_no_part_of_a_checkpoint(distilled):
    run, workdir, _ = distilled
    names = {path.name for path in (workdir / 'checkpoints' / '5').iterdir()}
    assert not [name for name in names if 'teacher' in name]
    arrays = open_source(workdir).file.arrays
    expected = flatten_dict(run.state_shape.variables, sep='/')
    assert arrays.keys() == expected.keys()
    assert not [name for name in arrays if 'conv0' in name or 'both_logits' in name]


def test_the_teacher_is_loaded_as_it_is(distilled, teacher):
    run, *_ = distilled
    shardings = run.parallel.state_sharding(run.state_shape)
    variables = run.load_teacher(sharding=run.parallel.leaf_sharding)
    stored = {k: x.read() for k, x in open_source(teacher).file.arrays.items()}
    loaded = flatten_dict(variables, sep='/')
    assert loaded.keys() == stored.keys()
    for name, x in stored.items():
        np.testing.assert_array_equal(loaded[name], x)
        assert loaded[name].sharding == flatten_dict(shardings.teacher, sep='/')[name]
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), variables)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), run.state_shape.teacher)


def test_a_run_that_goes_on_ends_like_one_that_was_not_interrupted(distilled, tmp_path):
    run, workdir, result = distilled
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


@pytest.mark.parametrize('folder', ['teacher', 'user@host'])
def test_a_student_goes_on_whose_teacher_went_on(teacher, tmp_path, folder):
    """By what the message says: with the teacher of its beginning."""
    path, workdir = tmp_path / folder, tmp_path / 'student'
    shutil.copytree(teacher, path)
    values = {'distill.teacher': str(path)}
    result = train(build(make_config(**values)), workdir)
    shutil.rmtree(workdir / 'checkpoints' / '5')  # step 4 is there too
    shutil.copytree(path / 'checkpoints' / '2', path / 'checkpoints' / '3')
    with pytest.raises(UserError) as error:
        train(build(make_config(**values)), workdir)
    assert str(error.value) == (
        f'the run was begun with teacher {path}@2, now it is {path}@3; go on by '
        f'--config.distill.teacher={path}@2 --allow_changes, or choose another '
        '--workdir'
    )
    values['distill.teacher'] = f'{path}@2'
    assert train(build(make_config(**values)), workdir, allow_changes=True) == result


def test_one_device_a_mesh_and_pmap_give_the_same(distilled):
    run, *_ = distilled
    losses = {}
    for parallel in (
        Parallel('jit', tuple(jax.devices()[:1])),
        Parallel('jit', tuple(jax.devices()), fsdp=2),
        Parallel('pmap', tuple(jax.devices())),
    ):
        state = parallel.init(run.init)
        teacher = run.load_teacher(sharding=parallel.leaf_sharding)
        state = state.replace(teacher=teacher)
        step = parallel.train_step(run.train_step, run.state_shape)
        key = parallel.mode, len(parallel.devices)
        losses[key] = []
        with closing(run.train_data(0)) as data:
            for batch in itertools.islice(parallel.prefetch(data), 3):
                state, metrics = step(state, batch)
                total, weight = metrics['loss']
                losses[key].append(float(total / weight))
    one, *others = losses.values()
    assert len(others) == 2
    assert one[0] > one[-1] > 0
    for other in others:
        np.testing.assert_allclose(other, one, rtol=1e-5)


# --- What is refused ----------------------------------------------------------


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'distill.teacher': ''}, "^task='distill' needs a teacher: set config.dis"),
        ({'distill.teacher': '/none'}, '^no such file or folder: /none$'),
        ({'distill.kind': 'hrad'}, "unknown distill.kind 'hrad'; did you mean 'hard'"),
        (
            {'distill.weight': 1.5},
            r'config.distill.weight must be in \[0, 1\], not 1.5',
        ),
        (
            {'distill.kind': 'soft', 'distill.temperature': 0.0},
            'config.distill.temperature must be above 0, not 0.0',
        ),
        ({'distill.temperature': 2.0}, 'distill.temperature is set to 2.0, but this'),
        (
            {'dataset.name': DATA.replace('classes=3', 'classes=7')},
            'the teacher .* knows 3 classes, the data has 7$',
        ),
        (
            {'dataset.name': DATA.replace('channels=1', 'channels=3')},
            r'sees images of 1 channel\(s\), those of the data have 3$',
        ),
    ],
)
def test_bad_input(teacher, values, message):
    with pytest.raises(UserError, match=message) as error:
        build(make_config(**{'distill.teacher': str(teacher), **values}))
    assert '\n' not in str(error.value)


def test_a_teacher_that_does_not_fit_the_classes(teacher):
    metadata = open_source(teacher).metadata
    config, parallel = make_config('classify'), make_parallel('jit')
    images = make_image_data(ConfigReader(config), parallel)
    check_fits('T', metadata, images)
    dataset = dataclasses.replace(images.dataset, class_names=('a', 'b', 'c'))
    others = dataclasses.replace(images, dataset=dataset)
    with pytest.raises(
        UserError, match=r'^T knows 3 classes \(class_0, .*\(a, b, c\)$'
    ):
        check_fits('T', metadata, others)
    features = {**metadata, 'model': {**metadata['model'], 'num_classes': None}}
    with pytest.raises(UserError, match=r'^T has no classifier, only features'):
        check_fits('T', features, images)


def test_a_teacher_that_cannot_see_the_images(tmp_path):
    """A ViT of patch 3 was trained on 6x6 images; these are 5x5."""
    run = build(make_config('classify'))
    state = run.parallel.init(run.init)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {**run.metadata, 'position': 16})
    other = {'dataset.image_size': (5, 5), 'model.name': 'CNN', 'model.kwargs': CNN}
    with pytest.raises(UserError, match=f'^the teacher {tmp_path}@1 does not fit'):
        build(make_config(**{'distill.teacher': str(tmp_path), **other}))
    # Of another size that fits, its positions are resized.
    other['dataset.image_size'] = (9, 3)
    run = build(make_config(**{'distill.teacher': str(tmp_path), **other}))
    grid = run.load_teacher()['params']['posemb']['grid']
    assert grid.shape == (3, 1, 8)
    assert grid.shape == run.state_shape.teacher['params']['posemb']['grid'].shape


def test_weights_that_do_not_say_what_they_are(tmp_path):
    np.savez(tmp_path / 'weights.npz', kernel=np.zeros(3))
    path = str(tmp_path / 'weights.npz')
    with pytest.raises(UserError, match='does not say which model it is of'):
        build(make_config(**{'distill.teacher': path}))
