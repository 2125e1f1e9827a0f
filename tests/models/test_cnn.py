import conv_reference
import jax.numpy as jnp
import model_checks
import numpy as np
import numpy_reference as reference
import pytest

from vit_jax.errors import UserError
from vit_jax.models.cnn import CNN

SHAPE = (2, 9, 7, 3)


def make_model(**kwargs):
    fields = {'num_classes': 5, 'widths': (4, 6), 'strides': (1, 2), 'num_groups': 2}
    return CNN(**{**fields, **kwargs})


@pytest.mark.parametrize('num_classes', [5, None])
def test_forward_pass_equals_the_loops(num_classes):
    model = make_model(num_classes=num_classes)
    (x,) = reference.random_arrays(0, SHAPE)
    params = reference.random_params(model, x)
    out = reference.apply(model, params, x)
    params = reference.float64(params)
    for i, stride in enumerate((1, 2)):
        x = conv_reference.convolve(x, params[f'conv{i}']['kernel'], stride, 'same')
        x = np.maximum(conv_reference.group_norm(params[f'norm{i}'], x, groups=2), 0)
    x = x.mean(axis=(1, 2))
    if num_classes:
        x = reference.linear(params['head'], x)
    reference.assert_close(out, x)


def test_circular_padding_knows_no_border():
    model = make_model(num_classes=None, strides=(1, 1), padding='circular')
    (x,) = reference.random_arrays(0, SHAPE)
    params = reference.random_params(model, x)
    out = reference.apply(model, params, x)
    reference.assert_close(
        reference.apply(model, params, jnp.roll(x, (2, 5), (1, 2))), out
    )
    zeros = make_model(num_classes=None, strides=(1, 1))
    assert not np.allclose(reference.apply(zeros, params, x), out, atol=1e-3)


def test_another_padding_is_told():
    with pytest.raises(UserError, match=r"unknown padding 'circle'; .* 'circular'"):
        reference.init_shapes(make_model(padding='circle'), jnp.ones(SHAPE))


def test_bfloat16_reaches_every_module():
    model = make_model(dtype=jnp.bfloat16)
    model_checks.check_dtype_reaches_every_module(model, SHAPE, ['', 'head'])


def test_features_are_float32_under_bfloat16():
    model = make_model(num_classes=None, dtype=jnp.bfloat16)
    model_checks.check_dtype_reaches_every_module(model, SHAPE, [''])


def test_every_field_matters():
    others = {
        'num_classes': 7,
        'widths': (8, 10),
        'strides': (1, 1),
        'kernel_size': 5,
        'padding': 'circular',
        'num_groups': 1,
        'attention_after': (0,),
        'dtype': jnp.bfloat16,
    }

    def make(**kwargs):
        return make_model(**{'widths': (8, 6), **kwargs})

    model_checks.check_every_field_matters(make, SHAPE, others)


@pytest.mark.parametrize('shape', [(8, 8, 3), (2, 4, 8, 8, 3), (2, 8)])
def test_another_rank_is_told(shape):
    with pytest.raises(UserError, match=r'takes images \[B, h, w, channels\]; got'):
        reference.init_shapes(CNN(5), jnp.zeros(shape))


def test_attention_starts_as_the_identity_and_grows_by_gamma():
    model = make_model(widths=(8, 16), attention_after=(0, 1))
    (x,) = reference.random_arrays(0, SHAPE)
    params = reference.init(model, x)
    plain = {k: v for k, v in params.items() if not k.startswith('attention')}
    assert set(params) - set(plain) == {'attention0', 'attention1'}
    out = reference.apply(model, params, x)
    expected = reference.apply(make_model(widths=(8, 16)), plain, x)
    np.testing.assert_array_equal(out, expected)

    for name in ('attention0', 'attention1'):
        grown = {**params, name: {**params[name], 'gamma': jnp.ones(())}}
        assert not np.allclose(reference.apply(model, grown, x), out, atol=1e-3)


@pytest.mark.parametrize('numbers', [(2,), (0, -1)])
def test_attention_after_no_convolution_is_told(numbers):
    model = make_model(attention_after=numbers)
    with pytest.raises(UserError, match=r'must be among the numbers of .* 0 to 1'):
        reference.init_shapes(model, jnp.ones(SHAPE))


def test_bfloat16_reaches_the_attention():
    model = make_model(widths=(8, 16), attention_after=(1,), dtype=jnp.bfloat16)
    model_checks.check_dtype_reaches_every_module(model, SHAPE, ['', 'head'])
