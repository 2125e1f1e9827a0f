"""Every config: its real step traced, its smoke variant run."""

import pathlib
import re

import chex
import jax
import pytest

from vit_jax.build import build
from vit_jax.config import load_config
from vit_jax.errors import UserError
from vit_jax.train import train

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / 'configs').glob('*.py'))


@pytest.fixture(scope='module', autouse=True)
def data_dir(tmp_path_factory):
    """Digits are prepared once, out of the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TFDS_DATA_DIR', str(tmp_path_factory.mktemp('tfds')))
        yield


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_the_real_step_traces_without_the_data(path):
    run = build(load_config(str(path)))
    before = run.state_shape
    after, metrics = jax.eval_shape(run.train_step, before, run.batch_shape)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert {'loss', 'accuracy'} <= set(metrics)
    params = jax.tree.leaves(before.variables['params'])
    assert all(x.dtype == 'float32' for x in params)


@pytest.mark.slow
@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_the_smoke_variant_trains(path, tmp_path):
    run = build(load_config(f'{path}:smoke'))
    result = train(run, tmp_path)
    assert run.num_steps == 3
    assert result['examples'] in (64, 359)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_a_config_opens_with_its_card(path):
    card = load_card(path)
    for word in ('data', 'model', 'recipe'):
        assert re.search(rf'^{word} ', card, re.MULTILINE)
    assert f'--config=configs/{path.name}' in card


def load_card(path):
    return path.read_text().split('"""')[1]


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_an_unknown_variant_is_refused(path):
    with pytest.raises(UserError, match='smoke'):
        load_config(f'{path}:smok')
