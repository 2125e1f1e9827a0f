import conv_reference
import jax
import jax.numpy as jnp
import model_checks
import numpy as np
import numpy_reference as reference
import pytest
from flax import linen as nn

from vit_jax.errors import UserError
from vit_jax.layers.conv import Conv, ConvStem, max_pool, padding, standardize

B, C, F = 2, 3, 5


@pytest.mark.parametrize('kind', ['symmetric', 'same'])
@pytest.mark.parametrize(
    ('size', 'strides'), [(3, 1), (3, 2), (1, 2), (7, 2), (5, 3), (1, 3)]
)
def test_convolution_equals_the_loops(kind, size, strides):
    module = Conv(F, strides, size, kind)
    (x,) = reference.random_arrays(0, (B, 8, 11, C))
    params = reference.random_params(module, x)
    out = reference.apply(module, params, x)
    kernel = np.float64(params['kernel'])
    reference.assert_close(out, conv_reference.convolve(x, kernel, strides, kind))


def test_the_paddings_differ_at_even_sizes():
    assert padding((224, 7), 3, 2, 'symmetric') == ((1, 1), (1, 1))
    assert padding((224, 7), 3, 2, 'same') == ((0, 1), (1, 1))
    assert padding((224, 7), 7, 2, 'symmetric') == ((3, 3), (3, 3))
    assert padding((224, 7), 7, 2, 'same') == ((2, 3), (3, 3))


@pytest.mark.parametrize(
    ('size', 'strides', 'kind'),
    [(3, 2, 'symmetric'), (3, 2, 'same'), (4, 4, 'same'), (5, 3, 'symmetric')],
)
def test_pooling_takes_the_largest_and_sees_zeros_outside(size, strides, kind):
    (x,) = reference.random_arrays(0, (B, 8, 11, C))
    x = x - 2.0  # so that a zero is the largest of many windows at the border
    out = max_pool(jnp.asarray(x, jnp.float32), size, strides, kind)
    expected = conv_reference.max_pool(x, size, strides, kind)
    reference.assert_close(out, expected)


@pytest.mark.parametrize(
    ('size', 'kind', 'message'),
    [
        (4, 'symmetric', "needs an odd kernel, not 4; use 'same'"),
        (3, 'sane', "unknown padding 'sane'; did you mean 'same'"),
    ],
)
def test_paddings_that_cannot_be_are_told(size, kind, message):
    with pytest.raises(UserError, match=message):
        reference.init_shapes(Conv(F, 1, size, kind), jnp.ones((1, 4, 6, 3)))


@pytest.mark.parametrize('eps', [0.0, 0.5])
def test_standardised_kernels_have_mean_0_and_deviation_1(eps):
    (kernel,) = reference.random_arrays(0, (3, 5, C, F))
    kernel = kernel * np.arange(1, F + 1) + np.arange(F)
    out = standardize(jnp.asarray(kernel, jnp.float32), eps)
    reference.assert_close(out, conv_reference.standardize(kernel, eps))


def test_a_constant_kernel_has_a_finite_gradient():
    gradient = jax.grad(lambda k: jnp.sum(standardize(k) ** 2))(jnp.ones((1, 1, 1, F)))
    np.testing.assert_array_equal(gradient, 0.0)


def test_convolution_uses_the_standardised_kernel():
    module = Conv(F, standardize_eps=0.25)
    (x,) = reference.random_arrays(0, (B, 4, 6, C))
    params = reference.random_params(module, x)
    out = reference.apply(module, params, x)
    kernel = conv_reference.standardize(np.float64(params['kernel']), 0.25)
    reference.assert_close(out, conv_reference.convolve(x, kernel, 1, 'symmetric'))


def test_kernel_starts_as_he_by_its_outputs():
    params = reference.init(Conv(64), jnp.ones((1, 2, 2, 16)))
    expected = np.sqrt(2 / (9 * 64))
    np.testing.assert_allclose(np.std(params['kernel']), expected, rtol=0.02)
    ones = Conv(F, kernel_init=nn.initializers.ones)
    params = reference.init(ones, jnp.ones((1, 2, 2, C)))
    np.testing.assert_array_equal(params['kernel'], 1.0)


def test_stem_equals_the_loops():
    stem = ConvStem(widths=(4, 6), num_groups=2)
    (x,) = reference.random_arrays(0, (B, 9, 14, C))
    params = reference.random_params(stem, x)
    out = reference.apply(stem, params, x)
    assert out.shape == (B, 3, 4, 6)
    params = reference.float64(params)
    for i in range(2):
        x = conv_reference.convolve(x, params[f'conv{i}']['kernel'], 2, 'symmetric')
        x = np.maximum(conv_reference.group_norm(params[f'norm{i}'], x, groups=2), 0)
    reference.assert_close(out, x)


def test_stem_tells_what_does_not_fit():
    image = jnp.ones((1, 4, 6, 3))
    with pytest.raises(
        UserError, match=r'num_groups 4 does not divide widths \(8, 6\)'
    ):
        reference.init_shapes(ConvStem((8, 6), num_groups=4), image)
    stem = ConvStem((8,))
    params = reference.init_shapes(stem, image)
    with pytest.raises(UserError, match='takes images of 3 channels; got 1'):
        jax.eval_shape(stem.apply, {'params': params}, jnp.ones((1, 4, 6, 1)))


def test_every_field_of_the_stem_matters_and_bfloat16_reaches_its_modules():
    def make_stem(**kwargs):
        return ConvStem(**{'widths': (4, 8), 'num_groups': 2, **kwargs})

    shape = (B, 8, 12, C)
    others = {'widths': (4, 6), 'num_groups': 1, 'dtype': jnp.bfloat16}
    model_checks.check_every_field_matters(make_stem, shape, others)
    stem = make_stem(dtype=jnp.bfloat16)
    model_checks.check_dtype_reaches_every_module(stem, shape, [])


def test_variance_of_the_stem_survives_a_large_mean():
    """A kernel that only sees its middle: no zero of a border joins the mean."""
    stem = ConvStem(widths=(C,), num_groups=C)
    (x,) = reference.random_arrays(0, (B, 8, 12, C))
    x = np.float64(np.float32(x + 1000.0))
    params = reference.init(stem, jnp.float32(x))
    kernel = jnp.zeros((3, 3, C, C)).at[1, 1].set(jnp.eye(C))
    params = {**params, 'conv0': {'kernel': kernel}}
    seen = x[:, ::2, ::2]
    expected = conv_reference.group_norm({'scale': 1.0, 'bias': 0.0}, seen, groups=C)
    out = reference.apply(stem, params, x)
    reference.assert_close(out, np.maximum(expected, 0), 1e-3)


@pytest.mark.parametrize('module', [Conv(F), ConvStem((8,))])
@pytest.mark.parametrize('shape', [(4, 6, 3), (6,), (1, 2, 4, 6, 3)])
def test_what_is_no_map_is_told(module, shape):
    name = type(module).__name__
    with pytest.raises(UserError, match=rf'^{name} takes a map \[B, R, C, D\]; got'):
        reference.init_shapes(module, jnp.ones(shape))


def test_strides_and_groups_of_0_are_told():
    image = jnp.ones((1, 4, 6, 3))
    for strides in (0, -1):
        with pytest.raises(
            UserError, match=f'Conv takes strides above 0, not {strides}'
        ):
            reference.init_shapes(Conv(F, strides), image)
    with pytest.raises(UserError, match=r'num_groups 0 does not divide widths \(8,\)'):
        reference.init_shapes(ConvStem((8,), num_groups=0), image)
