import json

import jax
import numpy as np
import pytest
from PIL import Image

import vit_jax.pictures
from vit_jax.build import build
from vit_jax.checkpoint import Checkpoints, shapes_on
from vit_jax.commands.attend import format_gates
from vit_jax.config import from_dict
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

    def record(pixels, maps, title, image_title, cell, grid):
        calls.append((title, np.asarray(maps), cell))
        return draw(pixels, maps, title, image_title, cell, grid)

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
    for layer, (title, heat, cell) in zip([*maps.layers, maps.rollout], drawn):
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
        assert title == f'grey, {layer.name}: where {words} attends'
        assert cell == place
        np.testing.assert_allclose(heat, expected, rtol=1e-4, atol=1e-6)
    assert len(drawn) == 3


def test_non_locality_is_the_mean_of_the_images(
    run, digits, library, make_image, tmp_path, monkeypatch
):
    calls = []
    draw = vit_jax.pictures.draw_non_locality

    def record(names, values):
        calls.append((names, values))
        return draw(names, values)

    monkeypatch.setattr(vit_jax.pictures, 'draw_non_locality', record)
    images = [make_image(f'{i}.png', 8, 8, seed=i) for i in range(2)]
    argv = ['attend', f'--weights={digits}', *images, f'--out={tmp_path}/out']
    assert run(*argv, '--layers=block01').code == 0  # the curve is of all layers
    ((names, values),) = calls
    assert names == ['block00', 'block01']
    first, second = (library[1](image).layers for image in images)
    for value, one, other in zip(values, first, second, strict=True):
        expected = np.mean([one.non_locality[0], other.non_locality[0]], axis=0)
        np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_some_layers(run, digits, make_image, tmp_path):
    image = make_image('grey.png', 8, 8)
    out = tmp_path / 'out'
    argv = ['attend', f'--weights={digits}', image, f'--out={out}', '--layers=block01']
    assert run(*argv).code == 0
    names = {path.name for path in (out / 'grey').iterdir()}
    assert names == {'image.png', 'block01.png', 'rollout.png'}


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
