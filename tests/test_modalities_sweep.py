"""The experiment of modalities: its signals, its one encoder, what is told."""

import doctest
import importlib
import itertools

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_experiment import ROOT
from test_experiments import load_script

from vit_jax.experiment import build_cell, cell_folder, load_experiment, run_cell
from vit_jax.main import main

data = importlib.import_module('experiments.modalities.data')
parts = importlib.import_module('experiments.parts.data')

MAKE = {'text': data.make_text, 'audio': data.make_audio, 'video': data.make_video}


@pytest.fixture(scope='module')
def sweep():
    return load_script('modalities/sweep.py')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Where the digits lie."""
    return str(tmp_path_factory.mktemp('tfds'))


def cut(signal, patch_size):
    """The bytes of each patch, by loops, sorted: where it lay is forgotten."""
    patch = np.broadcast_to(patch_size, signal.ndim - 1)
    grid = [n // p for n, p in zip(signal.shape, patch)]
    return sorted(
        signal[tuple(slice(i * p, i * p + p) for i, p in zip(cell, patch))].tobytes()
        for cell in np.ndindex(*grid)
    )


# --- The signals ----------------------------------------------------------------------


@pytest.mark.parametrize('name', MAKE)
def test_twins_hold_the_same_patches(name, sweep, folder):
    dataset = MAKE[name](folder)
    patch_size = sweep.MODALITIES[name].patch_size
    for split in ('train', 'test'):
        source = dataset.open(split)
        assert len(source) == dataset.splits[split]
        for i in range(0, len(source), 2 * 37):
            one, other = source[i], source[i + 1]
            assert (one['label'], other['label']) == (0, 1)
            assert one['image'].shape == dataset.image_shape
            assert one['image'].dtype == np.uint8
            assert not np.array_equal(one['image'], other['image'])
            assert cut(one['image'], patch_size) == cut(other['image'], patch_size)


def test_arrangements_of_parts_hold_the_same_patches(sweep):
    patch_size = sweep.MODALITIES['image'].patch_size
    image = np.random.default_rng(0).integers(1, 255, (8, 8, 1)).astype(np.uint8)
    for row, col in itertools.product(range(7), repeat=2):
        right = cut(parts.arrange(image, parts.RIGHT, row, col), patch_size)
        scrambled = parts.arrange(image, parts.SCRAMBLED, row, col)
        assert cut(scrambled, patch_size) == right


@pytest.mark.parametrize('name', MAKE)
def test_signals_are_held_out_and_always_the_same(name, folder):
    def read(split):
        source = MAKE[name](folder).open(split)
        return [source[i]['image'].tobytes() for i in range(len(source))]

    train, test = read('train'), read('test')
    assert len(train) > 2000
    assert len(test) > 300
    assert not {*train} & {*test}
    assert read('test') == test


def test_text_is_that_of_the_licence():
    text = data.read_text()
    assert text.startswith('terms and conditions for use reproduction and distribut')
    assert text.endswith('accepting any such warranty or additional liability')
    pieces = data.cut_text(text)
    for split, lowest, end in (('train', 0, 0.8), ('test', 0.8, 1.0)):
        for piece in pieces[split]:
            places = [i for i in range(len(text)) if text.startswith(piece, i)]
            assert any(
                text[i - 1 : i].strip() == '' or text[i + 24 : i + 25].strip() == ''
                for i in places
            )
            assert all(i >= int(lowest * len(text)) for i in places)
            assert any(i + 24 <= end * len(text) for i in places)
        # No space at an end tells which way a piece reads.
        spaces = [sum(piece[i] == ' ' for piece in pieces[split]) for i in (0, -1)]
        assert spaces[0] == pytest.approx(spaces[1], rel=0.05)
        assert spaces[0] > 0.05 * len(pieces[split])
    source = data.make_text(None).open('train')
    letters = ''.join(data.LETTERS[i] for i in source[6]['image'].argmax(axis=1))
    assert letters == pieces['train'][3]
    assert letters[::-1] == ''.join(
        data.LETTERS[i] for i in source[7]['image'].argmax(axis=1)
    )
    assert source[6]['image'].sum() == 24 * 255


def test_the_examples_of_the_docstrings_are_true():
    assert doctest.testmod(data) == (0, 2)


def test_what_is_repeated_is_not_held_out():
    pieces = data.cut_text('of the work of the owner of the work', length=6)
    assert pieces['train'][:4] == ['of the', 'the wo', 'e work', 'work o']
    assert pieces['test'] == []  # 'e work'


def test_a_spectrum_is_a_sum_of_waves():
    samples = np.random.default_rng(0).normal(size=(2, 3, 32))
    found = data.spectrogram(samples)
    assert found.shape == (2, 16, 3)
    window = [0.5 - 0.5 * np.cos(2 * np.pi * n / 31) for n in range(32)]
    for i, time, pitch in itertools.product(range(2), range(3), range(16)):
        wave = np.exp(-2j * np.pi * pitch * np.arange(32) / 32)
        expected = 2 * abs(sum(window * samples[i, time] * wave)) / sum(window)
        assert found[i, pitch, time] == pytest.approx(expected)
    tone = np.sin(2 * np.pi * 5 * np.arange(32) / 32 + 0.3)
    assert data.spectrogram(tone[None, None])[0, 5, 0] == pytest.approx(1, abs=0.01)


def test_the_low_tone_is_first():
    pairs = data.pair_tones()
    every = [tuple(map(int, pair)) for pair in np.concatenate([*pairs.values()])]
    assert len(every) == len({*every}) == 36 * 25
    assert len(pairs['train']) == 720
    for first, second, low, high in every:
        assert 0 <= first < second < 9
        assert 2 <= low < 7 < 9 <= high < 14
    sounds = data.play(np.random.default_rng(0), pairs['test'])
    for sound, (first, second, low, high) in zip(sounds[..., 0], pairs['test']):
        beats = sound.reshape(16, 9, 3).max(axis=(0, 2))
        assert {first, second} == {*np.argsort(beats)[-2:]}
        assert (sound[:, 3 * first : 3 * first + 3].argmax(axis=0) == low).all()
        assert (sound[:, 3 * second : 3 * second + 3].argmax(axis=0) == high).all()


def test_a_digit_moves_by_a_pixel():
    digit = np.arange(1, 65, dtype=np.uint8).reshape(8, 8, 1)
    video = data.move(digit, row=3, col=1)
    assert video.shape == (8, 12, 12, 1)
    for frame, y, x in np.ndindex(8, 12, 12):
        row, col = y - 3, x - 1 - frame // 2
        inside = 0 <= row < 8 and 0 <= col < 8
        assert video[frame, y, x, 0] == (digit[row, col, 0] if inside else 0)


# --- The encoder ----------------------------------------------------------------------


def test_one_encoder_serves_all(sweep, folder):
    """What differs: the kernel of the patches, and the table of positions."""
    grids = {'image': (8, 8), 'text': (24,), 'audio': (4, 9), 'video': (4, 3, 3)}
    patches = {'image': 2 * 2, 'text': 27, 'audio': 4 * 3, 'video': 2 * 4 * 4}
    shared = []
    for cell in sweep.sweep():
        if cell.seed:
            continue
        name, _, positions = cell.name.partition('/')
        run = build_cell(cell, data_dir=folder)
        assert run.metadata['model']['grid'] == [*grids[name]]
        params = flatten_dict(run.state_shape.variables['params'], sep='/')
        shapes = {path: leaf.shape for path, leaf in params.items()}
        kernel = shapes.pop('patches/embed/kernel')
        assert (np.prod(kernel[:-1]), kernel[-1]) == (patches[name], 32)
        if positions == 'positions':
            assert shapes.pop('posemb/grid') == (*grids[name], 32)
        shared.append(shapes)
    assert len(shared) == 8
    assert all(shapes == shared[0] for shapes in shared)
    assert len([path for path in shared[0] if path.startswith('block01/')]) == 16


def test_one_recipe_serves_all(sweep):
    cells = list(sweep.sweep())
    assert len({(cell.name, cell.seed) for cell in cells}) == len(cells) == 4 * 2 * 3
    recipes = []
    for cell in cells:
        recipe = dict(cell.overrides)
        assert recipe.pop('dataset.name')
        assert recipe.pop('model.kwargs.patch_size')
        steps = recipe.pop('num_steps', None)  # 1,000
        longer = cell.name.startswith(('image/', 'text/'))
        assert steps == (3000 if longer else None)
        recipes.append(recipe)
    assert all(recipe == recipes[0] for recipe in recipes)


@pytest.mark.parametrize('name', ['text/none', 'video/positions'])
def test_a_cell_runs(name, folder, tmp_path, capsys):
    """Three steps, through the loop of every run; all that is held out counts."""
    experiment = load_experiment(ROOT / 'experiments' / 'modalities')
    cell = experiment.cells(name)[0]
    overrides = {**cell.overrides, 'num_steps': 3, 'optim.warmup_steps': 1}
    line = run_cell(experiment, cell._replace(overrides=overrides), tmp_path, folder)
    count = MAKE[name.partition('/')[0]](folder).splits['test']
    assert (line['steps'], line['examples']) == (3, count)
    if name.endswith('none'):  # twins are answered alike, up to rounding
        assert line['accuracy'] == pytest.approx(0.5, abs=0.01)
    workdir = cell_folder(cell, tmp_path)
    assert main(['report', str(workdir), f'--out={tmp_path / "report"}']) == 0
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.endswith('no attention shown: ViT is given something other than images')


# --- The table ------------------------------------------------------------------------


def test_the_table_compares_with_and_without(sweep):
    lines = [
        {'cell': f'audio/{positions}', 'seed': seed, 'accuracy': accuracy + 0.01 * seed}
        for positions, accuracy in (('positions', 0.9), ('none', 0.49))
        for seed in (0, 1, 2)
    ]
    header, _, *rows = sweep.render(lines).splitlines()
    assert header.count('|') == 7
    assert [row.split(' | ')[0] for row in rows[:4]] == [
        '| image', '| text', '| audio', '| video'
    ]  # fmt: skip
    audio = rows[2].removesuffix(' |').split(' | ')[2:]
    assert audio[:3] == [
        '16 frequencies x 27 times, in patches of 4 x 3',
        '91.0 ± 1.0 (3 seeds)',
        '50.0 ± 1.0 (3 seeds)',
    ]
    assert audio[3].startswith('supports: +41.0 (95% interval ')
    assert rows[0].endswith('| not run | not run | not run |')
    assert rows[-1] == 'Chance is 50%.'

    (axes,) = sweep.draw(lines)['modalities.png'].axes
    means = {line.get_label(): line.get_xydata() for line in axes.lines}
    np.testing.assert_allclose(means['with positions'], [[2, 91]])
    np.testing.assert_allclose(means['without'], [[2, 50]])
    assert sweep.draw([])['modalities.png']
