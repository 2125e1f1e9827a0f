"""Weights of runs, read by others than the run."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from test_checkpoint import LIKE, REPLICATED, assert_same_bits, damage, make_state, save

from vit_jax.checkpoint import shapes_on
from vit_jax.errors import UserError
from vit_jax.stored import (
    Choice,
    choose,
    latest_step,
    load_metadata,
    restore_variables,
)


def test_metadata_and_variables_of_the_newest(tmp_path):
    save(tmp_path, 3, 5)
    assert latest_step(tmp_path) == 5
    assert load_metadata(tmp_path) == {'position': 50}
    assert load_metadata(tmp_path, 3) == {'position': 30}
    step = 5
    like = shapes_on(SingleDeviceSharding(jax.devices()[0]), LIKE.variables)
    variables = restore_variables(tmp_path, Choice((step,)), like)
    assert_same_bits(variables, make_state(5).variables)
    for leaf in jax.tree.leaves(variables):
        assert len(leaf.sharding.device_set) == 1
    assert_same_bits(
        restore_variables(tmp_path, Choice((3,)), like), make_state(3).variables
    )


def test_reading_leaves_the_folder_as_it_is(tmp_path):
    save(tmp_path, 3)

    def listing():
        return sorted(
            (str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob('*')
        )

    before = listing()
    load_metadata(tmp_path)
    restore_variables(tmp_path, Choice((3,)), LIKE.variables)
    assert listing() == before


def test_folders_without_checkpoints(tmp_path):
    for path in (tmp_path, tmp_path / 'none'):
        with pytest.raises(UserError, match=f'{path} is not the workdir of a run'):
            load_metadata(path)
    (tmp_path / 'checkpoints').mkdir()
    with pytest.raises(UserError, match='has no finished checkpoint yet'):
        load_metadata(tmp_path)


@pytest.mark.parametrize('how', ['truncated', 'missing'])
def test_damaged_parts_are_the_users_to_know(tmp_path, how):
    save(tmp_path, 3)
    damage(tmp_path, 3, 'metadata', how)
    damage(tmp_path, 3, 'variables', how)
    for read in (
        lambda: load_metadata(tmp_path),
        lambda: restore_variables(tmp_path, Choice((3,)), LIKE.variables),
    ):
        with pytest.raises(UserError, match=r'checkpoint 3 .* cannot be read: ') as e:
            read()
        assert '\n' not in str(e.value)


def another_shape(variables):
    params = {**variables['params'], 'scale': jax.ShapeDtypeStruct((5,), jnp.bfloat16)}
    return {**variables, 'params': params}


def another_name(variables):
    params = dict(variables['params'])
    params['gate'] = params.pop('scale')
    return {**variables, 'params': params}


def fewer(variables):
    return {'params': variables['params']}


# Orbax leaves its coroutines behind.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('change', [another_shape, another_name, fewer])
def test_variables_of_another_model(tmp_path, change):
    save(tmp_path, 3)
    like = change(LIKE.variables)
    with pytest.raises(UserError, match=r'checkpoint 3 .* cannot be read') as error:
        restore_variables(tmp_path, Choice((3,)), shapes_on(REPLICATED, like))
    assert '\n' not in str(error.value)
    assert len(str(error.value)) < 400
    gc.collect()


def test_the_mean_of_the_last_checkpoints(tmp_path):
    save(tmp_path, 3, 5, 11)
    choice = choose(tmp_path, 'last:2')
    assert choice == Choice((5, 11))
    mean = restore_variables(tmp_path, choice, LIKE.variables)
    states = [make_state(step).variables['batch_stats'] for step in (5, 11)]
    np.testing.assert_allclose(
        mean['batch_stats']['mean'],
        (states[0]['mean'] + states[1]['mean']) / 2,
        rtol=1e-6,
    )


@pytest.mark.parametrize('wanted', ['4', 'last:0', 'last:4', 'last', 'newest', ''])
def test_weights_that_a_run_does_not_have(tmp_path, wanted):
    save(tmp_path, 3, 5, 11)
    with pytest.raises(UserError, match='last:N up to 3, or @ one of the steps 3, 5'):
        choose(tmp_path, wanted)
    for wanted, key in (('best', 'keep_best'), ('ema', 'ema_decay')):
        with pytest.raises(UserError, match=f'it has no .*{key}'):
            choose(tmp_path, wanted)
