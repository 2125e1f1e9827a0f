"""Position encodings: how tokens learn where they are.

Without them self-attention cannot tell one order of its tokens from another. A good
code is bounded, does not depend on the length of the sequence, makes equal steps
equally long, and turns a shift into a linear map. Only sine and cosine pairs do all
four ("Attention Is All You Need", arXiv 1706.03762, section 3.5).
"""

import math
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError, times, unknown
from vit_jax.typing import Array, Initializer, Shape

MAX_WAVELENGTH = 10_000.0


def integer(positions: np.ndarray, width: int) -> np.ndarray:
    """The number of the position, in the first feature: unbounded.

    Not in every feature, where the LayerNorm of the first block would remove it. In
    bfloat16 whole numbers above 256 are no longer told apart.

    Args:
      positions: `[T]`, any numbers.
      width: D.

    Returns:
      `[T, D]` float32.
    """
    out = np.zeros((len(positions), width), np.float32)
    out[:, 0] = positions
    return out


def normalized(
    positions: np.ndarray, width: int, length: int | None = None
) -> np.ndarray:
    """Position / length, in the first feature: a place has a code for each length.

    Args:
      positions: `[T]`, any numbers.
      width: D.
      length: of the sequence; None for T.

    Returns:
      `[T, D]` float32.

    >>> normalized(np.arange(4), width=1)[:, 0]
    array([0.  , 0.25, 0.5 , 0.75], dtype=float32)
    """
    return integer(np.asarray(positions) / (length or len(positions)), width)


def binary(positions: np.ndarray, width: int) -> np.ndarray:
    """The binary digits of the position, lowest first: steps of unequal length.

    Args:
      positions: `[T]` whole numbers from 0.
      width: D, number of digits.

    Returns:
      `[T, D]` float32 of zeros and ones.

    Raises:
      UserError: when a position has more digits, or is no whole number from 0.

    >>> binary(np.array([0, 1, 6]), width=4)
    array([[0., 0., 0., 0.],
           [1., 0., 0., 0.],
           [0., 1., 1., 0.]], dtype=float32)
    """
    given = np.asarray(positions)
    positions = given.astype(np.int64)
    if np.any(positions != given) or np.any(positions < 0):
        raise UserError('binary positions are whole numbers from 0')
    largest = max(map(int, positions), default=0)
    if largest >= 2**width:
        raise UserError(
            f'position {largest} has {largest.bit_length()} binary digits; '
            f'a width of {width} holds {width}'
        )
    # Shifts of 64 and more are undefined; no position is that large.
    shifts = np.minimum(np.arange(width), 62)
    return ((positions[:, None] >> shifts) & 1).astype(np.float32)


def sine(
    positions: np.ndarray, width: int, max_wavelength: float = MAX_WAVELENGTH
) -> np.ndarray:
    """One sine a feature, of geometrically growing wavelength: steps shrink at crests.

    Args:
      positions: `[T]`, any numbers.
      width: D.
      max_wavelength: the longest wavelength is at most 2 pi times this.

    Returns:
      `[T, D]` float32.
    """
    return np.sin(_angles(positions, width, max_wavelength)).astype(np.float32)


def sincos(
    positions: np.ndarray, width: int, max_wavelength: float = MAX_WAVELENGTH
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

    >>> sincos(np.array([0.0, np.pi / 2]), 2).round(6)
    array([[0., 1.],
           [1., 0.]], dtype=float32)
    """
    _check_even(width)
    angles = _angles(positions, width // 2, max_wavelength)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def sincos_grid(grid: Shape, width: int) -> np.ndarray:
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
    share = _share(width, len(grid))
    axes = np.meshgrid(*map(np.arange, grid), indexing='ij')
    return np.concatenate([sincos(axis.ravel(), share) for axis in axes], axis=1)


def shift_matrix(
    delta: float | Sequence[float],
    width: int,
    max_wavelength: float = MAX_WAVELENGTH,
) -> np.ndarray:
    """The linear map that moves sine-cosine positions: PE(x + delta) = T PE(x).

    It rotates each pair by w_i delta, whatever x is, so a query can learn to ask for
    a relative position ("Attention Is All You Need", section 3.5).

    Args:
      delta: the step; or one per axis of a grid, for `sincos_grid`.
      width: D, as for the positions.
      max_wavelength: as for the positions.

    Returns:
      T, `[D, D]` float32.

    Raises:
      UserError: when the width cannot be shared among the axes.

    >>> moved = sincos(np.array([5.0]), 4) @ shift_matrix(2.0, 4).T
    >>> bool(np.allclose(moved, sincos(np.array([7.0]), 4)))
    True
    """
    steps = np.atleast_1d(np.asarray(delta))
    share = _share(width, len(steps))
    out = np.zeros((width, width))
    for axis, step in enumerate(steps):
        angles = _angles(np.array([step]), share // 2, max_wavelength)[0]
        cos, sin = np.diag(np.cos(angles)), np.diag(np.sin(angles))
        block = slice(axis * share, (axis + 1) * share)
        out[block, block] = np.block([[cos, sin], [-sin, cos]])
    return out.astype(np.float32)


def _angles(positions: np.ndarray, num_waves: int, max_wavelength: float) -> np.ndarray:
    """`[T, num_waves]` float64: positions times geometrically falling frequencies."""
    frequencies = max_wavelength ** -(np.arange(num_waves) / max(num_waves, 1))
    return np.asarray(positions, np.float64)[:, None] * frequencies


def _check_even(width: int) -> None:
    if width % 2:
        raise UserError(f'sine-cosine positions need an even width, not {width}')


def _share(width: int, num_axes: int) -> int:
    """The features of each axis."""
    if num_axes == 1:
        _check_even(width)
    if width % (2 * num_axes):
        raise UserError(
            f'sine-cosine positions on {num_axes} axes need a width divisible by '
            f'{2 * num_axes}, not {width}'
        )
    return width // num_axes


def resize_learned(
    params: Mapping[str, Array], grid: Shape, method: str = 'cubic'
) -> dict[str, Array]:
    """Learned positions for another grid, for images of another size.

    "An Image is Worth 16x16 Words", arXiv 2010.11929, section 3.2.

    Args:
      params: of a learned `PositionEmbedding`: grid `[*grid, D]` and, where tokens
        precede the grid's, prefix `[P, D]`, which stays.
      grid: the new grid, of as many axes.
      method: of `jax.image.resize`: 'cubic', 'linear', 'nearest'.

    Returns:
      The parameters for `grid`; the very same where it is the old one.

    Raises:
      UserError: when the grids differ in rank, or one is empty.

    >>> params = {'grid': jnp.ones((4, 9, 8)), 'prefix': jnp.ones((2, 8))}
    >>> jax.tree.map(jnp.shape, resize_learned(params, (6, 7)))
    {'grid': (6, 7, 8), 'prefix': (2, 8)}
    """
    table = params['grid']
    *old, width = table.shape
    if len(old) != len(grid):
        raise UserError(
            f'learned positions of a grid {times(old)} cannot be resized to '
            f'{times(grid)}: the axes differ in number'
        )
    if min(grid) <= 0:
        raise UserError(f'a grid has lengths above 0, not {times(grid)}')
    table = jax.image.resize(table, (*grid, width), method)  # the same where equal
    return {**params, 'grid': table}


# Encodings of tokens numbered in a row, whatever the grid.
_BY_NUMBER: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    'integer': integer,
    'normalized': normalized,
    'binary': binary,
    'sine': sine,
    'sincos1d': sincos,
}
_BY_AXIS = {'sincos2d': 2, 'sincos3d': 3}  # number of axes
POSEMBS = ('learned', *_BY_NUMBER, *_BY_AXIS, 'none')


def fixed_positions(kind: str, grid: Shape, width: int) -> np.ndarray:
    """The encoding `[T, D]` of a grid by name, see `PositionEmbedding`."""
    if kind in _BY_NUMBER:
        return _BY_NUMBER[kind](np.arange(math.prod(grid)), width)
    if kind not in _BY_AXIS:
        raise unknown('position embedding', kind, POSEMBS)
    if len(grid) != _BY_AXIS[kind]:
        raise UserError(
            f'position embedding {kind!r} is for grids of {_BY_AXIS[kind]} axes, not '
            f'{times(grid)}; use {f"sincos{len(grid)}d"!r}'
        )
    return sincos_grid(grid, width)


class PositionEmbedding(nn.Module):
    """Adds an embedding of its position to every token.

    Learned embeddings of the grid are stored as `[*grid, D]`, not as a list: a 4x9
    grid cannot be mistaken for a 6x6 one.

    Attributes:
      kind: 'learned'; for tokens numbered in a row 'integer', 'normalized', 'binary',
        'sine' or 'sincos1d'; 'sincos2d' and 'sincos3d' (a share of the width for each
        axis of the grid); or 'none'.
      embedding_init: initializer of the learned embeddings.
    """

    kind: str = 'learned'
    embedding_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: Array, grid: Shape) -> Array:
        """Adds the embeddings.

        Args:
          x: `[B, P + T, D]`: P prefix tokens (a class token), then the grid's.
          grid: lengths of the grid's axes, T their product.

        Returns:
          `[B, P + T, D]`. Fixed embeddings leave prefix tokens as they are, learned
          ones have a row for each.

        Raises:
          UserError: for an unknown `kind`, a width it cannot fill, or a grid that is
            not that of the learned embeddings.

        >>> tokens = jnp.zeros((2, 1 + 15, 8))  # a class token and a grid of 3x5
        >>> module = PositionEmbedding('sincos2d')
        >>> out = module.apply({}, tokens, grid=(3, 5))
        >>> out.shape, float(abs(out[:, 0]).max())
        ((2, 16, 8), 0.0)
        """
        if x.ndim != 3 or x.shape[1] < math.prod(grid):
            raise UserError(
                f'positions are added to tokens [B, P + T, D], T those of a grid of '
                f'{times(grid)}; got {x.shape}'
            )
        num_tokens, width = x.shape[1:]
        num_prefix = num_tokens - math.prod(grid)
        if self.kind == 'none':
            return x
        if self.kind == 'learned':
            self._check_learned(grid, num_prefix)
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
        posemb = fixed_positions(self.kind, grid, width)
        return x + jnp.asarray(np.pad(posemb, ((num_prefix, 0), (0, 0))), x.dtype)

    def _check_learned(self, grid: Shape, num_prefix: int) -> None:
        """Raises UserError for parameters of another grid, or of other tokens."""
        if not self.has_variable('params', 'grid'):
            return
        expected: Shape = self.get_variable('params', 'grid').shape[:-1]
        if expected != tuple(grid):
            raise UserError(
                f'the model has learned positions for a grid of {times(expected)} '
                f'patches; this input has {times(grid)}'
            )
        prefix = self.variables['params'].get('prefix', ())
        if len(prefix) != num_prefix:
            raise UserError(
                f'the model has learned positions for {len(prefix)} tokens before the '
                f'grid; this input has {num_prefix}'
            )
