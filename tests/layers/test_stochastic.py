from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.axes import BATCH_AXIS
from vit_jax.layers.stochastic import Dropout, DropPath

MODULES = {
    'dropout': Dropout(0.25),
    'shared columns': Dropout(0.25, shared_axes=(-1,)),
    'drop path': DropPath(0.25),
}


@partial(jax.jit, static_argnums=0)
def drop(module, x, rng):
    return module.apply({}, x, train=True, rngs={'dropout': rng})


@pytest.mark.parametrize('name', MODULES)
def test_kept_entries_are_scaled_so_that_the_mean_stays(name):
    x = jnp.full((503, 5, 7), 3.0)
    out = np.asarray(drop(MODULES[name], x, jax.random.key(0)))
    kept = out != 0.0
    np.testing.assert_allclose(out[kept], 4.0, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 0.05
    # How often the mask changes along an axis: shared axes never do.
    changes = [np.any(np.diff(kept, axis=axis)) for axis in range(3)]
    assert (
        changes
        == {
            'dropout': [True, True, True],
            'shared columns': [True, True, False],
            'drop path': [True, False, False],
        }[name]
    )


@pytest.mark.parametrize('name', MODULES)
def test_evaluation_and_rate_zero_change_nothing_and_need_no_key(name):
    x = jnp.ones((2, 3, 5))
    np.testing.assert_array_equal(MODULES[name].apply({}, x), x)
    never = type(MODULES[name])(0.0)
    np.testing.assert_array_equal(never.apply({}, x, train=True), x)


def test_bfloat16_stays_bfloat16():
    x = jnp.ones((2, 3, 5), jnp.bfloat16)
    run = partial(drop, MODULES['dropout'])
    assert jax.eval_shape(run, x, jax.random.key(0)).dtype == jnp.bfloat16


def test_dropped_entries_are_zero_without_gradient_even_where_infinite():
    x = jnp.full((16, 3, 5), jnp.inf)
    out = drop(MODULES['dropout'], x, jax.random.key(0))
    assert set(np.unique(out)) == {0.0, np.inf}
    _, vjp = jax.vjp(lambda x: drop(MODULES['dropout'], x, jax.random.key(0)), x)
    (grad,) = vjp(jnp.ones_like(x))
    np.testing.assert_allclose(grad, np.where(out == 0, 0, 4 / 3), rtol=1e-6)


@pytest.mark.parametrize('name', MODULES)
def test_a_row_has_its_mask_whatever_the_batch_size(name):
    x = jnp.ones((16, 3, 5))
    whole = drop(MODULES[name], x, jax.random.key(0))
    np.testing.assert_array_equal(
        drop(MODULES[name], x[:7], jax.random.key(0)), whole[:7]
    )
    other = drop(MODULES[name], x, jax.random.key(1))
    assert np.any(other != whole)


@pytest.mark.parametrize('name', MODULES)
def test_pmap_draws_the_masks_of_one_device(name):
    devices = jax.device_count()
    assert devices == 8
    x = jnp.ones((2 * devices, 3, 5))
    whole = drop(MODULES[name], x, jax.random.key(0))
    parallel = jax.pmap(
        partial(drop, MODULES[name]), axis_name=BATCH_AXIS, in_axes=(0, None)
    )
    out = parallel(x.reshape(devices, 2, 3, 5), jax.random.key(0))
    np.testing.assert_array_equal(out.reshape(x.shape), whole)


def test_a_sharded_batch_draws_the_masks_of_one_device():
    x = jnp.ones((2 * jax.device_count(), 3, 5))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
    spec = jax.sharding.PartitionSpec('data')
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    np.testing.assert_array_equal(
        drop(MODULES['dropout'], sharded, jax.random.key(0)),
        drop(MODULES['dropout'], x, jax.random.key(0)),
    )
