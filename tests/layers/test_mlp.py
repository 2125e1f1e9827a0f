import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from vit_jax.errors import UserError
from vit_jax.layers.mlp import MlpBlock, get_activation


@pytest.mark.parametrize('name', ['gelu', 'gelu_tanh', 'relu'])
def test_activation_is_the_formula(name):
    x = np.linspace(-5, 5, 31)
    actual = get_activation(name)(jnp.float32(x))
    reference.assert_close(actual, reference.activate(x, name), 1e-6)


def test_the_two_gelus_differ():
    assert abs(get_activation('gelu')(2.0) - get_activation('gelu_tanh')(2.0)) > 1e-5


def test_unknown_activation_offers_the_nearest():
    with pytest.raises(UserError, match="activation 'rel'; did you mean 'relu'"):
        get_activation('rel')


def make_block(**kwargs):
    block = MlpBlock(mlp_dim=7, **kwargs)
    (x,) = reference.random_arrays(0, (2, 3, 5))
    return block, reference.random_params(block, x, scale=1.0), x


@pytest.mark.parametrize('variant', ['gelu', 'gelu_tanh', 'relu'])
def test_block_is_two_linear_maps_with_an_activation_between(variant):
    block, params, x = make_block(activation=variant)
    expected = reference.mlp(reference.float64(params), x, variant)
    reference.assert_close(reference.apply(block, params, x), expected)


def test_kernel_init_reaches_both_kernels():
    block = MlpBlock(7, kernel_init=jax.nn.initializers.constant(0.25))
    params = reference.init(block, jnp.ones((1, 5)))
    np.testing.assert_array_equal(params['fc1']['kernel'], np.full((5, 7), 0.25))
    np.testing.assert_array_equal(params['fc2']['kernel'], np.full((7, 5), 0.25))


def test_dropout_after_each_linear_map_in_training_only():
    block = MlpBlock(mlp_dim=101, dropout_rate=0.5)
    x = jnp.ones((3, 97))
    params = reference.random_params(block, x)
    plain = reference.apply(block, params, x)
    expected = reference.mlp(reference.float64(params), np.float64(x))
    reference.assert_close(plain, expected)
    out = reference.apply(block, params, x, train=True, rng=jax.random.key(0))
    dropped = out == 0.0
    assert 0.4 < dropped.mean() < 0.6  # by the second
    assert not np.any(np.isclose(out, 2 * plain)[~dropped])  # by the first


@pytest.mark.parametrize(
    ('rate', 'hidden_rate', 'zeros'), [(0.5, 0.0, 0.5), (0.0, 0.5, 0.0)]
)
def test_hidden_units_may_have_a_rate_of_their_own(rate, hidden_rate, zeros):
    block = MlpBlock(mlp_dim=101, dropout_rate=rate, hidden_dropout_rate=hidden_rate)
    x = jnp.ones((3, 97))
    params = reference.random_params(block, x)
    plain = reference.apply(block, params, x)
    out = reference.apply(block, params, x, train=True, rng=jax.random.key(0))
    dropped = out == 0.0
    assert abs(dropped.mean() - zeros) < 0.1
    kept = np.isclose(out, plain / (1.0 - rate))[~dropped]
    assert np.all(kept) == (hidden_rate == 0.0)
