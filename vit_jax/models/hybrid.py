"""Stems: what cuts an image into tokens, from its pixels or from a feature map."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn

from vit_jax.errors import UserError, times
from vit_jax.layers.conv import ConvStem
from vit_jax.layers.patch import PatchEmbed, resolve_patch
from vit_jax.models.parts import make_part
from vit_jax.models.resnet import ResNet
from vit_jax.typing import Array, Dtype

# Made from `dtype` and `name`, and called as `module(image, train=train)`: a feature
# map. 'resnet' is the trunk of "An Image is Worth 16x16 Words", arXiv 2010.11929, as
# its public weights have it; give it `stage_sizes`.
STEMS: dict[str, Callable[..., nn.Module]] = {
    'conv': ConvStem,
    'resnet': partial(
        ResNet,
        num_classes=None,
        norm='group',
        norm_eps=1e-6,
        standardize_eps=1e-5,
        padding='same',
        pool='none',
    ),
}


def embed_image(
    image: Array,
    width: int,
    patch_size: int | tuple[int, ...],
    *,
    stem: str | Callable[..., nn.Module] | None = None,
    stem_kwargs: Mapping[str, Any] | None = None,
    train: bool = False,
    dtype: Dtype,
) -> Array:
    """Tokens of an image: a submodule 'patches', behind a submodule 'stem' if any.

    A patch is counted in pixels, with a stem too: it is cut from the feature map by
    what the stem's stride leaves of it.

    Args:
      image: `[B, *size, channels]`.
      width: D, size of a token.
      patch_size: patch length, or one per axis.
      stem: a name of `STEMS`, a callable like those, or None.
      stem_kwargs: its other fields.
      train, dtype: see `ViT`.

    Returns:
      `[B, *grid, D]`, the grid being size / patch_size.

    Raises:
      UserError: for an unknown stem, or patches that do not fit the stem's map.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from vit_jax.models import build_model
    >>> model = build_model('ConViT-Ti/4', 7, stem='conv', stem_kwargs={'widths': (8,)})
    >>> image = jnp.ones((1, 8, 12, 3))
    >>> shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    >>> shapes['params']['posemb']['grid'].shape
    (2, 3, 192)
    """
    if stem is None:
        if stem_kwargs:
            raise UserError(f'stem_kwargs {dict(stem_kwargs)} need a stem')
        return PatchEmbed(width, patch_size, dtype=dtype, name='patches')(image)
    owned = ('num_classes', 'pool', 'dtype', 'name')
    make = make_part('stem', stem, STEMS, stem_kwargs, owned=owned)
    x = make(dtype=dtype, name='stem')(image, train=train)
    size, cells = image.shape[1:-1], x.shape[1:-1]
    patch = resolve_patch(patch_size, len(size))
    if any(n % p or (c * p) % n for n, c, p in zip(size, cells, patch)):
        raise UserError(
            f'patch {times(patch)} does not fit: the stem makes a map of '
            f'{times(cells)} of the image {times(size)}; the patch must divide the '
            "image and be a multiple of the stem's stride"
        )
    patch = tuple(c * p // n for n, c, p in zip(size, cells, patch))
    return PatchEmbed(width, patch, dtype=dtype, name='patches')(x)
