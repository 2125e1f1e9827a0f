import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from vit_jax.layers.pooling import (
    AttentionPool,
    ClassToken,
    Registers,
    pool_tokens,
)

B, T, D = 2, 5, 6


def test_class_token_comes_first():
    (x,) = reference.random_arrays(0, (B, T, D))
    module = ClassToken()
    params = reference.init(module, x)
    np.testing.assert_array_equal(params['cls'], np.zeros((1, 1, D)))
    params = reference.random_params(module, x)
    out = np.asarray(reference.apply(module, params, x))
    assert out.shape == (B, 1 + T, D)
    for b in range(B):
        np.testing.assert_array_equal(out[b, 0], params['cls'][0, 0])
    np.testing.assert_array_equal(out[:, 1:], np.float32(x))


def test_distillation_token_comes_second():
    (x,) = reference.random_arrays(0, (B, T, D))
    module = ClassToken(distilled=True)
    params = reference.random_params(module, x)
    assert jax.tree.map(jnp.shape, params) == {'cls': (1, 1, D), 'dist': (1, 1, D)}
    out = np.asarray(reference.apply(module, params, x))
    for b in range(B):
        np.testing.assert_array_equal(out[b, 0], params['cls'][0, 0])
        np.testing.assert_array_equal(out[b, 1], params['dist'][0, 0])
    np.testing.assert_array_equal(out[:, 2:], np.float32(x))


@pytest.mark.parametrize('num_prefix', [0, 1, 2])
def test_registers_come_between_prefix_and_patches(num_prefix):
    (x,) = reference.random_arrays(0, (B, num_prefix + T, D))
    module = Registers(3)
    shapes = reference.init_shapes(module, x, num_prefix=num_prefix)
    assert jax.tree.map(jnp.shape, shapes) == {'tokens': (1, 3, D)}
    params = reference.random_params(module, x, num_prefix=num_prefix)
    out = np.asarray(module.apply({'params': params}, jnp.float32(x), num_prefix))
    x = np.float32(x)
    for b in range(B):
        rows = [*x[b, :num_prefix], *params['tokens'][0], *x[b, num_prefix:]]
        np.testing.assert_array_equal(out[b], np.stack(rows))


def test_registers_start_unlike_each_other():
    """Equal ones would have equal gradients, as no position tells them apart."""
    variables = Registers(3).init(jax.random.key(0), jnp.ones((B, T, D)), 1)
    tokens = np.asarray(variables['params']['tokens'][0])
    assert len(np.unique(tokens, axis=0)) == 3


@pytest.mark.parametrize(
    ('module', 'args'),
    [(ClassToken(distilled=True), ()), (Registers(3), (1,))],
    ids=['class token', 'registers'],
)
def test_tokens_take_the_dtype_of_the_others(module, args):
    x = jnp.zeros((B, T, D), jnp.bfloat16)
    variables = module.init(jax.random.key(0), x, *args)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    assert module.apply(variables, x, *args).dtype == jnp.bfloat16


@pytest.mark.parametrize('eps', [1e-6, 0.5])
def test_attention_pool_equals_the_loops(eps):
    (x,) = reference.random_arrays(0, (B, T, D))
    module = AttentionPool(num_heads=3, mlp_dim=7, layer_norm_eps=eps)
    params = reference.random_params(module, x)
    out = reference.apply(module, params, x)
    params = reference.float64(params)
    probe = np.repeat(params['probe'], B, axis=0)
    y = reference.multi_head_attention(params['attention'], probe, x)
    y = y + reference.mlp(params['mlp'], reference.layer_norm(params['norm'], y, eps))
    reference.assert_close(out, y[:, 0])


def test_pool_tokens_takes_the_first_or_the_mean():
    (x,) = reference.random_arrays(0, (B, T, D))
    assert np.array_equal(pool_tokens(x, 'cls'), x[:, 0])
    mean = sum(x[:, t] for t in range(T)) / T
    reference.assert_close(pool_tokens(jnp.float32(x), 'mean'), mean, 1e-6)
