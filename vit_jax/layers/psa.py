"""Positional self-attention, plain (PSA) and gated (GPSA, the layer of ConViT).

"ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
arXiv 2103.10697, equations 4 to 9. For tokens i, j on a grid and their offset
delta = j - i = (dx, dy), a head of PSA adds a score of the offset to that of the
content, and with enough heads it can compute any convolution (`psa_from_conv`):

    A = softmax(q k^T / sqrt(H) + v r)

A head of GPSA mixes content and position by a learned gate:

    A = (1 - sigmoid(gating)) softmax(q k^T / sqrt(H))
        + sigmoid(gating) softmax(v1 dx + v2 dy + v3 (dx^2 + dy^2))

Three facts make GPSA as cheap as plain attention, and exact:

1. Both softmaxes have rows that sum to one, so A has too: nothing is renormalised.
2. A v = (1 - g) attention(q, k, v) + g P v. The content half is plain attention,
   for which any fused kernel serves; the position half P has no batch axis.
3. The exponent is a sum of a part in dx and a part in dy, so the softmax over the
   grid is the product of two one-dimensional softmaxes, P = P_rows (x) P_columns,
   and P v takes two small contractions. No T x T position matrix exists.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError, times, unknown
from vit_jax.layers.attention import (
    apply_weights,
    attention_weights,
    dot_product_attention,
    merge_heads,
    needs_weights,
    project_heads,
    resolve_head_dim,
)
from vit_jax.layers.relative import (
    check_tokens,
    conv_init,
    offset_logits,
    positional_factors,
    positional_logits,
    positional_weights,
)
from vit_jax.layers.stochastic import Dropout
from vit_jax.typing import Array, Dtype, Grid, Initializer, Shape

GPSA_IMPLS = ('auto', 'factored', 'split', 'dense')


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
        others' reference) or 'auto', which is 'factored' (see `benchmark gpsa`).
      attention_impl: `impl` of the content half, see `dot_product_attention`.

    Returns:
      `[B, T, N, H]`, in the dtype of `query`.

    Raises:
      UserError: for an unknown `impl`, or T tokens that do not fill the grid.
    """
    _check_inputs(query, key, value, kernel, bias, gating, grid)
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
    _check_inputs(query, key, key, kernel, bias, gating, grid)
    content = attention_weights(query, key)
    position = positional_weights(kernel, bias, grid)
    gate = jax.nn.sigmoid(gating)[:, None, None]
    return (1.0 - gate) * content + gate * position


def _check_inputs(
    query: Array,
    key: Array,
    value: Array,
    kernel: Array,
    bias: Array | None,
    gating: Array,
    grid: Grid,
) -> None:
    """Raises UserError for shapes that do not fit, which would broadcast."""
    if query.ndim != 4 or not query.shape == key.shape == value.shape:
        raise UserError(
            'GPSA takes query, key and value of one shape [B, T, N, H]; got '
            f'{query.shape}, {key.shape} and {value.shape}'
        )
    check_tokens(query[:, :, 0], grid)
    heads = query.shape[2]
    for name, x, shape in (
        ('kernel', kernel, (3, heads)),
        ('bias', bias, (heads,)),
        ('gating', gating, (heads,)),
    ):
        if x is not None and x.shape != shape:
            raise UserError(f'{name} of {heads} heads has shape {shape}; got {x.shape}')


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
    # Heads first, and all but the grid in one axis, X = B * H: both contractions, and
    # their gradients, are then products of small squares with wide matrices. Where
    # axes merge, the batch comes first: it may lie on many devices, and in any other
    # order they would have to gather it.
    v = value.reshape(batch, *grid, heads, size).transpose(3, 1, 0, 4, 2)
    v = v.reshape(heads, num_rows, batch * size, num_cols)
    v = jnp.einsum('NSXD,NCD->NSXC', v, cols)
    v = jnp.einsum('NRS,NSX->NRX', rows, v.reshape(heads, num_rows, -1))
    v = v.reshape(heads, num_rows, batch, size, num_cols).transpose(2, 1, 4, 0, 3)
    return v.reshape(value.shape)


def identity_heads(rng: Array, shape: tuple[int, ...], dtype: Dtype) -> Array:
    """The value projection at the start: each head sees its own slice of the input."""
    del rng
    return jnp.eye(shape[0], math.prod(shape[1:]), dtype=dtype).reshape(shape)


class PSA(nn.Module):
    """Positional self-attention over a grid of tokens (ConViT, equation 4).

    The weights are sown as `intermediates/attention_weights` `[B, N, T, T]` when
    the caller makes that collection mutable, and that pass computes them densely.

    Attributes:
      num_heads: heads; a square where `local_init`.
      grid: (rows, columns) of the tokens.
      head_dim: size per head; None for width / num_heads.
      out_dim: width of the output; None for that of the input.
      encoding: the r of an offset: 'quadratic', the features (dx, dy, dx^2 + dy^2),
        or 'table', a learned row of `table_dim` features per offset.
      table_dim: features of a row of the table.
      local_init: attend to a square of neighbours at the start, see `conv_init`.
      locality_strength: sharpness of that start.
      qkv_bias: whether query, key and value have biases; the output always has.
      dropout_rate: dropout of the attention weights (dense computation).
      impl: see `dot_product_attention`.
      kernel_init: initializer of the linear maps, of v and of the table.
      dtype: dtype of the computation; parameters are float32.
    """

    num_heads: int
    grid: Grid
    head_dim: int | None = None
    out_dim: int | None = None
    encoding: str = 'quadratic'
    table_dim: int = 8
    local_init: bool = False
    locality_strength: float = 1.0
    qkv_bias: bool = False
    dropout_rate: float = 0.0
    impl: str = 'auto'
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Lets the tokens of the grid attend to each other.

        Args:
          x: `[B, T, D]`, T = rows * columns, row by row, without class token.
          train: whether dropout is on.

        Returns:
          `[B, T, out_dim]`.

        Raises:
          UserError: when T does not fill the grid, `num_heads` does not divide D,
            `encoding` is unknown, `local_init` does not go with the heads or the
            encoding, or the grid is not that of the table.

        >>> layer = PSA(num_heads=2, grid=(3, 5), out_dim=4, encoding='table')
        >>> x = jnp.ones((2, 15, 8))
        >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
        (2, 15, 4)
        """
        width = x.shape[-1]
        check_tokens(x, self.grid)
        query, key, value = (
            project_heads(
                self.num_heads,
                resolve_head_dim(width, self.num_heads, self.head_dim),
                kernel_init=self.kernel_init,
                use_bias=self.qkv_bias,
                dtype=self.dtype,
                name=name,
            )(x)
            for name in ('query', 'key', 'value')
        )
        position = self._position_logits()[None]
        if needs_weights(self, self.dropout_rate, train):
            weights = attention_weights(query, key, bias=position)
            self.sow('intermediates', 'attention_weights', weights)
            weights = Dropout(self.dropout_rate, name='dropout')(weights, train=train)
            out = apply_weights(weights, value)
        else:
            out = dot_product_attention(
                query, key, value, bias=position, impl=self.impl
            )
        return merge_heads(
            width if self.out_dim is None else self.out_dim,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name='out',
        )(out)

    def _position_logits(self) -> Array:
        """v r of every pair of tokens, `[N, T, T]`."""
        if self.encoding == 'quadratic':
            kernel = self.param('position_kernel', self._init_position, 3)
            return positional_logits(kernel, None, self.grid)
        if self.encoding != 'table':
            raise unknown('PSA encoding', self.encoding, ('quadratic', 'table'))
        rows, cols = self.grid
        shape = (2 * rows - 1, 2 * cols - 1, self.table_dim)
        if self.has_variable('params', 'position_table'):
            stored: Shape = self.get_variable('params', 'position_table').shape
            if stored != shape:
                old = ((stored[0] + 1) // 2, (stored[1] + 1) // 2)
                raise UserError(
                    f'the position table has {stored[2]} features on a grid of '
                    f'{times(old)} tokens; this layer has {shape[2]} on '
                    f'{times(self.grid)}'
                )
        table = self.param('position_table', self.kernel_init, shape, jnp.float32)
        kernel = self.param('position_kernel', self._init_position, self.table_dim)
        return offset_logits(table @ kernel, self.grid)

    def _init_position(self, rng: Array, num_features: int) -> Array:
        if not self.local_init:
            return self.kernel_init(rng, (num_features, self.num_heads))
        if self.encoding != 'quadratic':
            raise UserError("local_init needs encoding='quadratic'")
        return jnp.asarray(conv_init(self.num_heads, self.locality_strength))


def psa_from_conv(
    kernel: Array, bias: Array | None = None, locality_strength: float = 100.0
) -> dict[str, Any]:
    """The parameters with which PSA computes a convolution of stride 1.

    Each of the K^2 heads attends to one offset of the kernel and carries all input
    channels there; the output map holds the kernel ("On the Relationship between
    Self-Attention and Convolutional Layers", arXiv 1911.03584, theorem 1). Where the
    offset leaves the image, the nearest token is attended to: the convolution is that
    of the image padded by its edges.

    Args:
      kernel: `[K, K, D, out_dim]`, K odd.
      bias: `[out_dim]`, or None for zeros.
      locality_strength: the weights on other offsets are exp(-strength) and less.

    Returns:
      The params of `PSA(num_heads=K * K, head_dim=D, out_dim=out_dim)` on any grid.

    Raises:
      UserError: for a kernel that is not square with an odd side.

    >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 5))
    >>> image = jax.random.normal(jax.random.key(1), (1, 4, 7, 2))
    >>> layer = PSA(num_heads=9, grid=(4, 7), head_dim=2, out_dim=5)
    >>> params = psa_from_conv(kernel)
    >>> out = layer.apply({'params': params}, image.reshape(1, 28, 2))
    >>> padded = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), mode='edge')
    >>> conv = nn.Conv(5, (3, 3), padding='VALID', use_bias=False)
    >>> expected = conv.apply({'params': {'kernel': kernel}}, padded)
    >>> bool(jnp.allclose(out.reshape(1, 4, 7, 5), expected, atol=1e-5))
    True
    """
    if kernel.ndim != 4 or kernel.shape[0] != kernel.shape[1]:
        raise UserError(
            f'psa_from_conv takes a kernel [K, K, in, out]; got {kernel.shape}'
        )
    side, _, width, out_dim = kernel.shape
    if side % 2 == 0:
        raise UserError(
            f'psa_from_conv needs a kernel of odd side, whose centre is a token; got '
            f'{side}x{side}'
        )
    if bias is not None and bias.shape != (out_dim,):
        raise UserError(
            f'a kernel with {out_dim} outputs takes a bias {(out_dim,)}; got '
            f'{bias.shape}'
        )
    heads = side**2
    nothing = {'kernel': jnp.zeros((width, heads, width), kernel.dtype)}
    everything = jnp.broadcast_to(
        jnp.eye(width, dtype=kernel.dtype)[:, None], (width, heads, width)
    )
    # Head h1 + K h2 attends to row h1 and column h2 of the kernel.
    out = jnp.swapaxes(kernel, 0, 1).reshape(heads, width, out_dim)
    return {
        'query': nothing,
        'key': nothing,
        'value': {'kernel': everything},
        'position_kernel': jnp.asarray(conv_init(heads, locality_strength)),
        'out': {
            'kernel': out,
            'bias': jnp.zeros(out_dim, kernel.dtype) if bias is None else bias,
        },
    }


class GPSA(nn.Module):
    """Gated positional self-attention over a grid of tokens.

    The weights are sown as `intermediates/attention_weights` `[B, N, T, T]` and the
    gates, after the sigmoid, as `intermediates/gates` `[N]` when the caller makes
    that collection mutable, and that pass computes the weights densely.

    Attributes:
      num_heads: heads; a square where `local_init`.
      grid: (rows, columns) of the tokens.
      local_init: start as a convolution: `conv_init`, and values the identity.
      locality_strength: sharpness of the convolutional start.
      gating_init: what the gates start as, before the sigmoid.
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
    gating_init: float = 1.0
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

        >>> layer = GPSA(num_heads=4, grid=(3, 5))
        >>> x = jnp.ones((2, 15, 8))
        >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
        (2, 15, 8)
        """
        width = x.shape[-1]
        check_tokens(x, self.grid)
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
        start = nn.initializers.constant(self.gating_init)
        gating = self.param('gating', start, (self.num_heads,), jnp.float32)
        self.sow('intermediates', 'gates', jax.nn.sigmoid(gating))
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
