"""The command line, and runs that commands look at.

A plugin of the tests here, not a conftest.py: pytest's doctests take two files of
that name in folders without `__init__.py` for one module. They also import this one
before it is a plugin, so: PYTEST_DONT_REWRITE.
"""

from typing import NamedTuple

import numpy as np
import pytest
from command_lines import COLOUR, DATES, DIGITS
from PIL import Image

from vit_jax.main import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys):
    """Runs a command line; returns its exit code and what it printed."""

    def run(*argv):
        capsys.readouterr()
        try:
            code = main([str(word) for word in argv])
        except SystemExit as error:  # of argparse
            code = error.code
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def fails(run):
    """Runs a command line that must end with one line on stderr; returns it.

    `late`: the command has begun to tell what it does.
    """

    def fails(*argv, late=False):
        code, out, err = run(*argv)
        assert code == 1, (code, out, err)
        assert 'Traceback' not in err, err
        if not late:
            assert err.count('\n') == 1, err
            assert out == '', out
        line = err.splitlines()[-1]
        assert line.startswith('vit_jax: error: '), line
        return line.removeprefix('vit_jax: error: ')

    return fails


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """Where the digits are prepared."""
    return tmp_path_factory.mktemp('tfds')


@pytest.fixture(scope='session')
def digits(tmp_path_factory, data_dir):
    """The workdir of a ConViT that has seen three batches of digits."""
    workdir = tmp_path_factory.mktemp('digits') / 'run'
    argv = [f'--workdir={workdir}', f'--config.dataset.data_dir={data_dir}']
    assert main(['train', *DIGITS, *argv]) == 0
    return workdir


@pytest.fixture(scope='session')
def colour(tmp_path_factory):
    """The workdir of a CNN for colour images of three classes."""
    workdir = tmp_path_factory.mktemp('colour') / 'run'
    assert main(['train', *COLOUR, f'--workdir={workdir}']) == 0
    return workdir


@pytest.fixture(scope='session')
def dates(tmp_path_factory):
    """The workdir of a Transformer of sentences, two layers on both sides."""
    workdir = tmp_path_factory.mktemp('dates') / 'run'
    assert main(['train', *DATES, f'--workdir={workdir}']) == 0
    return workdir


@pytest.fixture
def make_image(tmp_path):
    """Writes an image of noise; returns its path."""

    def make_image(name, *shape, seed=0):
        rng = np.random.default_rng(seed)
        path = tmp_path / name
        Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8)).save(path)
        return path

    return make_image


@pytest.fixture
def make_folder(tmp_path):
    """Writes a dataset of folders: two classes of eight images, to train and test."""

    def make_folder(size=16):
        rng = np.random.default_rng(0)
        root = tmp_path / 'images'
        for split in ('train', 'test'):
            for name in ('cat', 'dog'):
                folder = root / split / name
                folder.mkdir(parents=True)
                for i in range(8):
                    pixels = rng.integers(0, 256, (size, size, 3)).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / f'{i}.png')
        return root

    return make_folder


@pytest.fixture
def snapshot():
    """The bytes of all files below a folder."""

    def snapshot(folder):
        files = sorted(path for path in folder.rglob('*') if path.is_file())
        return {path: path.read_bytes() for path in files}

    return snapshot
