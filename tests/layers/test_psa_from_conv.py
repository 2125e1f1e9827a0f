"""Positional self-attention as a convolution: exactly, and at the start of GPSA."""

import chex
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from vit_jax.errors import UserError
from vit_jax.layers.psa import GPSA, PSA, psa_from_conv

B, IN, OUT = 2, 3, 5


def convolve(image, kernel, bias=0.0):
    """Stride 1 on the image padded by its edges, pixel by pixel."""
    side = len(kernel)
    margin = side // 2
    _, rows, cols, _ = image.shape
    out = np.zeros((*image.shape[:3], kernel.shape[-1]))
    for y, x, i, j in np.ndindex(rows, cols, side, side):
        row = min(max(y + i - margin, 0), rows - 1)
        col = min(max(x + j - margin, 0), cols - 1)
        out[:, y, x] += image[:, row, col] @ kernel[i, j]
    return out + bias


def run_psa(image, kernel, bias=None, impl='auto', **kwargs):
    batch, rows, cols, width = image.shape
    side, _, _, out_dim = kernel.shape
    layer = PSA(side**2, (rows, cols), head_dim=width, out_dim=out_dim, impl=impl)
    params = psa_from_conv(jnp.float32(kernel), bias, **kwargs)
    out = reference.apply(layer, params, image.reshape(batch, rows * cols, width))
    return np.asarray(out).reshape(batch, rows, cols, out_dim)


@pytest.mark.parametrize('impl', ['dense', 'xla', 'chunked'])
@pytest.mark.parametrize(
    ('side', 'grid'), [(1, (2, 3)), (3, (4, 7)), (5, (7, 4)), (3, (1, 9)), (5, (2, 2))]
)
def test_psa_computes_any_convolution_of_the_edge_padded_image(side, grid, impl):
    image, kernel, bias = reference.random_arrays(
        side, (B, *grid, IN), (side, side, IN, OUT), (OUT,)
    )
    out = run_psa(image, kernel, jnp.float32(bias), impl)
    reference.assert_close(out, convolve(image, kernel, bias), 1e-5)
    plain = run_psa(image, kernel, impl=impl)
    reference.assert_close(plain, convolve(image, kernel), 1e-5)


def test_the_parameters_are_those_of_the_layer():
    layer = PSA(9, (4, 7), head_dim=IN, out_dim=OUT)
    expected = reference.init_shapes(layer, jnp.zeros((1, 28, IN)))
    params = psa_from_conv(jnp.zeros((3, 3, IN, OUT)))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, expected)


def test_the_error_falls_with_the_locality_strength():
    image, kernel = reference.random_arrays(1, (B, 5, 7, IN), (3, 3, IN, OUT))
    expected = convolve(image, kernel)
    errors = []
    for strength in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0):
        out = run_psa(image, kernel, locality_strength=strength)
        errors.append(np.abs(out - expected).max())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.0
    assert errors[-1] <= 1e-5


def test_zero_padding_is_another_convolution():
    # No head can attend outside the image, at any strength: only the inside agrees.
    image, kernel = reference.random_arrays(1, (B, 5, 7, IN), (3, 3, IN, OUT))
    out = run_psa(image, kernel)
    zero_padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = convolve(zero_padded, kernel)[:, 1:-1, 1:-1]
    reference.assert_close(out[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], 1e-5)
    assert np.abs(out - expected)[:, 0].max() > 1.0


@pytest.mark.parametrize(
    ('shape', 'message'),
    [
        ((4, 4, IN, OUT), 'needs a kernel of odd side.*got 4x4'),
        ((3, 5, IN, OUT), r'takes a kernel \[K, K, in, out\]; got \(3, 5, 3, 5\)'),
        ((3, IN, OUT), r'takes a kernel \[K, K, in, out\]'),
    ],
)
def test_other_kernels_are_told(shape, message):
    with pytest.raises(UserError, match=message):
        psa_from_conv(jnp.zeros(shape))


def test_a_bias_of_another_size_is_told():
    with pytest.raises(UserError, match=r'5 outputs takes a bias \(5,\); got \(3,\)'):
        psa_from_conv(jnp.zeros((3, 3, IN, OUT)), jnp.zeros(3))


def gpsa_at_start(strength, gating=1.0):
    """(GPSA's output at initialisation, the convolution that it imitates)"""
    grid, width = (5, 7), 36
    layer = GPSA(9, grid, locality_strength=strength)
    (x,) = reference.random_arrays(2, (B, 35, width))
    params = reference.init(layer, x)
    assert np.all(np.asarray(params['gating']) == 1.0)
    params['gating'] = jnp.full(9, gating)
    out = np.asarray(reference.apply(layer, params, x))
    # Head h1 + 3 h2 sees its slice of the channels at row h1, column h2 of the kernel.
    kernel = np.zeros((3, 3, width, width))
    for head, merge in enumerate(np.float64(params['out']['kernel'])):  # [4, width]
        kernel[head % 3, head // 3, 4 * head : 4 * head + 4] = merge
    conv = convolve(x.reshape(B, *grid, width), kernel)
    return out, conv.reshape(out.shape)


def test_gpsa_with_closed_content_starts_as_the_convolution():
    out, conv = gpsa_at_start(strength=100.0, gating=30.0)
    reference.assert_close(out, conv, 1e-5)


def test_gpsa_starts_nearer_to_the_convolution_the_sharper_it_is():
    """How far it is from gate x convolution, relative to that; the rest is content."""
    gate = reference.sigmoid(1.0)
    distances = []
    for strength in (0.1, 0.5, 1.0, 2.0, 8.0):
        out, conv = gpsa_at_start(strength)
        distances.append(
            np.linalg.norm(out - gate * conv) / np.linalg.norm(gate * conv)
        )
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.9
    # What is left at full sharpness is the content half, 27% of an average.
    assert 0.05 < distances[-1] < 0.25
