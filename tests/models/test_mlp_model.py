import jax
import jax.numpy as jnp
import model_checks
import numpy_reference as reference
import pytest

from vit_jax.errors import UserError
from vit_jax.models.mlp import MLP

SHAPE = (2, 3, 5, 3)


def make_model(**kwargs):
    return MLP(**{'num_classes': 7, 'widths': (11, 13), **kwargs})


@pytest.mark.parametrize('num_classes', [7, None])
@pytest.mark.parametrize('widths', [(), (11, 13)])
def test_forward_pass_equals_the_formula(num_classes, widths):
    model = make_model(num_classes=num_classes, widths=widths)
    (image,) = reference.random_arrays(0, SHAPE)
    params = reference.random_params(model, image) if num_classes or widths else {}
    out = reference.apply(model, params, image)
    params = reference.float64(params)
    x = image.reshape(2, -1)
    for i in range(len(widths)):
        x = reference.gelu(reference.linear(params[f'fc{i}'], x))
    if num_classes:
        x = reference.linear(params['head'], x)
    reference.assert_close(out, x, 5e-5)


def test_bfloat16_reaches_every_module():
    model = make_model(dtype=jnp.bfloat16)
    model_checks.check_dtype_reaches_every_module(model, SHAPE, ['', 'head'])


def test_every_field_matters():
    others = {
        'num_classes': 5,
        'widths': (13, 11),
        'activation': 'relu',
        'dropout_rate': 0.1,
        'dtype': jnp.bfloat16,
    }
    model_checks.check_every_field_matters(make_model, SHAPE, others)


@pytest.mark.parametrize('widths', [(), (11,)])
def test_an_image_of_another_size_is_told(widths):
    model = make_model(widths=widths)
    params = reference.init_shapes(model, jnp.ones(SHAPE))
    with pytest.raises(UserError, match='images of 45 numbers; got 5x3x2 = 30'):
        jax.eval_shape(model.apply, {'params': params}, jnp.ones((2, 5, 3, 2)))
