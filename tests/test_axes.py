import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import axes

DEVICES = 8
ROWS = np.arange(2.0 * DEVICES * 3).reshape(DEVICES, 2, 3)


def per_device(function):
    return jax.pmap(function, axis_name=axes.BATCH_AXIS)


def test_batch_axis_is_bound_under_pmap_only():
    names = []

    def record(x):
        names.append(axes.batch_axis())
        return x

    jax.jit(record)(ROWS)
    per_device(record)(ROWS)
    jax.vmap(record, axis_name='other')(ROWS)
    assert names == [None, 'batch', None]


@pytest.mark.parametrize(
    ('reduce', 'expected'),
    [(axes.batch_sum, ROWS.sum(axis=0)), (axes.batch_mean, ROWS.mean(axis=0))],
)
def test_reductions_cross_the_devices(reduce, expected):
    out = per_device(lambda x: reduce({'a': x, 'b': [-x]}))(ROWS)
    for device in range(DEVICES):
        np.testing.assert_allclose(out['a'][device], expected)
        np.testing.assert_allclose(out['b'][0][device], -expected)


@pytest.mark.parametrize('reduce', [axes.batch_sum, axes.batch_mean])
def test_reductions_do_nothing_where_the_batch_is_one_array(reduce):
    tree = {'a': jnp.arange(3.0)}
    out = jax.jit(reduce)(tree)
    np.testing.assert_array_equal(out['a'], tree['a'])


def test_example_keys_belong_to_rows_of_the_global_batch():
    rng = jax.random.key(7)
    expected = [jax.random.key_data(jax.random.fold_in(rng, row)) for row in range(16)]
    whole = jax.random.key_data(axes.example_keys(rng, 16))
    np.testing.assert_array_equal(whole, expected)
    local = per_device(lambda x: jax.random.key_data(axes.example_keys(rng, len(x))))
    np.testing.assert_array_equal(local(ROWS).reshape(16, -1), expected)
