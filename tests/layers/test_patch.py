import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from vit_jax.errors import UserError
from vit_jax.layers.patch import PatchEmbed

B, WIDTH = 2, 7


@pytest.mark.parametrize(
    ('size', 'patch_size', 'patch'),
    [
        ((15,), 3, (3,)),
        ((15,), (5,), (5,)),
        ((6, 10), 2, (2, 2)),
        ((6, 10), (3, 2), (3, 2)),
        ((4, 6, 10), 2, (2, 2, 2)),
        ((4, 6, 10), (1, 3, 5), (1, 3, 5)),
    ],
)
def test_tokens_are_linear_in_their_patches(size, patch_size, patch):
    module = PatchEmbed(WIDTH, patch_size)
    (x,) = reference.random_arrays(0, (B, *size, 3))
    params = reference.random_params(module, x)
    out = reference.apply(module, params, x)
    assert out.shape[1:-1] == tuple(n // p for n, p in zip(size, patch))
    expected = reference.patch_embed(reference.float64(params['embed']), x, patch)
    reference.assert_close(out, expected)


@pytest.mark.parametrize(
    ('shape', 'patch_size', 'message'),
    [
        ((B, 6, 10, 3), 4, 'patch 4x4 does not divide the image 6x10'),
        ((B, 6, 10, 3), (3, 4), 'patch 3x4 does not divide the image 6x10'),
        ((B, 6, 10, 3), 16, 'patch 16x16 does not divide the image 6x10'),
        ((B, 6, 10, 3), (2, 2, 2), 'patch size 2x2x2 has 3 axes, the input has 2'),
        ((B, 6, 3), (2, 2), 'patch size 2x2 has 2 axes, the input has 1'),
        ((B, 3), 2, r'1 to 3 axes of size; got shape \(2, 3\)'),
        ((B, 2, 2, 2, 2, 3), 2, r'1 to 3 axes of size; got shape \(2, 2, 2, 2, 2, 3\)'),
    ],
)
def test_sizes_that_do_not_fit_are_told(shape, patch_size, message):
    with pytest.raises(UserError, match=message):
        reference.init_shapes(PatchEmbed(WIDTH, patch_size), jnp.zeros(shape))


@pytest.mark.parametrize(('trained', 'given'), [(3, 1), (1, 3)])
def test_other_channels_than_the_parameters_are_told(trained, given):
    module = PatchEmbed(WIDTH, 2)
    params = reference.random_params(module, jnp.zeros((B, 4, 6, trained)))
    message = f'takes images of {trained} channels; got {given}'
    with pytest.raises(UserError, match=message):
        module.apply({'params': params}, jnp.zeros((B, 4, 6, given)))


def test_kernel_init_is_used():
    module = PatchEmbed(WIDTH, 2, kernel_init=jax.nn.initializers.constant(0.25))
    params = reference.init(module, jnp.zeros((B, 4, 6, 3)))
    expected = np.full((2, 2, 3, WIDTH), 0.25)
    np.testing.assert_array_equal(params['embed']['kernel'], expected)
