"""What the experiments that train compute themselves."""

import importlib
import pathlib

import jax
import numpy as np
import pytest

from vit_jax.config import load_config, override
from vit_jax.data.datasets import load_dataset
from vit_jax.data.transforms import decode_image
from vit_jax.experiment import build_cell, load_experiment

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'


def load(name):
    return load_experiment(EXPERIMENTS / name)


@pytest.mark.parametrize('order', [(2, 3, 0, 1), (1, 3, 0, 2)])
def test_parts_lie_apart(order):
    data = importlib.import_module('experiments.parts.data')
    image = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    canvas = data.arrange(image, order, row=3, col=5)
    assert canvas.shape == (16, 16, 1)
    for place, part in enumerate(order):
        for y in range(4):
            for x in range(4):
                row = 3 + 6 * (place // 2) + y
                there = canvas[row, 5 + 6 * (place % 2) + x]
                assert there == image[4 * (part // 2) + y, 4 * (part % 2) + x]
    assert np.count_nonzero(canvas) == 63


def test_ink_at_its_sides_does_not_give_a_scrambled_digit_away(tmp_path):
    data = importlib.import_module('experiments.parts.data')
    images = data.make_halves(str(tmp_path)).open('train')
    ink, label = [], []
    for example in map(images.__getitem__, range(0, len(images), 5)):
        whole = example['image'][..., 0].astype(float)
        row, col = (int(np.flatnonzero(whole.sum(axis)).min()) for axis in (1, 0))
        ink.append([whole[row], whole[:, col]])
        label.append(example['label'])
    for side in np.sum(ink, axis=-1).T:
        right = [np.mean((side > cut) == label) for cut in np.unique(side)]
        assert np.abs(np.array(right) - 0.5).max() < 0.1


def test_half_a_digit_gives_much_away_to_who_knows_where_it_lies(tmp_path):
    (cell,) = (c for c in load('parts').cells('forest') if c.seed == 0)
    line = load('parts').measure(cell, tmp_path, str(tmp_path))
    assert 0.9 < line['accuracy'] < 1.0


@pytest.mark.parametrize(('name', 'tells'), [('CNN-3', False), ('CNN-7', True)])
def test_who_sees_one_part_at_a_time_cannot_tell(name, tells, tmp_path):
    """Wherever the whole lies, also at the border."""
    data = importlib.import_module('experiments.parts.data')
    cell, *_ = load('parts').cells(name)
    run = build_cell(cell, data_dir=str(tmp_path))
    params = run.init().variables
    digit = np.random.default_rng(0).integers(256, size=(8, 8, 1), dtype=np.uint8)
    images = [
        data.arrange(digit, order, row, col)
        for order in (data.RIGHT, data.SCRAMBLED)
        for row, col in ((0, 0), (6, 3))
    ]
    logits = run.model.apply(params, np.stack(images) / np.float32(127.5) - 1)
    for row in (1, 2, 3) if not tells else (2, 3):
        assert np.allclose(logits[row], logits[0], atol=1e-5) != tells


def test_digits_are_framed(tmp_path):
    data = importlib.import_module('experiments.equivariance.data')
    dataset = data.make(str(tmp_path))
    example = dataset.open('test')[5]
    digit = load_dataset('digits', str(tmp_path)).open('test')[5]
    pixels = decode_image(digit['image'], 1, '')
    assert example['image'].shape == dataset.image_shape == (16, 16, 1)
    np.testing.assert_array_equal(example['image'][4:12, 4:12], pixels)
    assert example['image'].sum() == pixels.sum()
    assert example['label'] == digit['label']


def test_cells_are_shuffled_as_loops_do():
    sweep = importlib.import_module('experiments.equivariance.sweep')
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 6, 8, 5))
    order = rng.permutation(12)
    found = np.asarray(sweep.shuffle_cells(x, order, 2))
    for i, j in enumerate(order):
        (row, col), (y, z) = divmod(i, 4), divmod(int(j), 4)
        np.testing.assert_array_equal(
            found[:, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2],
            x[:, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2],
        )
    assert sweep.distance(x, x) == 0.0


@pytest.mark.parametrize(('posemb', 'right'), [('none', 50.0), ('sincos1d', 100.0)])
def test_a_sentence_is_told_from_its_reverse_by_positions_alone(posemb, right):
    sweep = importlib.import_module('experiments.equivariance.sweep')
    found = sweep.reverse_sentence(posemb, seed=0)
    assert found['right'] == pytest.approx(right, abs=1.0)
    for when in ('before', 'after'):
        assert (found[when] < 1e-5) == (posemb == 'none')


@pytest.mark.parametrize(
    ('name', 'shift', 'shuffle'),
    [
        ('CNN', True, True),
        ('CNN, circular padding', False, True),
        ('ConViT', True, True),
        ('ViT', True, True),
        ('ViT without positions', False, False),
    ],
)
def test_what_changes_by_construction(name, shift, shuffle, tmp_path):
    sweep = importlib.import_module('experiments.equivariance.sweep')
    cell, *_ = load('equivariance').cells(f'digits/{name}')
    run = build_cell(cell, data_dir=str(tmp_path))
    found = sweep.look(run, run.init().variables, seed=0)
    assert (found['shift'] > 1e-2) == shift
    assert (found['shuffle'] > 1e-2) == shuffle


@pytest.mark.parametrize(('row', 'frozen'), [('b', 12), ('f', None), ('a', 0)])
def test_what_is_frozen_of_convit(row, frozen, tmp_path):
    """Twelve gates, or every parameter of three GPSA layers; of the last layer none."""
    (cell,) = (
        c for c in load('convit_table3').cells(f'digits/{row}/10%') if c.seed == 0
    )
    run = build_cell(cell, data_dir=str(tmp_path))
    state = run.init()
    before = jax.tree.leaves_with_path(state.variables['params'])
    batch = {
        'image': np.full((64, 8, 8, 1), 100, np.uint8),
        'label': np.arange(64, dtype=np.int32) % 10,
        'weight': np.ones(64, np.float32),
        'index': np.arange(64, dtype=np.int32),
    }
    for _ in range(2):  # the first has a learning rate of 0
        state, _ = jax.jit(run.train_step)(state, batch)
    still, moved = {}, {}
    after = jax.tree.leaves(state.variables['params'])
    for (path, x), y in zip(before, after, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        (still if np.array_equal(x, y) else moved)[name] = x
    heads = tuple(f'block0{i}/attention/' for i in range(3))
    gpsa = {name for name in {*still, *moved} if name.startswith(heads)}
    if frozen is None:
        assert gpsa <= set(still)
    else:
        assert sum(x.size for name, x in still.items() if 'gating' in name) == frozen


@pytest.mark.parametrize(
    ('name', 'imagenet'),
    [
        ('convit_table2', (300.0, None)),
        ('convit_table3', (300.0, None)),
        ('convit_locality', (None, 76_000)),
    ],
)
def test_of_a_part_as_many_images_are_seen(name, imagenet):
    """`num_epochs` counts the whole data, see `default_config`: it stays."""
    lengths = {}
    for cell in load(name).cells():
        arguments = [f'--config.{key}={value}' for key, value in cell.overrides.items()]
        config = override(load_config(cell.config), arguments)
        length = (config.num_epochs, config.num_steps)
        lengths.setdefault(config.dataset.name, set()).add(length)
    assert lengths.pop('imagenet2012') == {imagenet}
    assert lengths.pop('cifar10', {(100.0, None)}) == {(100.0, None)}
    assert lengths.pop('digits') in ({(None, 2500)}, {(None, 1000)})
    assert not lengths


def test_kernels_are_compared_by_seed():
    """Seeds are far apart, and have the same part of the digits for all kernels."""
    lines = [
        {
            'cell': f'digits/{kernel}/10%',
            'seed': seed,
            'accuracy': (50 + 10 * seed + kernel + (kernel == 5) * seed) / 100,
            'params': 1,
            'macs': 1,
            'rates': {'step_seconds': 1.0},
        }
        for kernel in (3, 5, 15)
        for seed in (0, 1, 2)
    ]
    told = load('kernel_size').render(lines).splitlines()
    (row,) = (line for line in told if line.startswith('| 10%'))
    _, _, smallest, second, _ = map(str.strip, row.split('|'))
    assert smallest.startswith('contradicts: -12.0 (95% interval -12.0 to -12.0')
    half = 4.303 / 3**0.5  # of -10, -9 and -8
    told = f'contradicts: -9.0 (95% interval {-9 - half:.1f} to {-9 + half:.1f}'
    assert second.startswith(told)
