import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vit_jax.commands.trained
import vit_jax.pictures
from vit_jax.build import build
from vit_jax.checkpoint import Checkpoints, shapes_on
from vit_jax.commands.attend import format_gates
from vit_jax.commands.trained import Trained
from vit_jax.config import from_dict
from vit_jax.layers.attention import MultiHeadAttention
from vit_jax.layers.blocks import EncoderBlock
from vit_jax.layers.patch import PatchEmbed
from vit_jax.layers.pooling import AttentionPool
from vit_jax.maps import attention_maps

pytest_plugins = ['command_fixtures']

GRID = (4, 4)


@pytest.fixture(scope='module')
def library(digits):
    """(variables, image file -> maps), by way of the library."""
    run = build(from_dict(json.loads((digits / 'config.json').read_text())))
    with Checkpoints(digits, read_only=True) as checkpoints:
        like = shapes_on(run.parallel.replicated, run.state_shape)
        variables = checkpoints.restore_latest(like).state.variables

    def maps(path):
        image = np.asarray(Image.open(path))[None, ..., None] / 127.5 - 1
        return jax.jit(attention_maps, static_argnums=0)(run.model, variables, image)

    return variables, maps


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of every contact sheet that a command draws."""
    calls = []
    draw = vit_jax.pictures.draw_sheet

    def record(pixels, maps, title, cell, grid):
        calls.append((title, np.asarray(maps), cell, grid))
        return draw(pixels, maps, title, cell, grid)

    monkeypatch.setattr(vit_jax.pictures, 'draw_sheet', record)
    return calls


def test_files(run, digits, library, make_image, tmp_path):
    """As printed: pictures, and a table of the gates."""
    images = [make_image(f'{i}.png', 8, 8, seed=i) for i in range(2)]
    out = tmp_path / 'new' / 'maps'
    code, text, err = run('attend', f'--weights={digits}', *images, f'--out={out}')
    assert (code, err) == (0, '')
    expected = [
        out / folder / f'{name}.png'
        for folder in ('0', '1')
        for name in ('image', 'block00', 'block01', 'rollout')
    ]
    expected += [out / 'non_locality.png', out / 'gates.txt']
    assert text.splitlines() == [str(path) for path in expected]
    assert sorted(path for path in out.rglob('*') if path.is_file()) == sorted(expected)
    for path in expected[:-1]:
        with Image.open(path) as picture:
            assert min(picture.size) > 200
            assert picture.getextrema()[0] != (255, 255)  # not blank

    header, line = (out / 'gates.txt').read_text().splitlines()
    assert header.split() == ['layer', 'mean', '0', '1', '2', '3']
    name, *numbers = line.split()
    assert name == 'block00'
    gating = library[0]['params']['block00']['attention']['gating']
    gates = 1 / (1 + np.exp(-np.float64(gating)))
    shown = [gates.mean(), *gates]
    assert [float(number) for number in numbers] == pytest.approx(shown, abs=1e-3)


def test_table_of_gates():
    gates = {'block00': np.array([0.25, 0.5, 0.9]), 'block1': np.array([0.125])}
    assert format_gates(gates) == (
        'layer     mean      0      1      2\n'
        'block00  0.550  0.250  0.500  0.900\n'
        'block1   0.125  0.125\n'
    )


def test_the_image_is_that_of_the_file(run, digits, make_image, tmp_path):
    image = make_image('grey.png', 8, 8)
    assert run('attend', f'--weights={digits}', image, f'--out={tmp_path}').code == 0
    picture = np.asarray(Image.open(tmp_path / 'grey' / 'image.png').convert('L'))
    side = len(picture) / 8
    centres = (side * (np.arange(8) + 0.5)).astype(int)
    found = picture[np.ix_(centres, centres)]
    np.testing.assert_allclose(found, np.asarray(Image.open(image)), atol=1)


@pytest.mark.parametrize('query', [None, '1,3', 'mean'])
def test_what_is_shown(run, digits, library, drawn, make_image, tmp_path, query):
    """The class token where there is one, else a patch; or what is asked for."""
    image = make_image('grey.png', 8, 8)
    argv = ['attend', f'--weights={digits}', image, f'--out={tmp_path}/out']
    assert run(*argv, *([f'--query={query}'] if query else [])).code == 0
    maps = library[1](image)
    predicted = int(np.argmax(maps.logits))
    for layer, (title, heat, cell, _) in zip([*maps.layers, maps.rollout], drawn):
        weights = np.asarray(layer.weights[0])
        patches = weights[:, -16:, -16:].reshape(-1, *GRID, *GRID)
        if query == 'mean':
            words, place, expected = 'all patches, mean', None, patches.mean((1, 2))
        elif query == '1,3':
            words, place, expected = 'patch 1,3', (1, 3), patches[:, 1, 3]
        elif layer.name == 'block00':
            words, place, expected = 'patch 2,2', (2, 2), patches[:, 2, 2]
        else:
            words, place = 'the class token', None
            expected = weights[:, 0, 1:].reshape(-1, *GRID)
        where = f'grey, {layer.name}: where {words} attends'
        assert title == f'{where}\npredicted: {predicted}'
        assert cell == place
        np.testing.assert_allclose(heat, expected, rtol=1e-4, atol=1e-6)
    assert len(drawn) == 3


def test_non_locality_is_the_mean_of_the_images(
    run, digits, library, make_image, tmp_path, monkeypatch
):
    calls = []
    draw = vit_jax.pictures.draw_non_locality

    def record(names, values, grids):
        calls.append((names, values, grids))
        return draw(names, values, grids)

    monkeypatch.setattr(vit_jax.pictures, 'draw_non_locality', record)
    images = [make_image(f'{i}.png', 8, 8, seed=i) for i in range(2)]
    argv = ['attend', f'--weights={digits}', *images, f'--out={tmp_path}/out']
    assert run(*argv, '--layers=block01').code == 0  # the curve is of all layers
    ((names, values, grids),) = calls
    assert names == ['block00', 'block01']
    assert grids == [GRID, GRID]
    first, second = (library[1](image).layers for image in images)
    for value, one, other in zip(values, first, second, strict=True):
        expected = np.mean([one.non_locality[0], other.non_locality[0]], axis=0)
        np.testing.assert_allclose(value, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ('layers', 'files'),
    [
        ('block01', {'block01.png'}),
        ('rollout,block00,', {'block00.png', 'rollout.png'}),
    ],
)
def test_some_layers(run, digits, make_image, tmp_path, layers, files):
    image = make_image('grey.png', 8, 8)
    out = tmp_path / 'out'
    argv = ['attend', f'--weights={digits}', image, f'--out={out}']
    assert run(*argv, f'--layers={layers}').code == 0
    names = {path.name for path in (out / 'grey').iterdir()}
    assert names == {'image.png'} | files


@pytest.mark.parametrize(
    ('layers', 'message'),
    [
        ('block02', "unknown layer 'block02'; did you mean 'block01'?"),
        ('pool', "unknown layer 'pool'; "),
        ('', "unknown layer ''; choose one of: block00, block01, rollout"),
        ('block00,,block01', "unknown layer ''; "),
    ],
)
def test_layers_that_are_not_there(run, digits, make_image, tmp_path, layers, message):
    image = make_image('grey.png', 8, 8)
    argv = ['attend', f'--weights={digits}', image, f'--out={tmp_path}/out']
    code, _, err = run(*argv, f'--layers={layers}')
    assert code == 1
    assert err.splitlines()[-1].startswith(f'vit_jax: error: {message}')


class Folder(nn.Module):
    @nn.compact
    def __call__(self, x):
        attention = partial(MultiHeadAttention, num_heads=2)
        block = EncoderBlock(attention, mlp_dim=8, name='block')
        return block(block(x))


class Twice(nn.Module):
    """A pooled block, called twice, on a rectangular grid; the logits are planted."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = PatchEmbed(8, (2, 3), name='patches')(x).reshape(len(x), -1, 8)
        x = Folder(name='folder')(x)
        x = AttentionPool(num_heads=2, mlp_dim=8, name='pool')(x)
        return 0 * x[:, :3] + jnp.asarray([0.0, 1.0, 2.0])


@pytest.fixture
def twice(monkeypatch):
    """Makes the command load a model of 4x9 patches, with classes of its own."""
    model, pixels = Twice(), np.full((8, 27, 3), 99, np.uint8)
    variables = jax.jit(model.init)(jax.random.key(0), pixels[None] / 255)
    found = Trained(model, variables, lambda x: x / 255, ['zero', 'one', 'two'])
    monkeypatch.setattr(vit_jax.commands.trained, 'load', lambda _: (found, [pixels]))


def test_of_a_rectangle(run, twice, drawn, tmp_path):
    """All calls of a layer, the pooling query, the frame's grid, and the class."""
    assert run('attend', '--weights=w', 'a.png', f'--out={tmp_path}').code == 0
    names = {path.name for path in (tmp_path / 'a').iterdir()}
    sheets = ['folder-block', 'folder-block#2', 'rollout', 'pool']
    assert names == {f'{name}.png' for name in ['image', *sheets]}
    for title, heat, cell, grid in drawn:
        assert title.endswith('predicted: two')
        assert heat.shape[1:] == grid == (4, 9)
        assert cell == (None if 'pooling query' in title else (2, 4))


@pytest.mark.parametrize('layer', ['folder/block#2', 'folder-block#2', 'pool'])
def test_layers_go_by_the_names_of_their_files_too(run, twice, tmp_path, layer):
    argv = ['attend', '--weights=w', 'a.png', f'--out={tmp_path}', f'--layers={layer}']
    assert run(*argv).code == 0
    names = {path.name for path in (tmp_path / 'a').iterdir()}
    assert names == {'image.png', f'{layer.replace("/", "-")}.png'}


def test_the_last_cell_of_a_rectangle(run, fails, twice, drawn, tmp_path):
    argv = ['attend', '--weights=w', 'a.png', f'--out={tmp_path}', '--layers=rollout']
    assert run(*argv, '--query=3,8').code == 0
    assert drawn[0][2] == (3, 8)
    line = fails(*argv, '--query=4,3')
    assert line.startswith('the query 4,3 is outside of the 4x9 grid of rollout')


def test_outputs_are_written_again_and_the_workdir_is_not(
    run, digits, make_image, tmp_path, snapshot
):
    image, out = make_image('grey.png', 8, 8), tmp_path / 'out'
    argv = ['attend', f'--weights={digits}', image, f'--out={out}']
    workdir = snapshot(digits)
    assert run(*argv).code == 0
    first = snapshot(out)
    (out / 'grey' / 'block00.png').write_text('stale')
    assert run(*argv).code == 0
    assert snapshot(out) == first
    assert snapshot(digits) == workdir


def test_images_of_one_name_have_folders_of_their_own(
    run, digits, make_image, tmp_path
):
    paths = []
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
        paths.append(make_image(f'{folder}/grey.png', 8, 8))
    out = tmp_path / 'out'
    argv = ['attend', f'--weights={digits}', *paths, f'--out={out}', '--layers=block00']
    assert run(*argv).code == 0
    folders = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert folders == ['grey', 'grey_2']
