import jax.numpy as jnp
import model_checks
import numpy as np
import numpy_reference as reference
import pytest

from vit_jax.models.cnn import CNN

SHAPE = (2, 9, 7, 3)


def make_model(**kwargs):
    fields = {'num_classes': 5, 'widths': (4, 6), 'strides': (1, 2), 'num_groups': 2}
    return CNN(**{**fields, **kwargs})


def convolve(x, kernel, stride):
    """A 'SAME' convolution with an odd kernel, pixel by pixel."""
    batch, height, width, _ = x.shape
    size = len(kernel)
    out_size = [-(-n // stride) for n in (height, width)]
    pads = [max((m - 1) * stride + size - n, 0) for m, n in zip(out_size, x.shape[1:3])]
    x = np.pad(x, [(0, 0), *[(p // 2, p - p // 2) for p in pads], (0, 0)])
    out = np.zeros((batch, *out_size, kernel.shape[-1]))
    for row, col in np.ndindex(*out_size):
        top, left = row * stride, col * stride
        window = x[:, top : top + size, left : left + size]
        out[:, row, col] = np.einsum('bijc,ijcd->bd', window, kernel)
    return out


def group_norm(params, x, groups, eps=1e-6):
    parts = np.split(x, groups, axis=-1)
    axes = (1, 2, 3)
    parts = [
        (p - p.mean(axes, keepdims=True)) / np.sqrt(p.var(axes, keepdims=True) + eps)
        for p in parts
    ]
    return np.concatenate(parts, axis=-1) * params['scale'] + params['bias']


@pytest.mark.parametrize('num_classes', [5, None])
def test_forward_pass_equals_the_loops(num_classes):
    model = make_model(num_classes=num_classes)
    (x,) = reference.random_arrays(0, SHAPE)
    params = reference.random_params(model, x)
    out = reference.apply(model, params, x)
    params = reference.float64(params)
    for i, stride in enumerate((1, 2)):
        x = convolve(x, params[f'conv{i}']['kernel'], stride)
        x = np.maximum(group_norm(params[f'norm{i}'], x, groups=2), 0)
    x = x.mean(axis=(1, 2))
    if num_classes:
        x = reference.linear(params['head'], x)
    reference.assert_close(out, x)


def test_bfloat16_reaches_every_module():
    model = make_model(dtype=jnp.bfloat16)
    model_checks.check_dtype_reaches_every_module(model, SHAPE, ['', 'head'])


def test_features_are_float32_under_bfloat16():
    model = make_model(num_classes=None, dtype=jnp.bfloat16)
    model_checks.check_dtype_reaches_every_module(model, SHAPE, [''])


def test_every_field_matters():
    others = {
        'num_classes': 7,
        'widths': (4, 8),
        'strides': (1, 1),
        'kernel_size': 5,
        'num_groups': 1,
        'dtype': jnp.bfloat16,
    }
    model_checks.check_every_field_matters(make_model, SHAPE, others)
