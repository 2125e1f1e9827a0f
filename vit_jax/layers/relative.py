"""Relative positions on a grid of tokens, and attention by position alone.

A head that attends by position scores a key by its offset delta = (dx, dy) from the
query: v r, with trainable v. The encoding r is either the three features (dx, dy,
dx^2 + dy^2) of ConViT, with which a head can attend to any one offset, or free
(a learned table with a row per offset). "ConViT", arXiv 2103.10697, section 3; "On
the Relationship between Self-Attention and Convolutional Layers", arXiv 1911.03584.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError, times
from vit_jax.typing import Array, Grid

Tables = tuple[Array, Array]  # of rows [2R - 1, H], of columns [2C - 1, H]


def relative_positions(grid: Grid) -> np.ndarray:
    """The features (dx, dy, dx^2 + dy^2) of every pair, key minus query.

    Args:
      grid: (rows, columns); tokens are numbered row by row.

    Returns:
      `[T, T, 3]` float32, indexed by query, then key.

    >>> relative_positions((2, 3))[0, 5]
    array([2., 1., 5.], dtype=float32)
    """
    rows, cols = grid
    y, x = np.divmod(np.arange(rows * cols), cols)
    dx, dy = x[None, :] - x[:, None], y[None, :] - y[:, None]
    return np.stack([dx, dy, dx**2 + dy**2], axis=-1).astype(np.float32)


def positional_logits(kernel: Array, bias: Array | None, grid: Grid) -> Array:
    """v1 dx + v2 dy + v3 (dx^2 + dy^2) of every pair of tokens.

    Args:
      kernel: `[3, N]`, the v of the features (dx, dy, dx^2 + dy^2).
      bias: `[N]` or None.
      grid: (rows, columns).

    Returns:
      `[N, T, T]`, by query, then key.
    """
    by_row, by_col = _axis_logits(kernel, grid)
    # A row part and a column part: no constant of T x T entries in the program.
    logits = by_row[:, :, None, :, None] + by_col[:, None, :, None, :]
    logits = logits.reshape(logits.shape[0], math.prod(grid), math.prod(grid))
    return logits if bias is None else logits + bias[:, None, None]


def positional_weights(kernel: Array, bias: Array | None, grid: Grid) -> Array:
    """softmax over keys of the position scores: the matrix P, whole.

    Args:
      kernel: `[3, N]`, the v of the features (dx, dy, dx^2 + dy^2).
      bias: `[N]` or None. The softmax cancels it; published models carry it.
      grid: (rows, columns).

    Returns:
      `[N, T, T]`.
    """
    return jax.nn.softmax(positional_logits(kernel, bias, grid), axis=-1)


def positional_factors(kernel: Array, grid: Grid) -> tuple[Array, Array]:
    """P as a Kronecker product: P[(r, c), (s, d)] = rows[r, s] * columns[c, d].

    Args:
      kernel: `[3, N]`, the v of the features (dx, dy, dx^2 + dy^2).
      grid: (rows, columns).

    Returns:
      `[N, R, R]` and `[N, C, C]`, each with rows that sum to one.
    """
    by_row, by_col = _axis_logits(kernel, grid)
    return jax.nn.softmax(by_row, axis=-1), jax.nn.softmax(by_col, axis=-1)


def _axis_logits(kernel: Array, grid: Grid) -> tuple[Array, Array]:
    """v2 dy + v3 dy^2 and v1 dx + v3 dx^2 of each pair on an axis."""
    linear_x, linear_y, square = kernel[:, :, None, None]

    def logits(linear: Array, length: int) -> Array:
        delta = _offsets(length).astype(np.float32)
        return linear * delta + square * delta**2

    rows, cols = grid
    return logits(linear_y, rows), logits(linear_x, cols)


def _offsets(length: int) -> np.ndarray:
    """Key minus query of each pair on an axis, `[L, L]`."""
    return np.arange(length)[None, :] - np.arange(length)[:, None]


def offset_logits(scores: Array, grid: Grid) -> Array:
    """The scores of offsets, for every pair of tokens.

    Args:
      scores: `[2R - 1, 2C - 1, N]`: row R - 1 + dy, column C - 1 + dx for the offset
        (dx, dy), key minus query.
      grid: (rows, columns) = (R, C).

    Returns:
      `[N, T, T]`, by query, then key.

    >>> scores = jnp.arange(3.0).reshape(1, 3, 1)  # of dx = -1, 0, 1
    >>> offset_logits(scores, (1, 2))[0]
    Array([[1., 2.],
           [0., 1.]], dtype=float32)
    """
    rows, cols = grid
    scores = scores[_offsets(rows) + rows - 1]  # [R, R', 2C - 1, N]
    scores = scores[:, :, _offsets(cols) + cols - 1]  # [R, R', C, C', N]
    return scores.transpose(4, 0, 2, 1, 3).reshape(-1, rows * cols, rows * cols)


def relative_logits(
    query: Array, row_table: Array, column_table: Array, grid: Grid
) -> Array:
    """q_i . (rows[y_j - y_i] + columns[x_j - x_i]) for every pair of positions i, j.

    "Attention Augmented Convolutional Networks", section 3.1. All heads share the
    tables, whose middle row is the offset 0. The two axes meet in the result only:
    beside it, nothing has T x T entries.

    Args:
      query: `[B, T, N, H]`, T = R * C, row by row.
      row_table: `[2R - 1, H]`, for the offsets key minus query 1 - R, ..., R - 1.
      column_table: `[2C - 1, H]`.
      grid: (R, C).

    Returns:
      `[B, N, T, T]`, float32 (float64 where the query is). Nothing is scaled.

    Raises:
      UserError: for queries or tables that do not suit the grid.

    >>> query, rows, columns = map(jnp.ones, [(2, 15, 3, 7), (5, 7), (9, 7)])
    >>> relative_logits(query, rows, columns, (3, 5)).shape
    (2, 3, 15, 15)
    """
    batch, length, heads, size = query.shape
    tables = {'row': row_table, 'column': column_table}
    if length != grid[0] * grid[1]:
        raise UserError(f'{length} queries do not fill a grid of {times(grid)}')
    for (axis, table), n in zip(tables.items(), grid):
        if table.shape != (2 * n - 1, size):
            raise UserError(
                f'a grid of {times(grid)} and heads of size {size} need a {axis} table '
                f'of shape {(2 * n - 1, size)}; got {table.shape}'
            )
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    einsum = partial(jnp.einsum, preferred_element_type=dtype)
    query = query.reshape(batch, *grid, heads, size)
    rows, cols = (
        table[_offsets(n) + n - 1].astype(query.dtype)
        for table, n in zip(tables.values(), grid)
    )
    by_row = einsum('BRCNH,RSH->BNRCS', query, rows)
    by_col = einsum('BRCNH,CDH->BNRCD', query, cols)
    logits = by_row[..., :, None] + by_col[..., None, :]
    return logits.reshape(batch, heads, length, length)


class RelativePositions(nn.Module):
    """Learned tables of relative positions, one a row offset, one a column offset."""

    @nn.compact
    def __call__(self, grid: Grid, size: int) -> Tables:
        """Args: the grid, and H. Returns the tables that `relative_logits` takes.

        >>> import jax
        >>> tables, _ = RelativePositions().init_with_output(
        ...     jax.random.key(0), (3, 5), 8)
        >>> [table.shape for table in tables]
        [(5, 8), (9, 8)]
        """
        self._check_grid(grid)
        init = nn.initializers.normal(size**-0.5)
        rows, cols = (
            self.param(name, init, (2 * length - 1, size), jnp.float32)
            for name, length in zip(('rows', 'columns'), grid)
        )
        return rows, cols

    def _check_grid(self, grid: Grid) -> None:
        if not self.has_variable('params', 'rows'):
            return
        tables = self.variables['params']
        expected = tuple((len(tables[n]) + 1) // 2 for n in ('rows', 'columns'))
        if expected != tuple(grid):
            raise UserError(
                f'the model has relative positions for a map of {times(expected)}; '
                f'this input has {times(grid)}'
            )


def conv_init(num_heads: int, locality_strength: float = 1.0) -> np.ndarray:
    """Position weights with which k^2 heads attend to the k x k neighbours.

    Head h1 + k h2 is centred on the offset dy = h1 - (k - 1) / 2,
    dx = h2 - (k - 1) / 2: the exponent is -strength * |delta - centre|^2 up to a
    constant (ConViT, section 3, "convolutional initialisation").

    Args:
      num_heads: N, a square.
      locality_strength: how sharply a head attends to its centre.

    Returns:
      `[3, N]` float32.

    Raises:
      UserError: when `num_heads` is no square.

    >>> conv_init(9)[:, 0 + 3 * 2]
    array([ 2., -2., -1.], dtype=float32)
    """
    side = math.isqrt(max(num_heads, 0))
    if side == 0 or side**2 != num_heads:
        raise UserError(
            f'convolutional initialisation needs a square number of heads (4, 9, 16), '
            f'not {num_heads}; change num_heads or set local_init=False'
        )
    h2, h1 = np.divmod(np.arange(num_heads), side)
    centre_x, centre_y = h2 - (side - 1) / 2, h1 - (side - 1) / 2
    kernel = np.stack([2 * centre_x, 2 * centre_y, np.full(num_heads, -1.0)])
    return (locality_strength * kernel).astype(np.float32)


def check_tokens(x: Array, grid: Grid) -> None:
    """Raises UserError unless `x` is `[B, T, D]` and its T tokens fill the grid."""
    if x.ndim != 3:
        raise UserError(f'positional attention takes tokens [B, T, D]; got {x.shape}')
    if not isinstance(grid, tuple | list) or len(grid) != 2:
        raise UserError(f'the grid is (rows, columns) of the tokens, not {grid}')
    rows, cols = grid
    if rows * cols != x.shape[1]:
        raise UserError(
            f'{x.shape[1]} tokens do not fill a grid of {rows}x{cols} = {rows * cols}; '
            'the grid is (rows, columns) of the tokens, without class token'
        )
