"""BatchNorm over the global batch, under jit and under pmap; large means."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from vit_jax.axes import BATCH_AXIS, batch_mean
from vit_jax.errors import UserError
from vit_jax.layers.norm import batch_norm, group_norm, layer_norm, make_norm


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


GROUPS, EPS = 2, 0.25
MADE = {'eps': EPS, 'num_groups': GROUPS, 'train': True, 'name': 'norm'}
# The norm, and the axes that it averages over, of [B, R, C, groups, D / groups].
LARGE_MEANS = {
    'layer': (lambda: layer_norm(EPS), (3, 4)),
    'group': (lambda: group_norm(GROUPS, epsilon=EPS), (1, 2, 4)),
    'batch': (lambda: batch_norm(use_running_average=False, epsilon=EPS), (0, 1, 2)),
    'made group': (lambda: make_norm('group', **MADE), (1, 2, 4)),
    'made batch': (lambda: make_norm('batch', **MADE), (0, 1, 2)),
}


@pytest.mark.parametrize('name', LARGE_MEANS)
def test_variance_survives_a_mean_that_is_large_against_it(name):
    make, axes = LARGE_MEANS[name]
    (x,) = reference.random_arrays(0, (3, 5, 7, 6))
    x = np.float64(np.float32(x + 1000.0))
    out, _ = make().init_with_output(jax.random.key(0), jnp.float32(x))
    parts = x.reshape(3, 5, 7, GROUPS, 3)
    mean, var = parts.mean(axes, keepdims=True), parts.var(axes, keepdims=True)
    expected = (parts - mean) / np.sqrt(var + EPS)
    reference.assert_close(out, expected.reshape(x.shape), 1e-3)


def test_epsilon_of_layer_norm_is_that_of_the_published_models():
    assert layer_norm().epsilon == 1e-6


@pytest.mark.parametrize('num_groups', [3, 0, -2])
def test_groups_that_do_not_divide_the_channels_are_told(num_groups):
    norm = make_norm('group', **{**MADE, 'num_groups': num_groups})
    with pytest.raises(UserError, match=f'num_groups {num_groups} does not .* the 8 c'):
        norm.init(jax.random.key(0), jnp.ones((1, 2, 3, 8)))


def test_a_group_norm_counts_as_one_call():
    x = jnp.ones((1, 2, 3, 8))
    norm = group_norm(GROUPS)
    variables = norm.init(jax.random.key(0), x)
    _, seen = norm.apply(
        variables, x, capture_intermediates=True, mutable='intermediates'
    )
    assert len(seen['intermediates']['__call__']) == 1


def test_layer_norm_bears_an_outlier_in_its_first_feature():
    x = np.random.default_rng(0).normal(size=(3, 211))
    x[:, 0] = 1e6
    x = np.float64(np.float32(x))
    module = layer_norm()
    out = module.apply(module.init(jax.random.key(0), x), jnp.float32(x))
    centred = x - x.mean(axis=-1, keepdims=True)
    expected = centred / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out, expected, rtol=1e-4)
