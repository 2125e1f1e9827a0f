"""BatchNorm over the global batch, under jit and under pmap."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.axes import BATCH_AXIS, batch_mean
from vit_jax.layers.norm import batch_norm


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return batch_norm(use_running_average=False, momentum=0.5, name='norm')(x)


def test_statistics_are_those_of_the_whole_batch_under_pmap():
    x = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32) + 2.0
    x *= np.arange(1, 17)[:, None]  # devices see unlike rows
    variables = Net().init(jax.random.key(0), jnp.asarray(x))

    def step(x):
        out, updated = Net().apply(variables, x, mutable=['batch_stats'])
        return out, batch_mean(updated)['batch_stats']['norm']

    out, stats = jax.pmap(step, axis_name=BATCH_AXIS, out_axes=(0, None))(
        x.reshape(8, 2, 5)
    )
    mean, var = x.mean(0), x.var(0)
    expected = (x - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(out.reshape(16, 5), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats['mean'], 0.5 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats['var'], 0.5 + 0.5 * var, rtol=1e-4)


def test_integers_of_other_collections_keep_their_type():
    def step(x):
        return batch_mean({'count': jnp.int32(3), 'x': x.mean()})

    out = jax.pmap(step, axis_name=BATCH_AXIS, out_axes=None)(jnp.arange(8.0)[:, None])
    assert out['count'].dtype == jnp.int32
    assert out['x'] == 3.5
