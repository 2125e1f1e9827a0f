"""Attention inside CNNs: each module can stand where a 3x3 convolution stands.

A spatial block is a module with the fields `features` and `strides` that maps
`[B, R, C, D]` to `[B, ceil(R / strides), ceil(C / strides), features]`. Three are
here, whose every position sees the whole map; the local one has its own file.

    SAGANAttention   "Self-Attention Generative Adversarial Networks",
                     arXiv 1805.08318
    AugmentedConv    "Attention Augmented Convolutional Networks", arXiv 1904.09925
    GlobalAttention  "Bottleneck Transformers for Visual Recognition",
                     arXiv 2101.11605

Each sows its weights as `intermediates/attention_weights` `[B, N, R, C, R', C']`
(the queries' grid, then the keys') when the caller makes that collection mutable, and
forms them for that only. SAGAN's else needs memory O(T) for long maps (a gradient at
[4, 64, 64, 16] 67 MiB on the CPU, where with all weights it took 1,026); the relative
logits of the others are a bias, and have T x T entries in any case.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.layers.attention import (
    apply_weights,
    attention_weights,
    dot_product_attention,
    merge_heads,
    needs_weights,
    project_heads,
    resolve_head_dim,
)
from vit_jax.layers.conv import Conv, check_feature_map
from vit_jax.layers.relative import RelativePositions, Tables, relative_logits
from vit_jax.typing import Array, Dtype, Grid, Initializer


def global_attention(
    query: Array,
    key: Array,
    value: Array,
    tables: Tables | None = None,
    *,
    impl: str = 'auto',
) -> Array:
    """softmax_j(q_i . (k_j + r_ij) / sqrt(H)) v_j over all positions j of a map.

    Args:
      query: `[B, R, C, N, H]`.
      key: `[B, R', C', N, H]`.
      value: `[B, R', C', N, H2]`.
      tables: those of `relative_logits`, for r; None for r = 0. With them R', C' are
        R, C, and a bias of T x T entries is formed, whatever `impl` is.
      impl: see `dot_product_attention`.

    Returns:
      `[B, R, C, N, H2]`, in the dtype of `query`.

    Raises:
      UserError: for shapes that do not fit, or what `impl` cannot do.

    >>> x, tables = jnp.ones((2, 3, 5, 4, 8)), (jnp.ones((5, 8)), jnp.ones((9, 8)))
    >>> global_attention(x, x, x, tables).shape
    (2, 3, 5, 4, 8)
    """
    bias = _relative_bias(query, tables)
    tokens = (to_tokens(x) for x in (query, key, value))
    out = dot_product_attention(*tokens, bias=bias, impl=impl)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def global_weights(query: Array, key: Array, tables: Tables | None = None) -> Array:
    """The weights of `global_attention`; arguments as there.

    Returns:
      `[B, N, R, C, R', C']`, float32 (float64 where the inputs are).
    """
    bias = _relative_bias(query, tables)
    weights = attention_weights(to_tokens(query), to_tokens(key), bias=bias)
    return weights.reshape(*weights.shape[:2], *grid_of(query), *grid_of(key))


def apply_global_weights(weights: Array, value: Array) -> Array:
    """Averages `value` `[B, R', C', N, H]` by `global_weights`."""
    batch, heads, *grid, rows, cols = weights.shape
    weights = weights.reshape(batch, heads, -1, rows * cols)
    return apply_weights(weights, to_tokens(value)).reshape(
        batch, *grid, heads, value.shape[-1]
    )


def _relative_bias(query: Array, tables: Tables | None) -> Array | None:
    if tables is None:
        return None
    logits = relative_logits(to_tokens(query), *tables, grid_of(query))
    # The scale is for both halves; float32 logits lose nothing by it.
    return query.shape[-1] ** -0.5 * logits


def average_pool(x: Array, strides: int, margin: int = 0) -> Array:
    """The mean of each window, at borders of what exists.

    Args:
      x: `[B, R, C, D]`.
      strides: a window at each so many positions, and so many wide.
      margin: the windows begin so much earlier: with strides - 1 they are centred.

    Returns:
      `[B, ceil(R / strides), ceil(C / strides), D]`.

    >>> average_pool(jnp.arange(3.0).reshape(1, 1, 3, 1), 2).ravel()
    Array([0.5, 2. ], dtype=float32)
    """
    window, padding = (margin + strides,) * 2, ((margin, strides - 1),) * 2
    pooled = nn.avg_pool(x, window, (strides, strides), padding, False)
    return pooled.astype(x.dtype)


def _max_pool(x: Array, side: int) -> Array:
    """The largest of each side x side window, at borders of what exists."""
    return nn.max_pool(x, (side, side), (side, side), ((0, side - 1),) * 2)


def grid_of(x: Array) -> Grid:
    """(R, C) of `x`, `[B, R, C, ...]`."""
    return x.shape[1], x.shape[2]


def to_tokens(x: Array) -> Array:
    """`[B, R, C, ...]` -> `[B, T, ...]`, row by row."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def unscaled(query: Array) -> Array:
    """`query` `[..., H]`, made so that attention's 1 / sqrt(H) cancels."""
    return query * query.shape[-1] ** 0.5


class SAGANAttention(nn.Module):
    """x + gamma o, where o is attention over the whole map and gamma starts at 0.

    SAGAN, section 3: one head, logits f(x_i) . g(x_j) without scaling, softmax over
    the keys. The defaults are the paper's; its released code has a
    `value_reduction` of 2 and a `key_pool` of 2. Where the shape has to change, a
    1x1 convolution comes before all that, and average pooling behind.

    Attributes:
      features: channels of the output; None for those of the input.
      strides: of the average pooling.
      key_reduction: queries and keys have features / key_reduction channels.
      value_reduction: the same of the values.
      key_pool: side of the windows of which keys and values are the maximum; the last
        ones, of an odd size, are of what exists.
      impl: see `dot_product_attention`.
      kernel_init: initializer of the 1x1 convolutions, which have no biases.
      dtype: dtype of the computation; parameters are float32.
    """

    features: int | None = None
    strides: int = 1
    key_reduction: int = 8
    value_reduction: int = 8
    key_pool: int = 1
    impl: str = 'auto'
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Lets every position attend to all.

        Args:
          x: `[B, R, C, D]`.
          train: changes nothing.

        Returns:
          `[B, ceil(R / strides), ceil(C / strides), features]`; at initialisation
          the input itself, where its shape stays.

        Raises:
          UserError: for a wrong rank, a reduction that does not divide, or no pool.

        >>> import jax
        >>> x = jnp.ones((2, 3, 5, 16))
        >>> out, _ = SAGANAttention().init_with_output(jax.random.key(0), x)
        >>> bool((out == x).all())
        True
        """
        check_feature_map(self, x, self.strides)
        features = x.shape[-1] if self.features is None else self.features
        for reduction in (self.key_reduction, self.value_reduction):
            if reduction <= 0 or features % reduction:
                raise UserError(
                    f'SAGANAttention cannot reduce {features} channels by {reduction}; '
                    'change key_reduction or value_reduction'
                )
        if self.key_pool <= 0:
            raise UserError(f'key_pool must be above 0, not {self.key_pool}')
        pointwise = partial(
            nn.Dense, use_bias=False, kernel_init=self.kernel_init, dtype=self.dtype
        )
        x = x.astype(self.dtype)
        if features != x.shape[-1]:
            x = pointwise(features, name='project')(x)
        query = pointwise(features // self.key_reduction, name='query')(x)
        key = pointwise(features // self.key_reduction, name='key')(x)
        value = pointwise(features // self.value_reduction, name='value')(x)
        key, value = (_max_pool(y, self.key_pool) for y in (key, value))

        # One head, on an axis of its own: [B, R, C, 1, H].
        query, key, value = (y[..., None, :] for y in (unscaled(query), key, value))
        if needs_weights(self, 0.0, train):
            weights = global_weights(query, key)
            self.sow('intermediates', 'attention_weights', weights)
            out = apply_global_weights(weights, value)
        else:
            out = global_attention(query, key, value, impl=self.impl)
        gamma = self.param('gamma', nn.initializers.zeros, (), jnp.float32)
        out = pointwise(features, name='out')(out[..., 0, :])
        x = x + gamma.astype(self.dtype) * out
        return average_pool(x, self.strides)


class AugmentedConv(nn.Module):
    """A convolution and attention side by side, their channels concatenated.

    "Attention Augmented Convolutional Networks", section 3.2: `features` minus dv
    channels from the convolution, then dv from multi-head attention with relative
    positions, q . (k + r) / sqrt(H), and a linear map behind. The paper shrinks maps
    that are too large for attention by 3x3 average pooling of stride 2; so does this
    where the convolution has strides. With the least key size of its section 4.1
    AA-ResNet-50 has the published 25.8M parameters.

    Attributes:
      features: channels of the output.
      strides: of the convolution, and of the pooling before attention.
      num_heads: heads.
      key_ratio: channels of all keys, over `features`: the paper's kappa.
      value_ratio: channels dv of all values, over `features`: its upsilon. A head
        gets the nearest whole number of channels, at least one. 1.0 leaves the
        convolution none, and there is no convolution: the paper's fully attentional
        case, with a `key_ratio` of 1.0.
      min_key_dim: least number of channels of a head's key.
      kernel_size: side of the convolution's kernel.
      impl: see `global_attention`.
      kernel_init: initializer of the linear maps; none here has biases.
      dtype: dtype of the computation; parameters are float32.
    """

    features: int
    strides: int = 1
    num_heads: int = 8
    key_ratio: float = 0.2
    value_ratio: float = 0.1
    min_key_dim: int = 20
    kernel_size: int = 3
    impl: str = 'auto'
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Convolves and attends.

        Args:
          x: `[B, R, C, D]`; the positions are those of a map of this size.
          train: changes nothing.

        Returns:
          `[B, ceil(R / strides), ceil(C / strides), features]`.

        Raises:
          UserError: for a wrong rank, a map of another size than the parameters',
            ratios not above 0, or heads that leave no channel to the convolution.

        >>> import jax
        >>> x = jnp.ones((2, 3, 5, 16))
        >>> layer = AugmentedConv(features=24, strides=2)
        >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), x)[0].shape
        (2, 2, 3, 24)
        """
        check_feature_map(self, x, self.strides)
        key_dim = max(self._share('key_ratio'), self.min_key_dim)
        value_dim = self._share('value_ratio')
        attended = self.num_heads * value_dim
        convolved = self.features - attended
        if convolved < 0 or (convolved == 0 and self.value_ratio < 1):
            raise UserError(
                f'AugmentedConv of {self.features} features leaves the convolution '
                f'none: {attended} are of attention; lower value_ratio or num_heads'
            )
        parts = []
        if convolved:
            conv = Conv(
                convolved,
                strides=self.strides,
                kernel_size=self.kernel_size,
                dtype=self.dtype,
                name='conv',
            )
            parts.append(conv(x, train=train))

        # Windows centred where those of the convolution are: 3x3 at a stride of 2.
        x = average_pool(x, self.strides, margin=self.strides - 1)
        linear = {
            'kernel_init': self.kernel_init,
            'use_bias': False,
            'dtype': self.dtype,
        }
        query, key, value = (
            project_heads(self.num_heads, size, name=name, **linear)(x)
            for name, size in (
                ('query', key_dim),
                ('key', key_dim),
                ('value', value_dim),
            )
        )
        tables = RelativePositions(name='relative_position')(grid_of(x), key_dim)
        if needs_weights(self, 0.0, train):
            weights = global_weights(query, key, tables)
            self.sow('intermediates', 'attention_weights', weights)
            out = apply_global_weights(weights, value)
        else:
            out = global_attention(query, key, value, tables, impl=self.impl)
        parts.append(merge_heads(attended, name='out', **linear)(out))
        return jnp.concatenate(parts, axis=-1)

    def _share(self, name: str) -> int:
        ratio: float = getattr(self, name)
        for field, value in (('num_heads', self.num_heads), (name, ratio)):
            if value <= 0:
                raise UserError(f'{field} must be above 0, not {value}')
        return max(round(ratio * self.features / self.num_heads), 1)


class GlobalAttention(nn.Module):
    """Multi-head attention over the whole map with relative positions: BoTNet's MHSA.

    "Bottleneck Transformers for Visual Recognition", section 3 and figure 4: logits
    q . (k + r_rows + r_columns) / sqrt(H). The tables are shared by the heads, as in
    "Attention Augmented Convolutional Networks", from which the paper takes them,
    and nothing mixes the heads afterwards: the next 1x1 convolution does, and
    BoTNet-50 has its published 20.8M parameters so. Strides are average pooling.

    Attributes:
      features: channels of the output.
      strides: of the average pooling behind the attention.
      num_heads: heads; must divide `features`.
      impl: see `global_attention`.
      kernel_init: initializer of the linear maps, which have no biases.
      dtype: dtype of the computation; parameters are float32.
    """

    features: int
    strides: int = 1
    num_heads: int = 4
    impl: str = 'auto'
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Lets every position attend to all.

        Args:
          x: `[B, R, C, D]`; the positions are those of a map of this size.
          train: changes nothing.

        Returns:
          `[B, ceil(R / strides), ceil(C / strides), features]`.

        Raises:
          UserError: for a wrong rank, a map of another size than the parameters', or
            heads that do not divide `features`.

        >>> import jax
        >>> x = jnp.ones((2, 3, 5, 16))
        >>> layer = GlobalAttention(features=24, strides=2)
        >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), x)[0].shape
        (2, 2, 3, 24)
        """
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
        tables = RelativePositions(name='relative_position')(grid_of(x), head_dim)
        if needs_weights(self, 0.0, train):
            weights = global_weights(query, key, tables)
            self.sow('intermediates', 'attention_weights', weights)
            out = apply_global_weights(weights, value)
        else:
            out = global_attention(query, key, value, tables, impl=self.impl)
        out = out.reshape(*x.shape[:3], self.features)
        return average_pool(out, self.strides)
