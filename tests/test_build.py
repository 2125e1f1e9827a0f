"""`build`: what a config becomes, that every key of it counts, what it refuses."""

import itertools
import json
import re
import sys
import types
from contextlib import closing
from functools import partial

import jax
import numpy as np
import pytest

import vit_jax.build
import vit_jax.image_data
from vit_jax.build import build
from vit_jax.config import default_config, flatten, from_dict
from vit_jax.data.datasets import Dataset
from vit_jax.errors import UserError
from vit_jax.models.cnn import CNN
from vit_jax.summary import count_params
from vit_jax.tasks import classify

SYNTHETIC = 'synthetic:size=6,channels=3,num_examples=37,num_classes=7'


def make_config(**values):
    """A small CNN; `values` by dotted key."""
    config = default_config()
    config.model.name = 'CNN'
    config.model.kwargs = {'widths': (5,), 'strides': (2,), 'num_groups': 1}
    config.dataset.name = SYNTHETIC
    config.batch_size = 8
    config.num_steps = 3
    for key, value in values.items():
        if key == 'model.kwargs':
            config.model.kwargs = value
        else:
            config.update_from_flattened_dict({key: value})
    return config


def make_vit(**values):
    kwargs = {'width': 8, 'depth': 2, 'mlp_dim': 12, 'num_heads': 2}
    return make_config(**{'model.name': 'ViT-Ti/2', 'model.kwargs': kwargs, **values})


# --- What a config becomes ----------------------------------------------------


def test_run_of_a_vit():
    values = {'dataset.image_size': (4, 10), 'dataset.eval_crop': 0.875}
    run = build(make_vit(num_steps=5, **values))
    assert (run.num_steps, run.batch_size) == (5, 8)
    assert run.model.num_classes == 7
    assert run.model.width == 8
    image = run.batch_shape['image']
    assert (image.shape, image.dtype) == ((8, 4, 10, 3), np.uint8)
    params = run.state_shape.variables['params']
    assert count_params(params['posemb']) == (2 * 5 + 1) * 8
    assert run.metadata['model'] == {
        'name': 'ViT-Ti/2',
        'kwargs': {'width': 8, 'depth': 2, 'mlp_dim': 12, 'num_heads': 2},
        'num_classes': 7,
        'dtype': 'float32',
        'grid': [2, 5],
        'prefix_tokens': 1,
        'activation': 'gelu',
        'layer_norm_eps': 1e-6,
        'num_heads': 2,
    }
    assert run.metadata['class_names'] == [f'class_{i}' for i in range(7)]
    assert run.metadata['eval_split'] == 'test'
    assert run.metadata['num_train_examples'] == 37
    assert run.metadata['preprocessing'] == {
        'image_size': [4, 10],
        'channels': 3,
        'mean': [0.5],
        'std': [0.5],
        'crop_fraction': 0.875,
        'interpolation': 'bicubic',
    }


def test_metadata_is_json_and_holds_the_config():
    config = make_vit(**{'dataset.image_size': (4, 10)})
    run = build(config)
    metadata = json.loads(json.dumps(run.metadata))
    again = build(from_dict(metadata['config']))
    assert json.loads(json.dumps(again.metadata)) == metadata
    assert again.model == run.model


@pytest.mark.parametrize(('pool', 'prefix_tokens'), [('cls', 1), ('mean', 0)])
def test_prefix_tokens_of_the_metadata(pool, prefix_tokens):
    kwargs = {'width': 8, 'depth': 1, 'mlp_dim': 12, 'num_heads': 2, 'pool': pool}
    run = build(make_vit(**{'model.kwargs': kwargs}))
    assert run.metadata['model']['prefix_tokens'] == prefix_tokens
    assert run.metadata['model']['grid'] == [3, 3]


def test_image_size_is_that_of_the_dataset_by_default():
    run = build(make_config())
    assert run.batch_shape['image'].shape == (8, 6, 6, 3)
    assert 'grid' not in run.metadata['model']  # a CNN has none


@pytest.mark.parametrize(
    ('values', 'steps'),
    [
        ({'num_steps': 11}, 11),
        ({'num_epochs': 1.0}, 5),  # 37 / 8 = 4.6
        ({'num_epochs': 3.0}, 14),  # 13.9
        ({'num_epochs': 0.3}, 1),  # 1.4
        # An epoch is the whole split, whatever part of it is used.
        ({'num_epochs': 3.0, 'dataset.train_fraction': 0.5}, 14),
        ({'num_epochs': 3.0, 'batch_size': 16}, 7),  # 6.9
    ],
)
def test_number_of_steps(values, steps):
    config = make_config(**{'num_steps': None, **values})
    assert build(config).num_steps == steps


def test_imagenet_is_planned_without_the_data(tmp_path):
    config = make_config(
        **{
            'dataset.name': 'imagenet2012',
            'dataset.data_dir': str(tmp_path),
            'dataset.image_size': (8, 8),
            'num_steps': None,
            'num_epochs': 300.0,
            'batch_size': 512,
        }
    )
    run = build(config)
    assert run.num_steps == 750_684  # 300 x 1,281,167 / 512
    assert run.metadata['eval_split'] == 'validation'
    with pytest.raises(UserError, match=r'imagenet2012.* is not prepared at'):
        run.train_data(0)


def test_pixels_are_normalized():
    """uint8 0, 51 and 255 with ImageNet's mean and deviation of each channel."""
    config = make_config(**{'dataset.normalize': 'imagenet'})
    run = build(config)
    settings = run.train_step.keywords['settings']
    image = np.array([0, 51, 255], np.uint8).reshape(1, 1, 3, 1).repeat(3, axis=-1)
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    expected = (np.array([0.0, 0.2, 1.0])[:, None] - mean) / std
    np.testing.assert_allclose(
        classify.normalize(image, settings.mean, settings.std)[0, 0],
        expected,
        rtol=1e-5,
    )
    assert run.eval_step.keywords['settings'] == settings
    assert run.metadata['preprocessing']['mean'] == [0.485, 0.456, 0.406]
    assert run.metadata['preprocessing']['std'] == [0.229, 0.224, 0.225]


def test_half_maps_pixels_to_minus_one_and_one():
    settings = build(make_config()).train_step.keywords['settings']
    image = np.array([0, 255], np.uint8).reshape(1, 1, 2, 1)
    pixels = classify.normalize(image, settings.mean, settings.std)
    assert pixels.ravel().tolist() == [-1.0, 1.0]


def test_data_of_a_run():
    """The fraction to train on, all to evaluate, each in batches of its own size."""
    run = build(make_config(**{'dataset.train_fraction': 0.3, 'eval.batch_size': 16}))
    with closing(run.train_data(0)) as batches:
        first, *others = itertools.islice(batches, 5)
    with closing(run.train_data(8)) as batches:
        second = next(batches)
    np.testing.assert_array_equal(second['image'], others[0]['image'])
    assert first['image'].shape == (8, 6, 6, 3)
    seen = {image.tobytes() for batch in (first, *others) for image in batch['image']}
    assert len(seen) == 14  # 30% of 6 or 5 examples is 2, of each of 7 classes
    with closing(run.eval_data()) as batches:
        weights = [batch['weight'] for batch in batches]
    assert [len(weight) for weight in weights] == [16, 16, 16]
    assert sum(map(sum, weights)) == 37


# --- Every key counts ---------------------------------------------------------


@pytest.fixture
def fork(monkeypatch):
    """A fork with a dataset that keeps its data_dir, a model and a task."""

    def make(data_dir, name='one'):
        splits = {'train': 37, 'test': 13, 'extra': 11}
        names = tuple('abcdefg')
        return Dataset(name, str(data_dir), splits, names, (6, 6, 3), lambda s: s)

    module = types.ModuleType('build_fork.things')
    module.make = make
    module.other = partial(make, name='other')
    module.net = partial(CNN, kernel_size=1)
    monkeypatch.setitem(sys.modules, 'build_fork.things', module)
    task = types.ModuleType('build_fork.task')
    task.make_settings = classify.make_settings
    task.init_state = classify.init_state
    task.train_step = classify.train_step
    task.eval_step = lambda variables, batch, **_: {'loss': (0.0, 1.0)}
    monkeypatch.setitem(sys.modules, 'build_fork.task', task)


@pytest.fixture
def unread(monkeypatch):
    """Keys that the last build did not read. What it would read is told instead."""
    keys = []

    def record(config, unread, named):
        keys[:] = unread

    def tell(*args, **kwargs):
        return [*args, sorted(kwargs.items())]

    monkeypatch.setattr(vit_jax.build, 'check_unread', record)
    for name in ('train_batches', 'eval_batches', 'subsample'):
        monkeypatch.setattr(vit_jax.image_data, name, tell)
    return keys


def trace(function, *args):
    """What a function computes, constants included."""
    closed = jax.make_jaxpr(function)(*args)
    consts = [
        jax.random.key_data(x)
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        else x
        for x in map(jax.numpy.asarray, closed.consts)
    ]
    text = re.sub(r'0x[0-9a-f]+', '', str(closed))  # addresses of functions
    return text, [np.asarray(x).tobytes() for x in consts]


def fingerprint(run):
    """All that a run does and says, but for the config it holds."""
    variables = run.state_shape.variables
    return {
        'init': trace(run.init),
        'load': run.load and (run.load.args[::2], run.load.keywords['new_head']),
        'train_step': trace(run.train_step, run.state_shape, run.batch_shape),
        'train_steps': run.train_steps is not run.train_step,
        'feed': run.feed.func.__name__,
        'eval_step': trace(run.eval_step, variables, run.batch_shape),
        'train_data': repr(run.train_data(3)),
        'eval_data': repr(run.eval_data()),
        'schedule': [float(run.schedule(step)) for step in range(run.num_steps)],
        'dataset': (run.dataset.name, run.dataset.location),
        'parallel': (
            run.parallel.mode,
            run.parallel.mesh.shape,
            run.parallel.accum_steps,
        ),
        'metadata': {k: v for k, v in run.metadata.items() if k != 'config'},
        **{name: getattr(run, name) for name in NUMBERS},
    }


NUMBERS = (
    'num_steps',
    'batch_size',
    'periods',
    'keep',
    'keep_best',
    'average',
    'tensorboard',
    'wandb',
)
COMPUTED = 'init train_step eval_step'
VIT = {'model.kwargs': {'width': 8, 'depth': 2, 'mlp_dim': 12, 'num_heads': 2}}
MIXING = {'augment.mix_mode', 'augment.mix_prob', 'augment.mix_switch_prob'}

# Key -> another value, and what of the run becomes another with it; at times after
# values for other keys.
OTHERS = {
    'seed': (1, 'init train_step train_data'),
    'task': ('build_fork.task', 'eval_step'),
    'model.name': ('build_fork.things:net', f'{COMPUTED} metadata'),
    'model.kwargs': (
        {'widths': (7,), 'strides': (2,), 'num_groups': 1},
        f'{COMPUTED} metadata',
    ),
    'init.weights': ('/there', 'load'),
    'init.new_head': (True, 'load', {'init.weights': '/there'}),
    'dataset.name': ('build_fork.things:other', 'dataset metadata'),
    'dataset.data_dir': ('/there', 'dataset'),
    'dataset.train_split': ('extra', 'train_data metadata'),
    'dataset.eval_split': ('extra', 'eval_data metadata'),
    'dataset.train_fraction': (0.5, 'train_data'),
    'dataset.image_size': ((4, 8), f'{COMPUTED} train_data eval_data metadata'),
    'dataset.normalize': ('imagenet', 'train_step eval_step metadata'),
    'dataset.eval_crop': (0.5, 'eval_data metadata'),
    'dataset.interpolation': ('bilinear', 'train_data eval_data metadata'),
    'dataset.num_workers': (2, 'train_data eval_data'),
    'dataset.placement': ('device', 'feed train_steps'),
    'dataset.steps_per_call': (2, 'periods', {'dataset.placement': 'device'}),
    'dataset.skip_corrupt': (True, 'train_data eval_data'),
    'dataset.timeout_seconds': (7, 'train_data eval_data'),
    'augment.crop': ('pad', 'train_data'),
    'augment.pad': (2, 'train_data', {'augment.crop': 'pad'}),
    'augment.min_scale': (0.3, 'train_data', {'augment.crop': 'resized'}),
    'augment.flip': (True, 'train_data'),
    'augment.randaugment': ('plain-n2-m9', 'train_data'),
    'augment.erasing': (0.25, 'train_step'),
    'augment.mixup': (0.8, 'train_step'),
    'augment.cutmix': (1.0, 'train_step'),
    'augment.mix_mode': ('elem', 'train_step', {'augment.mixup': 0.8}),
    'augment.mix_prob': (0.5, 'train_step', {'augment.mixup': 0.8}),
    'augment.mix_switch_prob': (
        0.3,
        'train_step',
        {'augment.mixup': 0.8, 'augment.cutmix': 1.0},
    ),
    'augment.repeats': (3, 'train_data'),
    'batch_size': (16, 'train_step eval_step train_data eval_data batch_size'),
    'accum_steps': (2, 'train_step parallel', {'batch_size': 16}),
    'num_steps': (5, 'train_step schedule num_steps'),
    'num_epochs': (
        2.0,
        'train_step schedule num_steps',
        {'num_steps': None, 'num_epochs': 1.0},
    ),
    'optim.name': ('sgd', 'init train_step'),
    'optim.learning_rate': (0.1, 'train_step schedule'),
    'optim.end_learning_rate': (1e-4, 'train_step schedule'),
    'optim.weight_decay': (0.1, 'train_step'),
    'optim.clip_norm': (1.0, 'train_step'),
    'optim.schedule': ('constant', 'train_step schedule'),
    'optim.warmup_steps': (2, 'train_step schedule'),
    'optim.cooldown_steps': (2, 'train_step schedule', {'optim.schedule': 'constant'}),
    'optim.label_smoothing': (0.1, 'train_step'),
    'optim.b1': (0.8, 'train_step'),
    'optim.b2': (0.99, 'train_step'),
    'optim.layer_decay': (0.5, 'train_step', {'model.name': 'ViT-Ti/2', **VIT}),
    'optim.rules': ((('head', 0.1, 1.0),), 'train_step'),
    'optim.freeze': (('head',), 'init train_step'),
    'optim.ema_decay': (0.9, 'init train_step'),
    'dtype': ('bfloat16', f'{COMPUTED} metadata'),
    'parallel.mode': ('pmap', 'parallel'),
    'parallel.data': (8, ''),  # what it would be anyway, or an error
    'parallel.fsdp': (2, 'parallel'),
    'parallel.tensor': (2, 'parallel'),
    'parallel.remat': ('full', COMPUTED, {'model.name': 'ViT-Ti/2', **VIT}),
    'parallel.heartbeat_seconds': (7, ''),  # is for who starts the processes
    'eval.every_steps': (7, 'periods'),
    'eval.batch_size': (24, 'eval_data'),
    'checkpoint.every_steps': (7, 'periods'),
    'checkpoint.keep': (3, 'keep'),
    'checkpoint.keep_best': ('accuracy', 'keep_best'),
    'checkpoint.average': (2, 'average'),
    'log.every_steps': (7, 'periods'),
    'log.wandb': ('project', 'wandb'),
    'log.profile_steps': ('2:3', 'periods'),
    'nan_policy': ('skip', 'train_step'),
    'log.tensorboard': (False, 'tensorboard'),
}


def test_every_key_is_tried():
    assert set(OTHERS) == {key for key, _ in flatten(default_config())}


@pytest.mark.parametrize('key', OTHERS)
def test_every_key_counts(key, fork, unread):
    """It is read, and changes what it should and nothing else."""
    value, changed, *before = OTHERS[key]
    base = {'dataset.name': 'build_fork.things:make', **dict(*before)}
    expected = fingerprint(build(make_config(**base)))
    assert not any(name == key or name.startswith(f'{key}.') for name in unread)
    found = fingerprint(build(make_config(**{**base, key: value})))
    assert {name for name in found if found[name] != expected[name]} == set(
        changed.split()
    )


@pytest.mark.parametrize(
    ('values', 'left'),
    [
        ({}, {'augment.pad', 'augment.min_scale', 'init.new_head', *MIXING}),
        ({'augment.crop': 'pad'}, {'augment.min_scale', 'init.new_head', *MIXING}),
        ({'augment.crop': 'resized'}, {'augment.pad', 'init.new_head', *MIXING}),
        (
            {'augment.mixup': 0.8},
            {
                'augment.pad',
                'augment.min_scale',
                'init.new_head',
                'augment.mix_switch_prob',
            },
        ),
        (
            {'optim.name': 'sgd', 'augment.crop': 'pad', 'init.weights': '/there'},
            {'augment.min_scale', 'optim.b2', *MIXING},
        ),
        (
            {'optim.schedule': 'constant', 'augment.crop': 'pad'},
            {'augment.min_scale', 'init.new_head', 'optim.end_learning_rate', *MIXING},
        ),
    ],
)
def test_keys_that_a_run_does_not_read(values, left, unread):
    build(make_config(**values))
    of_others = {'dataset.data_dir', 'dataset.steps_per_call'}
    assert set(unread) == left | of_others


# --- What is refused ----------------------------------------------------------


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        (
            {'batch_size': 13, 'eval.batch_size': 16},
            '^config.batch_size 13 cannot be split over 8 .* can: 8 or 16',
        ),
        ({'batch_size': 4}, 'batch_size 4 cannot be split over 8 .* can: 8$'),
        (
            {'eval.batch_size': 20},
            r'^config.eval.batch_size 20 .* can: 16 or 24',
        ),
        ({'batch_size': 0}, 'config.batch_size must be above 0, not 0'),
        ({'num_epochs': 1.0}, 'set one of config.num_steps and config.num_epochs, no'),
        ({'num_steps': None}, 'set one of config.num_steps and config.num_epochs'),
        ({'num_steps': 0}, 'config.num_steps must be above 0, not 0'),
        ({'num_steps': None, 'num_epochs': 0.01}, 'the run has 0 steps'),
        (
            {
                'dataset.train_split': 'train[:3]',
                'num_steps': None,
                'num_epochs': 1.0,
            },
            r"split 'train\[:3\]' is not known here; set config.num_steps",
        ),
        ({'optim.warmup_steps': 4}, 'warmup_steps 4 must be within num_steps 3'),
        ({'optim.warmup_steps': -1}, 'warmup_steps -1 must be within num_steps 3'),
        ({'dataset.image_size': (4,)}, r'must be \(height, width\), not \(4,\)'),
        ({'dataset.image_size': (4, 0)}, r'must be \(height, width\), not \(4, 0\)'),
        ({'dataset.image_size': (4, 2.5)}, r'must be \(height, width\)'),
        ({'dataset.image_size': (4, 6, 3)}, r'must be \(height, width\)'),
        ({'dataset.normalize': 'imagnet'}, "'imagnet'; did you mean 'imagenet'"),
        ({'dataset.interpolation': 'cubic'}, "'cubic'; did you mean 'bicubic'"),
        (
            {
                'dataset.normalize': 'imagenet',
                'dataset.name': 'synthetic:channels=1',
            },
            "'imagenet' is for images of 3 channels, 'synthetic:channels=1' has 1",
        ),
        ({'dataset.eval_split': 'tset'}, "unknown split .*'tset'; .* 'test'"),
        ({'dataset.eval_split': 'tset[:3]'}, r"unknown split .*'tset\[:3\]'"),
        (
            {'model.kwargs': {'widths': (5,), 'strides': (2,), 'kernel_init': print}},
            "must be plain values .* by its path, 'package.module:name'",
        ),
        ({'dataset.train_split': 'trian'}, "unknown split .*'trian'; .* 'train'"),
        (
            {'dataset.train_fraction': 1.5},
            r'fraction must be in \(0, 1\], not 1.5',
        ),
        ({'dataset.eval_crop': 0.0}, r'eval_crop must be in \(0, 1\], not 0.0'),
        ({'augment.min_scale': 2.0}, r'min_scale must be in \(0, 1\], not 2.0'),
        ({'dataset.num_workers': -1}, 'num_workers must be 0 or more, not -1'),
        ({'augment.pad': -1}, 'augment.pad must be 0 or more, not -1'),
        ({'seed': -1}, r'config.seed must be in \[0, 2\*\*32\), not -1'),
        ({'seed': 2**32}, r'config.seed must be in \[0, 2\*\*32\), not 4294967296'),
        ({'optim.learning_rate': float('inf')}, 'learning_rate must be 0 or more'),
        ({'num_steps': None, 'num_epochs': float('inf')}, 'num_epochs must be above 0'),
        ({'optim.learning_rate': -0.1}, 'learning_rate must be 0 or more'),
        ({'optim.weight_decay': float('nan')}, 'weight_decay must be 0 or more'),
        ({'optim.clip_norm': 0.0}, 'clip_norm must be above 0, not 0.0'),
        ({'optim.label_smoothing': 1.0}, r'smoothing must be in \[0, 1\), not 1.0'),
        ({'eval.every_steps': 0}, 'eval.every_steps must be above 0'),
        ({'checkpoint.every_steps': 0}, 'checkpoint.every_steps must be above 0'),
        ({'checkpoint.keep': 0}, 'checkpoint.keep must be above 0'),
        ({'log.every_steps': -7}, 'log.every_steps must be above 0, not -7'),
        ({'augment.crop': 'resize'}, "unknown augment.crop 'resize'; .* 'resized'"),
        ({'optim.name': 'adam'}, "unknown optim.name 'adam'; did you mean 'adamw'"),
        ({'optim.schedule': 'cosin'}, "unknown optim.schedule 'cosin'; .* 'cosine'"),
        ({'dtype': 'float16'}, "unknown dtype 'float16'; did you mean 'bfloat16'"),
        ({'parallel.mode': 'jitt'}, "unknown parallel.mode 'jitt'; .* 'jit'"),
        ({'task': 'clasify'}, "unknown task 'clasify'; did you mean 'classify'"),
        ({'task': 'no_fork.task'}, "cannot import 'no_fork.task'"),
        ({'model.name': 'CNM'}, "unknown model 'CNM'; did you mean 'CNN'"),
        ({'model.name': 'no_fork.nets:A'}, "cannot import 'no_fork.nets:A'"),
        ({'model.kwargs': {'width': (3,)}}, "of CNN 'width'; did you mean 'widths'"),
        ({'model.kwargs': {'kernel_size': 2.5}}, 'kernel_size of CNN is like 3; 2.5'),
        ({'dataset.name': 'synthetic:sise=3'}, "'sise'; did you mean 'size'"),
        ({'dataset.name': 'folder:/none'}, 'no such folder: /none'),
        ({'augment.pad': 7}, 'config.augment.pad is set to 7, but .* not read it'),
        (
            {'augment.crop': 'pad', 'augment.min_scale': 0.5},
            'config.augment.min_scale is set to 0.5, but',
        ),
    ],
)
def test_values_that_do_not_fit(values, message):
    with pytest.raises(UserError, match=message) as error:
        build(make_config(**values))
    assert '\n' not in str(error.value)


def test_a_model_of_sequences_is_not_for_images():
    values = {'model.name': 'Transformer-tiny', 'model.kwargs': {}}
    with pytest.raises(UserError, match='takes sequences of tokens, not images'):
        build(make_config(**values))


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        (
            {'dataset.image_size': (8, 9)},
            'patch 2x2 does not divide the image 8x9',
        ),
        (
            {'model.kwargs': {'width': 8, 'num_heads': 3, 'depth': 1, 'mlp_dim': 4}},
            'num_heads 3 does not divide the width 8',
        ),
    ],
)
def test_models_that_do_not_fit_the_images(values, message):
    with pytest.raises(UserError, match=message):
        build(make_vit(**values))


def test_images_of_all_sizes_need_an_image_size(tmp_path):
    folder = tmp_path / 'train' / 'cat'
    folder.mkdir(parents=True)
    (folder / 'a.png').touch()
    name = f'folder:{tmp_path}'
    with pytest.raises(UserError, match=r'differ in size; set dataset\.image_size'):
        build(make_config(**{'dataset.name': name, 'dataset.eval_split': 'train'}))
    with pytest.raises(UserError, match=r'no validation, val or test split; set'):
        build(make_config(**{'dataset.name': name, 'dataset.image_size': (4, 4)}))


def test_splits_without_images(tmp_path):
    (tmp_path / 'train' / 'cat').mkdir(parents=True)
    (tmp_path / 'train' / 'cat' / 'a.png').touch()
    (tmp_path / 'val' / 'cat').mkdir(parents=True)
    values = {'dataset.name': f'folder:{tmp_path}', 'dataset.image_size': (4, 4)}
    with pytest.raises(UserError, match=r"split 'val' of .* has no examples"):
        build(make_config(**values))


@pytest.mark.parametrize('split', ['test[:5]', 'train+test', 'test'])
def test_splits_as_tfds_writes_them(split):
    run = build(make_config(**{'dataset.eval_split': split}))
    assert run.metadata['eval_split'] == split


def test_what_a_recipe_turns_on_can_be_turned_off():
    config = make_config(**{'augment.crop': 'pad', 'augment.pad': 2})
    config.augment.crop = 'none'
    with pytest.raises(UserError, match=r'config\.augment\.pad is set to 2'):
        build(config)
    build(config, named=['augment.crop'])
    build(config, named=[])  # as a run's own config is built again


def test_a_profile_past_the_end_is_refused():
    config = make_config(num_steps=6, **{'log.profile_steps': '7:9'})
    with pytest.raises(UserError, match='begins at step 7; the run has 6'):
        build(config)


def test_a_key_that_is_named_must_be_read():
    """Though its value is the default's."""
    config = make_config()
    build(config, named=['augment.crop'])
    with pytest.raises(UserError, match=r'config\.augment\.pad is set to 4'):
        build(config, named=['augment.pad'])
