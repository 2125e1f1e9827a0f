"""Stand-alone local attention: every position attends to its k x k neighbours.

"Stand-Alone Self-Attention in Vision Models", arXiv 1906.05909. Equation 3, for a
position i, its neighbours j and their offset (dy, dx):

    out_i = sum_j softmax_j(q_i . k_j + q_i . r(dy, dx)) v_j

without scaling, where the first half of r is an embedding of dy and the second one
of dx. The sum is over the neighbours that exist: the image ends at its borders.

A loop over the k^2 offsets shifts the whole map at a time, and a step is computed
again in the backward pass rather than stored. So O(T k^2) memory holds the logits of
T positions, and only O(T) the shifted maps; forward and backward took 38 ms on two
CPU cores for a map [2, 28, 28, 64] with k = 7, where the same loop unrolled took 212
ms, and gathered neighbourhoods, which need k^2 maps, 186 ms.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError, times
from vit_jax.layers.attention import (
    dot_product_attention,
    project_heads,
    resolve_head_dim,
)
from vit_jax.layers.conv import check_feature_map
from vit_jax.layers.conv_attention import average_pool, grid_of, unscaled
from vit_jax.layers.patch import check_channels
from vit_jax.typing import Array, Dtype, Grid, Initializer, PRNGKey


def local_attention(
    query: Array, key: Array, value: Array, row_table: Array, column_table: Array
) -> Array:
    """Attention to the k x k neighbours of each position.

    Args:
      query, key, value: `[B, R, C, N, H]`, H even.
      row_table: `[k, N, H / 2]`, k odd, for the offsets (key minus query) of rows
        -(k - 1) / 2, ..., (k - 1) / 2.
      column_table: `[k, N, H / 2]`, for those of columns.

    Returns:
      `[B, R, C, N, H]`, in the dtype of `value`.

    Raises:
      UserError: for an even k or H, or shapes that do not suit each other.

    >>> x, table = jnp.ones((2, 4, 9, 3, 8)), jnp.ones((5, 3, 4))
    >>> local_attention(x, x, x, table, table).shape
    (2, 4, 9, 3, 8)
    """
    _check_maps(query, key, value)
    weights = local_weights(query, key, row_table, column_table)
    return apply_local_weights(weights, value)


def local_weights(
    query: Array, key: Array, row_table: Array, column_table: Array
) -> Array:
    """The weights of `local_attention`; arguments as there.

    Returns:
      `[k * k, B, N, R, C]`, offsets row by row, 0 for neighbours outside of the map;
      float32 (float64 where the query is).
    """
    _check_maps(query, key)
    _check_tables(query, row_table, column_table)
    kernel_size, _, half = row_table.shape
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    query, key = _heads_first(query), _heads_first(key)

    def position_logits(query: Array, table: Array) -> Array:
        table = table.astype(query.dtype)
        return jnp.einsum(
            'BNHRC,KNH->KBNRC', query, table, preferred_element_type=dtype
        )

    by_row = position_logits(query[:, :, :half], row_table)
    by_col = position_logits(query[:, :, half:], column_table)
    bias = by_row[:, None] + by_col[None, :]

    wide_query, padded = query.astype(dtype), _pad(key, kernel_size)

    @partial(jax.checkpoint, prevent_cse=False)  # in a loop, nothing to merge
    def content_logits(offset: Array) -> Array:
        neighbour = _shift(padded, offset, query.shape)
        with jax.named_scope('multiply_adds'):  # for `summary`
            return jnp.sum(wide_query * neighbour, axis=2)

    logits = jax.lax.map(content_logits, _offsets(kernel_size))
    logits = logits + bias.reshape(logits.shape)
    keep = _inside((query.shape[3], query.shape[4]), kernel_size)[:, None, None]
    # The position itself is always inside: no row is empty.
    return jax.nn.softmax(jnp.where(keep, logits, jnp.finfo(dtype).min), axis=0)


def apply_local_weights(weights: Array, value: Array) -> Array:
    """Averages the neighbours' `value` `[B, R, C, N, H]` by `local_weights`."""
    dtype = value.dtype
    value = _heads_first(value)
    kernel_size = round(len(weights) ** 0.5)
    padded = _pad(value, kernel_size)

    @partial(jax.checkpoint, prevent_cse=False)
    def term(offset: Array, weight: Array) -> Array:
        neighbour = _shift(padded, offset, value.shape)
        with jax.named_scope('multiply_adds'):
            return weight[:, :, None] * neighbour

    def add(total: Array, step: tuple[Array, Array]) -> tuple[Array, None]:
        return total + term(*step), None

    start = jnp.zeros(value.shape, jnp.promote_types(weights.dtype, dtype))
    total, _ = jax.lax.scan(add, start, (_offsets(kernel_size), weights))
    return jnp.moveaxis(total, (1, 2), (3, 4)).astype(dtype)


def dense_local_weights(weights: Array) -> Array:
    """`local_weights` on the whole map, `[B, N, R, C, R', C']`: to look at."""
    _, batch, heads, *grid = weights.shape
    kernel_size = round(len(weights) ** 0.5)
    offset, row, col = np.nonzero(_inside((grid[0], grid[1]), kernel_size))
    down, right = np.divmod(offset, kernel_size) - np.array(kernel_size // 2)
    present = jnp.moveaxis(weights[offset, :, :, row, col], 0, -1)
    dense = jnp.zeros((batch, heads, *grid, *grid), weights.dtype)
    return dense.at[:, :, row, col, row + down, col + right].set(present)


def _heads_first(x: Array) -> Array:
    """`[B, R, C, N, H]` -> `[B, N, H, R, C]`: shifts then move whole rows."""
    return jnp.moveaxis(x, (3, 4), (1, 2))


def _pad(x: Array, kernel_size: int) -> Array:
    margin = (kernel_size // 2, kernel_size // 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), margin, margin))


def _shift(padded: Array, offset: Array, shape: tuple[int, ...]) -> Array:
    """The neighbours at one offset, of the whole map."""
    return jax.lax.dynamic_slice(padded, (0, 0, 0, offset[0], offset[1]), shape)


def _offsets(kernel_size: int) -> Array:
    """`[k * k, 2]`, row by row, counted from the first neighbour."""
    return jnp.stack(jnp.divmod(jnp.arange(kernel_size**2), kernel_size), axis=1)


def _inside(grid: Grid, kernel_size: int) -> np.ndarray:
    """Whether the neighbour at each offset exists, `[k * k, R, C]`."""
    steps = np.arange(kernel_size) - kernel_size // 2
    rows, cols = (
        (steps[:, None] + np.arange(n) >= 0) & (steps[:, None] + np.arange(n) < n)
        for n in grid
    )
    inside = rows[:, None, :, None] & cols[None, :, None, :]
    return inside.reshape(kernel_size**2, *grid)


def _check_maps(query: Array, *others: Array) -> None:
    if query.ndim != 5 or any(x.shape != query.shape for x in others):
        shapes = ', '.join(str(x.shape) for x in (query, *others))
        raise UserError(
            'local attention takes query, key and value of one shape '
            f'[B, R, C, N, H]; got {shapes}'
        )


def _check_kernel_size(kernel_size: int) -> None:
    if kernel_size <= 0 or kernel_size % 2 == 0:
        raise UserError(
            'local attention needs an odd kernel_size above 0, whose middle is the '
            f'position itself, not {kernel_size}'
        )


def _check_tables(query: Array, row_table: Array, column_table: Array) -> None:
    *_, heads, size = query.shape
    kernel_size = len(row_table)
    _check_kernel_size(kernel_size)
    if size % 2:
        raise UserError(
            'local attention shares the size of a head between rows and columns: it '
            f'must be even, not {size}'
        )
    expected = (kernel_size, heads, size // 2)
    if row_table.shape != expected or column_table.shape != expected:
        raise UserError(
            f'local attention of {heads} heads of size {size} needs tables of shape '
            f'{expected}; got {row_table.shape} and {column_table.shape}'
        )


class LocalAttention(nn.Module):
    """Multi-head local attention in the place of a convolution.

    Sections 2.2 and 3.1 of the paper: a neighbourhood of 7x7, 8 heads, and 2x2
    average pooling of stride 2 where a convolution has that stride. Queries, keys
    and values are full linear maps, with which ResNet-50 has its published 18.0M
    parameters; the row and column embeddings of all heads have `features` / 2 numbers
    each, shared out to the heads.

    The weights are sown as `intermediates/attention_weights` `[B, N, R, C, R', C']`,
    0 outside of the neighbourhood, when the caller makes that collection mutable.

    Attributes:
      features: channels of the output.
      strides: of the average pooling behind the attention.
      num_heads: heads; `features` must be a multiple of twice as many.
      kernel_size: k, odd: side of the neighbourhood.
      kernel_init: initializer of the linear maps, which have no biases.
      dtype: dtype of the computation; parameters are float32.
    """

    features: int
    strides: int = 1
    num_heads: int = 8
    kernel_size: int = 7
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Lets every position attend to its neighbours.

        Args:
          x: `[B, R, C, D]`, of any size.
          train: changes nothing.

        Returns:
          `[B, ceil(R / strides), ceil(C / strides), features]`.

        Raises:
          UserError: for a wrong rank, a `kernel_size` that is not odd and above 0, or
            heads that do not fit.

        >>> x = jnp.ones((2, 3, 5, 16))
        >>> layer = LocalAttention(features=32, strides=2, kernel_size=3)
        >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), x)[0].shape
        (2, 2, 3, 32)
        """
        del train
        check_feature_map(self, x, self.strides)
        _check_kernel_size(self.kernel_size)
        head_dim = resolve_head_dim(self.features, self.num_heads, None)
        query, key, value = (
            project_heads(
                self.num_heads,
                head_dim,
                kernel_init=self.kernel_init,
                use_bias=False,
                dtype=self.dtype,
                name=name,
            )(x)
            for name in ('query', 'key', 'value')
        )
        shape = (self.kernel_size, self.num_heads, head_dim // 2)
        init = nn.initializers.normal(head_dim**-0.5)
        tables = (
            self.param(name, init, shape, jnp.float32) for name in ('rows', 'columns')
        )
        weights = local_weights(query, key, *tables)
        if self.is_mutable_collection('intermediates'):
            dense = dense_local_weights(weights)
            self.sow('intermediates', 'attention_weights', dense)
        out = apply_local_weights(weights, value)
        return average_pool(out.reshape(*x.shape[:3], self.features), self.strides)


def mixture_weights(rows: Array, columns: Array, mixtures: Array) -> Array:
    """p(a, b, m) = softmax over m of (rows[a] + columns[b]) . mixtures[m].

    Section 3.2 of the paper.

    Args:
      rows, columns: `[k, E]`, embeddings of the place in a k x k block.
      mixtures: `[M, E]`.

    Returns:
      `[k, k, M]`, in float32.
    """
    place = rows[:, None] + columns[None, :]
    return jax.nn.softmax(jnp.einsum('abE,mE->abm', place, mixtures), axis=-1)


def spatial_values(blocks: Array, kernel: Array, mixture: Array) -> Array:
    """A linear map that depends on the place: sum_m p(a, b, m) W_m x.

    Section 3.2 of the paper.

    Args:
      blocks: `[X, k * k, D]`, the pixels of each block, row by row.
      kernel: `[M, D, F]`, the W.
      mixture: `[k, k, M]`, the p of `mixture_weights`.

    Returns:
      `[X, k * k, F]`, in the dtype of `blocks`.

    >>> blocks, kernel, mixture = map(jnp.ones, [(6, 4, 3), (5, 3, 8), (2, 2, 5)])
    >>> spatial_values(blocks, kernel, mixture).shape
    (6, 4, 8)
    """
    # Mixing the maps, not their outputs, leaves one of each image's size.
    kernel = jnp.einsum('TM,MDF->TDF', mixture.reshape(-1, len(kernel)), kernel)
    return jnp.einsum('XTD,TDF->XTF', blocks, kernel.astype(blocks.dtype))


def to_blocks(x: Array, side: int) -> Array:
    """Cuts a map into blocks: `[B, R, C, D]` -> `[X, k * k, D]`, all row by row.

    >>> to_blocks(jnp.arange(8).reshape(1, 2, 4, 1), 2)[..., 0]
    Array([[0, 1, 4, 5],
           [2, 3, 6, 7]], dtype=int32)
    """
    batch, rows, cols, channels = x.shape
    x = x.reshape(batch, rows // side, side, cols // side, side, channels)
    return x.swapaxes(2, 3).reshape(-1, side * side, channels)


def from_blocks(blocks: Array, side: int, grid: Grid) -> Array:
    """The map `[B, R, C, D]` that `to_blocks` cut."""
    rows, cols = grid
    x = blocks.reshape(-1, rows // side, cols // side, side, side, blocks.shape[-1])
    return x.swapaxes(2, 3).reshape(-1, rows, cols, blocks.shape[-1])


class SpatialValues(nn.Module):
    """`spatial_values` with its parameters.

    Attributes:
      features: channels of the values.
      kernel_size: k, side of a block.
      num_mixtures: M, linear maps to mix.
      embedding_dim: E, size of the embeddings that p comes from.
      kernel_init: initializer of the linear maps.
      dtype: dtype of the computation; parameters are float32.
    """

    features: int
    kernel_size: int
    num_mixtures: int
    embedding_dim: int
    kernel_init: Initializer
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Args: x, blocks `[X, k * k, D]`. Returns `[X, k * k, features]`.

        >>> module = SpatialValues(features=8, kernel_size=2, num_mixtures=3,
        ...     embedding_dim=5, kernel_init=nn.initializers.lecun_normal(),
        ...     dtype=jnp.float32)
        >>> blocks = jnp.ones((6, 4, 3))
        >>> module.init_with_output(jax.random.key(0), blocks)[0].shape
        (6, 4, 8)
        """

        def init_kernels(rng: PRNGKey) -> Array:
            shape = (x.shape[-1], self.features)
            rngs = jax.random.split(rng, self.num_mixtures)
            return jnp.stack([self.kernel_init(r, shape, jnp.float32) for r in rngs])

        kernel = self.param('kernel', init_kernels)
        # At the start the exponents of p have a variance of 2, whatever E is.
        init = nn.initializers.normal(self.embedding_dim**-0.25)
        place = (self.kernel_size, self.embedding_dim)
        choice = (self.num_mixtures, self.embedding_dim)
        mixture = mixture_weights(
            self.param('rows', init, place, jnp.float32),
            self.param('columns', init, place, jnp.float32),
            self.param('mixtures', init, choice, jnp.float32),
        )
        return spatial_values(x.astype(self.dtype), kernel, mixture)


class AttentionStem(nn.Module):
    """Attention within k x k blocks of pixels: the spatially-aware stem.

    Section 3.2 of the paper. Pixels say little by themselves, so the value of one
    depends on its place in the block (`SpatialValues`); p is shared by the heads,
    and the logits are q . k alone. The blocks are the windows of the max pooling
    that follows in the network, k x k with a stride of k behind a norm: that is left
    to the caller. The paper gives k = 4; number of mixtures and size of their
    embeddings (that of a head) are this project's choice. The weights are not sown:
    on the grid of an image they would be far too many.

    Attributes:
      features: channels of the output.
      kernel_size: k, side of a block, odd or even.
      num_heads: heads; must divide `features`.
      num_mixtures: linear maps that the values are mixed from.
      kernel_init: initializer of the linear maps, which have no biases.
      dtype: dtype of the computation; parameters are float32.
    """

    features: int
    kernel_size: int = 4
    num_heads: int = 8
    num_mixtures: int = 4
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Lets the pixels of each block attend to each other.

        Args:
          x: `[B, R, C, D]`, R and C multiples of k.
          train: changes nothing.

        Returns:
          `[B, R, C, features]`.

        Raises:
          UserError: for a wrong rank, blocks that do not divide the image, channels
            that are not those of the parameters, or heads that do not fit.

        >>> x = jnp.ones((2, 8, 12, 3))
        >>> layer = AttentionStem(features=16)
        >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), x)[0].shape
        (2, 8, 12, 16)
        """
        del train
        check_feature_map(self, x)
        side, grid = self.kernel_size, grid_of(x)
        if side <= 0 or any(length % side for length in grid):
            raise UserError(
                f'AttentionStem of {side}x{side} blocks does not divide the image '
                f'{times(grid)}; change the image size or kernel_size'
            )
        check_channels(self, 'value', x.shape[-1])
        head_dim = resolve_head_dim(self.features, self.num_heads, None)

        blocks = to_blocks(x, side)
        linear = {'kernel_init': self.kernel_init, 'dtype': self.dtype}
        query, key = (
            project_heads(
                self.num_heads, head_dim, use_bias=False, name=name, **linear
            )(blocks)
            for name in ('query', 'key')
        )
        value = SpatialValues(
            self.features, side, self.num_mixtures, head_dim, name='value', **linear
        )(blocks)
        out = dot_product_attention(unscaled(query), key, value.reshape(key.shape))
        return from_blocks(out.reshape(value.shape), side, grid)
