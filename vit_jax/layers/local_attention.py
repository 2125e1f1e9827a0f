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
from vit_jax.layers.conv_attention import average_pool, check_feature_map, unscaled
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
      UserError: for an even k or H, or tables that do not suit the queries.

    >>> x, table = jnp.ones((2, 4, 9, 3, 8)), jnp.ones((5, 3, 4))
    >>> local_attention(x, x, x, table, table).shape
    (2, 4, 9, 3, 8)
    """
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
        return weight[:, :, None] * _shift(padded, offset, value.shape)

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


def _check_tables(query: Array, row_table: Array, column_table: Array) -> None:
    *_, heads, size = query.shape
    kernel_size = len(row_table)
    if kernel_size % 2 == 0:
        raise UserError(
            f'local attention needs an odd kernel_size, whose middle is the position '
            f'itself, not {kernel_size}'
        )
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
          UserError: for a wrong rank, an even `kernel_size`, or heads that do not fit.

        >>> x = jnp.ones((2, 3, 5, 16))
        >>> layer = LocalAttention(features=32, strides=2, kernel_size=3)
        >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), x)[0].shape
        (2, 2, 3, 32)
        """
        del train
        check_feature_map(self, x, self.strides)
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


class SpatialValues(nn.Module):
    """Values by a linear map that depends on the place: sum_m p(a, b, m) W_m x.

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
        mixture = (self.num_mixtures, self.embedding_dim)
        weights = mixture_weights(
            self.param('rows', init, place, jnp.float32),
            self.param('columns', init, place, jnp.float32),
            self.param('mixtures', init, mixture, jnp.float32),
        )
        # Mixing the maps, not their outputs, leaves one of each image's size.
        weights = weights.reshape(-1, self.num_mixtures)
        kernel = jnp.einsum('TM,MDF->TDF', weights, kernel)
        return jnp.einsum('XTD,TDF->XTF', *(y.astype(self.dtype) for y in (x, kernel)))


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
        batch, num_rows, num_cols, channels = x.shape
        side = self.kernel_size
        if side <= 0 or num_rows % side or num_cols % side:
            raise UserError(
                f'AttentionStem of {side}x{side} blocks does not divide the image '
                f'{times((num_rows, num_cols))}; change the image size or kernel_size'
            )
        check_channels(self, 'value', channels)
        head_dim = resolve_head_dim(self.features, self.num_heads, None)

        grid = (batch, num_rows // side, side, num_cols // side, side)
        blocks = x.reshape(*grid, channels).swapaxes(2, 3)
        blocks = blocks.reshape(-1, side * side, channels)
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
        value = value.reshape(query.shape)
        out = dot_product_attention(unscaled(query), key, value)
        out = out.reshape(batch, grid[1], grid[3], side, side, self.features)
        return out.swapaxes(2, 3).reshape(*x.shape[:3], self.features)
