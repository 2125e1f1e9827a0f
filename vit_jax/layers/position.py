"""Position embeddings: how tokens learn where they are."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError, times, unknown
from vit_jax.typing import Array, Initializer, Shape

POSEMBS = ('learned', 'sincos1d', 'sincos2d', 'none')


def sincos(
    positions: np.ndarray, width: int, max_wavelength: float = 10_000.0
) -> np.ndarray:
    """Sine and cosine pairs of geometrically growing wavelength.

    "Attention Is All You Need", arXiv 1706.03762, section 3.5, with the sines in
    the first half of the features and the cosines in the second. With w_i =
    max_wavelength^(-i / (width / 2)), a step in position rotates each pair.

    Args:
      positions: `[T]`, any numbers.
      width: D, even.
      max_wavelength: the longest wavelength is at most 2 pi times this.

    Returns:
      `[T, D]` float32.

    Raises:
      UserError: when `width` is odd.
    """
    if width % 2:
        raise UserError(f'sine-cosine positions need an even width, not {width}')
    frequencies = max_wavelength ** -(np.arange(width // 2) / (width // 2))
    angles = np.asarray(positions, np.float64)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def sincos_grid(grid: tuple[int, ...], width: int) -> np.ndarray:
    """Sine-cosine embeddings of a grid: an equal share of the width for each axis.

    Args:
      grid: lengths of the axes, such as (rows, columns).
      width: D, divisible by twice the number of axes.

    Returns:
      `[T, D]` float32, T the product of `grid`, last axis fastest; the features of
      the first axis come first.

    Raises:
      UserError: when the width cannot be shared.

    >>> sincos_grid((3, 5), 8).shape
    (15, 8)
    """
    if width % (2 * len(grid)):
        raise UserError(
            f'sine-cosine positions on {len(grid)} axes need a width divisible by '
            f'{2 * len(grid)}, not {width}'
        )
    axes = np.meshgrid(*map(np.arange, grid), indexing='ij')
    share = width // len(grid)
    return np.concatenate([sincos(axis.ravel(), share) for axis in axes], axis=1)


class PositionEmbedding(nn.Module):
    """Adds an embedding of its position to every token.

    Learned embeddings of the grid are stored as `[*grid, D]`, not as a list: a 4x9
    grid cannot be mistaken for a 6x6 one.

    Attributes:
      kind: 'learned'; 'sincos1d' (tokens numbered in a row); 'sincos2d' (a share of
        the width for each axis of the grid, of which there may be one to three);
        'none'.
      embedding_init: initializer of the learned embeddings.
    """

    kind: str = 'learned'
    embedding_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: Array, grid: tuple[int, ...]) -> Array:
        """Adds the embeddings.

        Args:
          x: `[B, P + T, D]`: P prefix tokens (a class token), then the grid's.
          grid: lengths of the grid's axes, T their product.

        Returns:
          `[B, P + T, D]`. Fixed embeddings leave prefix tokens as they are, learned
          ones have a row for each.

        Raises:
          UserError: for an unknown `kind`, or a grid that is not that of the
            learned embeddings.
        """
        num_tokens, width = x.shape[1:]
        num_prefix = num_tokens - math.prod(grid)
        if self.kind == 'none':
            return x
        if self.kind == 'learned':
            self._check_grid(grid)
            learned = self.param(
                'grid', self.embedding_init, (*grid, width), jnp.float32
            )
            learned = learned.reshape(-1, width)
            if num_prefix:
                prefix = self.param(
                    'prefix', self.embedding_init, (num_prefix, width), jnp.float32
                )
                learned = jnp.concatenate([prefix, learned])
            return x + learned.astype(x.dtype)
        if self.kind == 'sincos1d':
            posemb = sincos(np.arange(math.prod(grid)), width)
        elif self.kind == 'sincos2d':
            posemb = sincos_grid(grid, width)
        else:
            raise unknown('position embedding', self.kind, POSEMBS)
        return x + jnp.asarray(np.pad(posemb, ((num_prefix, 0), (0, 0))), x.dtype)

    def _check_grid(self, grid: tuple[int, ...]) -> None:
        if not self.has_variable('params', 'grid'):
            return
        expected: Shape = self.get_variable('params', 'grid').shape[:-1]
        if expected != tuple(grid):
            raise UserError(
                f'the model has learned positions for a grid of {times(expected)} '
                f'patches; this input has {times(grid)}'
            )
