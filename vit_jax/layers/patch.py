"""Patches: cuts a signal of one, two or three axes into a grid of tokens."""

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.errors import UserError, times
from vit_jax.typing import Array, Dtype, Initializer


class PatchEmbed(nn.Module):
    """Maps each patch to a token by one linear map.

    "An Image is Worth 16x16 Words", arXiv 2010.11929, equation 1. A patch of a
    sequence is a window, of an image a rectangle, of a video a tubelet.

    Attributes:
      width: D, size of a token.
      patch_size: patch length along every axis, or one per axis.
      kernel_init: initializer of the kernel.
      dtype: dtype of the computation; parameters are float32.
    """

    width: int
    patch_size: int | tuple[int, ...]
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Cuts `x` into patches and embeds them.

        Args:
          x: `[B, *size, channels]` with one to three axes of size.

        Returns:
          `[B, *grid, D]`, the grid being size / patch_size.

        Raises:
          UserError: when a patch does not divide its axis, the rank of `x` does not
            suit `patch_size`, or the channels are not those of the parameters.

        >>> import jax
        >>> video = jnp.ones((2, 6, 8, 12, 3))  # frames, height, width, channels
        >>> patches = PatchEmbed(width=16, patch_size=(2, 4, 4))
        >>> patches.apply(patches.init(jax.random.key(0), video), video).shape
        (2, 3, 2, 3, 16)
        """
        size, channels = x.shape[1:-1], x.shape[-1]
        if not 1 <= len(size) <= 3:
            raise UserError(
                'PatchEmbed takes [batch, *size, channels] with 1 to 3 axes of size; '
                f'got shape {x.shape}'
            )
        patch = resolve_patch(self.patch_size, len(size))
        if any(n % p for n, p in zip(size, patch)):
            raise UserError(
                f'patch {times(patch)} does not divide the image {times(size)}; '
                'change the image size or the patch size'
            )
        check_channels(self, 'embed', channels)
        return nn.Conv(
            self.width,
            kernel_size=patch,
            strides=patch,
            padding='VALID',
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name='embed',
        )(x)


def resolve_patch(patch_size: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    """`patch_size` with one length per axis."""
    patch = (patch_size,) * rank if isinstance(patch_size, int) else tuple(patch_size)
    if any(p <= 0 for p in patch):
        raise UserError(f'patch size must be above 0, not {times(patch)}')
    if len(patch) != rank:
        raise UserError(
            f'patch size {times(patch)} has {len(patch)} axes, the input has {rank}'
        )
    return patch


def check_channels(module: nn.Module, name: str, channels: int) -> None:
    """Raises UserError if submodule `name` has parameters for other channels."""
    if not module.has_variable('params', name):
        return
    expected: int = module.get_variable('params', name)['kernel'].shape[-2]
    if expected != channels:
        raise UserError(
            f'the model takes images of {expected} channels; got {channels}'
        )
