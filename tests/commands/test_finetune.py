"""Training that starts from weights: `config.init`."""

import numpy as np
import pytest
from command_lines import COLOUR, DIGITS

from vit_jax.pretrained.source import open_source

pytest_plugins = ['command_fixtures']

# Nothing is learned: what was loaded is what is saved.
STILL = ['--config.num_steps=1', '--config.optim.learning_rate=0.0']


def leaves(workdir):
    arrays = open_source(workdir).file.arrays
    return {name: array.read() for name, array in arrays.items()}


@pytest.fixture
def train(run, tmp_path, data_dir):
    """Trains in a new workdir; returns it and what was printed."""

    def train(*argv):
        workdir = tmp_path / 'tuned'
        if not any(word.startswith('--config.dataset.name') for word in argv):
            argv = (f'--config.dataset.data_dir={data_dir}', *argv)
        argv = [*DIGITS, f'--workdir={workdir}', *argv]
        code, _, err = run('train', *argv)
        assert code == 0, err
        return workdir, err

    return train


@pytest.mark.parametrize('mode', ['jit', 'pmap'])
def test_a_run_starts_from_the_weights(train, digits, mode):
    mode = f'--config.parallel.mode={mode}'
    workdir, err = train(f'--config.init.weights={digits}', *STILL, mode)
    there, here = leaves(digits), leaves(workdir)
    assert there.keys() == here.keys()
    for name, x in there.items():
        np.testing.assert_array_equal(here[name], x)
    assert f"{digits} at step 3 (this project's own names): 37 leaves loaded" in err
    assert (
        'loaded       params/head/norm/scale'
        in (workdir / 'init_weights.txt').read_text()
    )


def test_other_classes_and_another_size(train, digits):
    workdir, err = train(
        f'--config.init.weights={digits}',
        '--config.init.new_head=True',
        '--config.dataset.name=synthetic:size=8,num_classes=11,channels=1',
        '--config.dataset.image_size=(8,12)',
        *STILL,
    )
    there, here = leaves(digits), leaves(workdir)
    assert here['params/head/logits/kernel'].shape[-1] == 11
    assert here['params/posemb/grid'].shape[:2] == (4, 6)
    assert '1 resized (4x4 -> 4x6)' in err
    assert '2 initialised (a new head)' in err
    others = [k for k in there if 'logits' not in k and k != 'params/posemb/grid']
    for name in others:
        np.testing.assert_array_equal(here[name], there[name])


def test_a_new_head_is_that_of_a_run_without_weights(train, digits, tmp_path):
    workdir, _ = train('--config.seed=5', *STILL)
    fresh = leaves(workdir)
    workdir.rename(tmp_path / 'fresh')
    new = [f'--config.init.weights={digits}', '--config.init.new_head=True']
    workdir, _ = train(*new, '--config.seed=5', *STILL)
    head = 'params/head/logits/kernel'
    assert fresh[head].any()
    np.testing.assert_array_equal(leaves(workdir)[head], fresh[head])


def test_pixels_seen_otherwise_are_warned_of(colour, run, tmp_path):
    argv = [*COLOUR, f'--workdir={tmp_path}/run', f'--config.init.weights={colour}']
    code, _, err = run('train', *argv, '--config.dataset.normalize=imagenet')
    assert code == 0, err
    assert 'warning: the weights saw pixels of mean [0.5], this run has [0.485' in err


def test_weights_that_do_not_fit(fails, digits, tmp_path, data_dir):
    argv = [*DIGITS, f'--workdir={tmp_path}/run']
    data = f'--config.dataset.data_dir={data_dir}'
    weights = f'--config.init.weights={digits}'
    synthetic = '--config.dataset.name=synthetic:size=8,num_classes=11,channels=1'
    message = fails('train', *argv, weights, synthetic)
    assert 'logits/kernel is 64x10 in the file, the model needs 64x11' in message
    assert message.endswith('pass new_head=True (config.init.new_head)')
    message = fails('train', *argv, data, '--config.init.weights=/none')
    assert message == 'no such file or folder: /none'
    message = fails('train', *argv, data, '--config.init.new_head=True')
    assert message.startswith('config.init.new_head is set to True, but this run does')
