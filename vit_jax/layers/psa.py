"""Gated positional self-attention (GPSA), the layer of ConViT.

"ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
arXiv 2103.10697, equations 6 to 9. For tokens i, j on a grid and their offset
delta = j - i = (dx, dy), each head mixes content and position by a learned gate:

    A = (1 - sigmoid(gating)) softmax(q k^T / sqrt(H))
        + sigmoid(gating) softmax(v1 dx + v2 dy + v3 (dx^2 + dy^2))

Three facts make this as cheap as plain attention, and exact:

1. Both softmaxes have rows that sum to one, so A has too: nothing is renormalised.
2. A v = (1 - g) attention(q, k, v) + g P v. The content half is plain attention,
   for which any fused kernel serves; the position half P has no batch axis.
3. The exponent is a sum of a part in dx and a part in dy, so the softmax over the
   grid is the product of two one-dimensional softmaxes, P = P_rows (x) P_columns,
   and P v takes two small contractions. No T x T position matrix exists.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError, unknown
from vit_jax.layers.attention import (
    apply_weights,
    attention_weights,
    dot_product_attention,
    merge_heads,
    needs_weights,
    project_heads,
    resolve_head_dim,
)
from vit_jax.layers.stochastic import Dropout
from vit_jax.typing import Array, Dtype, Grid, Initializer

GPSA_IMPLS = ('auto', 'factored', 'split', 'dense')


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


def positional_weights(kernel: Array, bias: Array | None, grid: Grid) -> Array:
    """softmax over keys of the position scores: the matrix P, whole.

    Args:
      kernel: `[3, N]`, the v of the features (dx, dy, dx^2 + dy^2).
      bias: `[N]` or None. The softmax cancels it; published models carry it.
      grid: (rows, columns).

    Returns:
      `[N, T, T]`.
    """
    # Squared distances do not fit the short mantissas of fast matrix units.
    logits = jnp.einsum(
        'TSF,FN->NTS', relative_positions(grid), kernel, precision='highest'
    )
    if bias is not None:
        logits = logits + bias[:, None, None]
    return jax.nn.softmax(logits, axis=-1)


def positional_factors(kernel: Array, grid: Grid) -> tuple[Array, Array]:
    """P as a Kronecker product: P[(r, c), (s, d)] = rows[r, s] * columns[c, d].

    Args:
      kernel: `[3, N]`, the v of the features (dx, dy, dx^2 + dy^2).
      grid: (rows, columns).

    Returns:
      `[N, R, R]` and `[N, C, C]`, each with rows that sum to one.
    """
    linear_x, linear_y, square = kernel[:, :, None, None]

    def weights(linear: Array, length: int) -> Array:
        delta = np.arange(length)[None, :] - np.arange(length)[:, None]
        delta = delta.astype(np.float32)
        return jax.nn.softmax(linear * delta + square * delta**2, axis=-1)

    rows, cols = grid
    return weights(linear_y, rows), weights(linear_x, cols)


def gated_positional_attention(
    query: Array,
    key: Array,
    value: Array,
    kernel: Array,
    bias: Array | None,
    gating: Array,
    grid: Grid,
    *,
    impl: str = 'auto',
    attention_impl: str = 'auto',
) -> Array:
    """Attention whose heads mix content and position by their gates.

    Args:
      query, key, value: `[B, T, N, H]`, T = rows * columns of the grid.
      kernel, bias: `[3, N]` and `[N]` or None, see `positional_weights`.
      gating: `[N]`, before the sigmoid.
      grid: (rows, columns).
      impl: 'factored' (fact 3 above), 'split' (fact 2), 'dense' (the whole A; the
        others' reference) or 'auto' (chosen from `benchmark gpsa`).
      attention_impl: `impl` of the content half, see `dot_product_attention`.

    Returns:
      `[B, T, N, H]`, in the dtype of `query`.

    Raises:
      UserError: for an unknown `impl`, or T tokens that do not fill the grid.
    """
    check_grid(query.shape[1], grid)
    if impl == 'auto':
        impl = 'factored'
    if impl == 'dense':
        return apply_weights(
            gpsa_weights(query, key, kernel, bias, gating, grid), value
        )
    # The gates scale the values, not the outputs: the two outputs need not be kept
    # for the backward pass.
    gate = jax.nn.sigmoid(gating)
    by_position, by_content = (_scale_heads(value, g) for g in (gate, 1.0 - gate))
    if impl == 'factored':
        position = _apply_factors(positional_factors(kernel, grid), by_position, grid)
    elif impl == 'split':
        weights = positional_weights(kernel, bias, grid).astype(value.dtype)
        position = jnp.einsum('NTS,BSNH->BTNH', weights, by_position)
    else:
        raise unknown('GPSA impl', impl, GPSA_IMPLS)
    return position + dot_product_attention(query, key, by_content, impl=attention_impl)


def gpsa_weights(
    query: Array,
    key: Array,
    kernel: Array,
    bias: Array | None,
    gating: Array,
    grid: Grid,
) -> Array:
    """The matrix A of GPSA, `[B, N, T, T]`; arguments as above."""
    check_grid(query.shape[1], grid)
    content = attention_weights(query, key)
    position = positional_weights(kernel, bias, grid)
    gate = jax.nn.sigmoid(gating)[:, None, None]
    return (1.0 - gate) * content + gate * position


def _scale_heads(value: Array, scale: Array) -> Array:
    """`value` `[B, T, N, H]` times `scale` `[N]`.

    One scale per feature, over rows of features: XLA's CPU backend sums the gradient
    of `scale` much faster in this form than over `[B, T, N, H]` to `[N]`.
    """
    *_, heads, size = value.shape
    features = value.reshape(-1, heads * size) * jnp.repeat(scale, size)
    return features.reshape(value.shape).astype(value.dtype)


def _apply_factors(factors: tuple[Array, Array], value: Array, grid: Grid) -> Array:
    """P v by its factors, `[B, T, N, H]`."""
    rows, cols = (weights.astype(value.dtype) for weights in factors)
    batch, _, heads, size = value.shape
    num_rows, num_cols = grid
    # Heads first and all but the grid in one axis, X = B * H: both contractions, and
    # their gradients, are then products of small squares with wide matrices.
    v = value.reshape(batch, *grid, heads, size).transpose(3, 1, 2, 0, 4)
    v = v.reshape(heads, *grid, batch * size)
    cols = jnp.broadcast_to(cols[:, None], (heads, num_rows, num_cols, num_cols))
    v = jnp.einsum('NSCD,NSDX->NSCX', cols, v)
    v = jnp.einsum('NRS,NSX->NRX', rows, v.reshape(heads, num_rows, -1))
    return v.reshape(heads, -1, batch, size).transpose(2, 1, 0, 3)


def check_grid(num_tokens: int, grid: Grid) -> None:
    """Raises UserError unless `num_tokens` tokens fill the grid."""
    rows, cols = grid
    if rows * cols != num_tokens:
        raise UserError(
            f'{num_tokens} tokens do not fill a grid of {rows}x{cols} = {rows * cols}; '
            'GPSA takes the grid (rows, columns) of its tokens, without class token'
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
    side = math.isqrt(num_heads)
    if side**2 != num_heads:
        raise UserError(
            f'convolutional initialisation needs a square number of heads (4, 9, 16), '
            f'not {num_heads}; change num_heads or set local_init=False'
        )
    h2, h1 = np.divmod(np.arange(num_heads), side)
    centre_x, centre_y = h2 - (side - 1) / 2, h1 - (side - 1) / 2
    kernel = np.stack([2 * centre_x, 2 * centre_y, np.full(num_heads, -1.0)])
    return (locality_strength * kernel).astype(np.float32)


def identity_heads(rng: Array, shape: tuple[int, ...], dtype: Dtype) -> Array:
    """The value projection at the start: each head sees its own slice of the input."""
    del rng
    return jnp.eye(shape[0], math.prod(shape[1:]), dtype=dtype).reshape(shape)


class GPSA(nn.Module):
    """Gated positional self-attention over a grid of tokens.

    The weights are sown as `intermediates/attention_weights` `[B, N, T, T]` when
    the caller makes that collection mutable, and that pass computes them densely.

    Attributes:
      num_heads: heads; a square where `local_init`.
      grid: (rows, columns) of the tokens.
      local_init: start as a convolution: `conv_init`, and values the identity.
      locality_strength: sharpness of the convolutional start.
      qkv_bias: whether query, key and value have biases; the output always has.
      dropout_rate: dropout of the attention weights (dense computation).
      impl: see `gated_positional_attention`.
      attention_impl: `impl` of the content half.
      kernel_init: initializer of the linear maps that `local_init` leaves.
      dtype: dtype of the computation; parameters are float32.
    """

    num_heads: int
    grid: Grid
    local_init: bool = True
    locality_strength: float = 1.0
    qkv_bias: bool = False
    dropout_rate: float = 0.0
    impl: str = 'auto'
    attention_impl: str = 'auto'
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Lets the tokens of the grid attend to each other.

        Args:
          x: `[B, T, D]`, T = rows * columns, row by row, without class token.
          train: whether dropout is on.

        Returns:
          `[B, T, D]`.

        Raises:
          UserError: when T does not fill the grid, `num_heads` does not divide D,
            or the heads are no square and `local_init` is set.
        """
        width = x.shape[-1]
        head_dim = resolve_head_dim(width, self.num_heads, None)
        inits = {
            'query': self.kernel_init,
            'key': self.kernel_init,
            'value': identity_heads if self.local_init else self.kernel_init,
        }
        query, key, value = (
            project_heads(
                self.num_heads,
                head_dim,
                kernel_init=init,
                use_bias=self.qkv_bias,
                dtype=self.dtype,
                name=name,
            )(x)
            for name, init in inits.items()
        )
        kernel = self.param('position_kernel', self._init_position)
        bias = self.param(
            'position_bias', nn.initializers.zeros, (self.num_heads,), jnp.float32
        )
        gating = self.param(
            'gating', nn.initializers.ones, (self.num_heads,), jnp.float32
        )
        if needs_weights(self, self.dropout_rate, train):
            weights = gpsa_weights(query, key, kernel, bias, gating, self.grid)
            self.sow('intermediates', 'attention_weights', weights)
            weights = Dropout(self.dropout_rate, name='dropout')(weights, train=train)
            out = apply_weights(weights, value)
        else:
            out = gated_positional_attention(
                query,
                key,
                value,
                kernel,
                bias,
                gating,
                self.grid,
                impl=self.impl,
                attention_impl=self.attention_impl,
            )
        return merge_heads(
            width, kernel_init=self.kernel_init, dtype=self.dtype, name='out'
        )(out)

    def _init_position(self, rng: Array) -> Array:
        if self.local_init:
            return jnp.asarray(conv_init(self.num_heads, self.locality_strength))
        return self.kernel_init(rng, (3, self.num_heads))
