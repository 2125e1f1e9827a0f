import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from vit_jax.layers.pooling import AttentionPool, ClassToken, pool_tokens

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


def test_class_token_takes_the_dtype_of_the_tokens():
    x = jnp.zeros((B, T, D), jnp.bfloat16)
    variables = ClassToken().init(jax.random.key(0), x)
    assert variables['params']['cls'].dtype == jnp.float32
    assert ClassToken().apply(variables, x).dtype == jnp.bfloat16


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
