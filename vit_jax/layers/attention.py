"""Scaled dot-product attention: pure functions, and the multi-head module.

"Attention Is All You Need", arXiv 1706.03762, section 3.2. Shapes follow
`jax.nn.dot_product_attention`: query `[B, T, N, H]`, key and value `[B, S, N, H]`.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError, unknown
from vit_jax.layers.stochastic import Dropout
from vit_jax.typing import Array, Dtype, Initializer

IMPLS = ('auto', 'xla', 'cudnn', 'chunked', 'dense')

# Above this many keys the logits' memory traffic costs more than recomputing them,
# and 'auto' takes blocks of queries. On the CPU measured with `benchmark gpsa`.
_MAX_PLAIN_TOKENS, _MAX_PLAIN_TOKENS_CPU = 1024, 768
_QUERY_BLOCK = 256


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    impl: str = 'auto',
) -> Array:
    """softmax(q k^T / sqrt(H) + bias) v, with the softmax in float32.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, N, H]`.
      value: `[B, S, N, H]`.
      bias: added to the logits, broadcastable to `[B, N, T, S]`.
      mask: boolean, True = keep, broadcastable to `[B, N, T, S]`. A row that keeps
        no key gives 0, and its gradient is 0.
      impl: 'xla'; 'cudnn' (a fused GPU kernel, half precision only); 'chunked'
        (blocks of queries, recomputed in the backward pass: memory O(S) per
        query block); 'dense' (the plain formula, the others' reference); or
        'auto', which chooses by platform, dtype and length.

    Returns:
      `[B, T, N, H]`, in the dtype of `query`.

    Raises:
      UserError: for an unknown `impl` or shapes that do not fit.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((2, 3, 5, 7))
    >>> dot_product_attention(x, x, x).shape
    (2, 3, 5, 7)
    """
    _check_shapes(query, key, value, bias, mask)
    if impl == 'auto':
        impl = auto_impl(query, key, bias, mask)
    if impl == 'dense':
        weights = attention_weights(query, key, bias=bias, mask=mask)
        return apply_weights(weights, value)
    if impl == 'chunked':
        return _chunked(query, key, value, bias, mask)
    if impl == 'cudnn' and jax.default_backend() != 'gpu':
        raise UserError("attention impl 'cudnn' needs a GPU; use 'auto'")
    if impl in ('xla', 'cudnn'):
        out = jax.nn.dot_product_attention(  # type: ignore[call-overload]
            query, key, value, bias=bias, mask=mask, implementation=impl
        )
        return _zero_empty_rows(out, mask)
    raise unknown('attention impl', impl, IMPLS)


def attention_weights(
    query: Array,
    key: Array,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """softmax(q k^T / sqrt(H) + bias), rows that keep no key being 0.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, N, H]`.
      bias, mask: as for `dot_product_attention`.

    Returns:
      `[B, N, T, S]`, float32 (float64 where the inputs are).
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    scale = query.shape[-1] ** -0.5
    logits = scale * jnp.einsum(
        'BTNH,BSNH->BNTS', query, key, preferred_element_type=dtype
    )
    if bias is not None:
        logits = logits + bias.astype(dtype)
    if mask is not None:
        # A finite floor: the softmax of a row of -inf is NaN, which the `where` below
        # would hide but `jax_debug_nans` would not.
        logits = jnp.where(mask, logits, jnp.finfo(dtype).min)
    weights = jax.nn.softmax(logits, axis=-1)
    return weights if mask is None else jnp.where(mask, weights, 0.0)


def apply_weights(weights: Array, value: Array) -> Array:
    """Averages `value` `[B, S, N, H]` by `weights` `[B, N, T, S]` -> `[B, T, N, H]`."""
    return jnp.einsum('BNTS,BSNH->BTNH', weights.astype(value.dtype), value)


def auto_impl(
    query: Array,
    key: Array,
    bias: Array | None = None,
    mask: Array | None = None,
) -> str:
    """The `impl` that 'auto' stands for, from static facts only."""
    platform = jax.default_backend()
    head_dim = query.shape[-1]
    if (
        platform == 'gpu'
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and head_dim % 8 == 0
        and head_dim <= 128
        and bias is None
        and mask is None
    ):
        return 'cudnn'
    if platform == 'cpu':
        # XLA's CPU backend runs our einsums faster than those of `jax.nn`.
        return 'dense' if key.shape[1] <= _MAX_PLAIN_TOKENS_CPU else 'chunked'
    return 'xla' if key.shape[1] <= _MAX_PLAIN_TOKENS else 'chunked'


def _chunked(
    query: Array, key: Array, value: Array, bias: Array | None, mask: Array | None
) -> Array:
    """Attention by blocks of queries; the backward pass recomputes each block."""
    length = query.shape[1]
    num_blocks = -(-length // _QUERY_BLOCK)
    block = -(-length // num_blocks)  # blocks of one size, with little to fill up

    def split(x: Array, axis: int) -> Array:
        """Cuts the query axis into blocks (zeros fill the last) and puts them first."""
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, num_blocks * block - length)
        shape = (*x.shape[:axis], num_blocks, block, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(x, pad).reshape(shape), axis, 0)

    per_block = {'query': split(query, 1)}
    shared: dict[str, Array] = {}  # what has no query axis to cut
    for name, x in (('bias', bias), ('mask', mask)):
        if x is not None:
            x = _four_axes(x)
            where = shared if x.shape[2] == 1 else per_block
            where[name] = x if x.shape[2] == 1 else split(x, 2)

    @partial(jax.checkpoint, prevent_cse=False)  # `map` is a loop, nothing to merge
    def attend(args: dict[str, Array]) -> Array:
        weights = attention_weights(key=key, **args, **shared)
        return apply_weights(weights, value)

    out = jnp.moveaxis(jax.lax.map(attend, per_block), 0, 1)
    out = out.reshape(out.shape[0], num_blocks * block, *out.shape[3:])
    return out[:, :length]


def _zero_empty_rows(out: Array, mask: Array | None) -> Array:
    if mask is None:
        return out
    kept = jnp.any(_four_axes(mask), axis=-1)  # [B, N, T]
    return jnp.where(jnp.swapaxes(kept, 1, 2)[..., None], out, jnp.zeros_like(out))


def _four_axes(x: Array) -> Array:
    return jnp.expand_dims(x, range(4 - x.ndim))


def _check_shapes(
    query: Array, key: Array, value: Array, bias: Array | None, mask: Array | None
) -> None:
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise UserError(
            'attention takes query [B, T, N, H], key and value [B, S, N, H]; got '
            f'{query.shape}, {key.shape} and {value.shape}'
        )
    (batch, length, heads, size), (_, source, *_) = query.shape, key.shape
    if key.shape != (batch, source, heads, size) or value.shape != key.shape:
        raise UserError(
            f'query {query.shape} needs key and value of shape '
            f'({batch}, S, {heads}, {size}); got {key.shape} and {value.shape}'
        )
    full = (batch, heads, length, source)
    for name, x in (('bias', bias), ('mask', mask)):
        if x is not None and not _broadcastable(x.shape, full):
            raise UserError(
                f'attention {name} of shape {x.shape} does not broadcast to '
                f'[B, N, T, S] = {full}'
            )
    if mask is not None and mask.dtype != jnp.bool_:
        raise UserError(
            f'attention mask must be boolean, True = keep; got {mask.dtype}'
        )


def _broadcastable(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    if len(shape) > len(full):
        return False
    return all(n in (1, m) for n, m in zip(reversed(shape), reversed(full)))


class MultiHeadAttention(nn.Module):
    """Multi-head attention; self-attention unless given `x_kv`.

    The weights are sown as `intermediates/attention_weights` `[B, N, T, S]` when
    the caller makes that collection mutable, and that pass computes them densely.

    Attributes:
      num_heads: heads; must divide the width unless `head_dim` is given.
      head_dim: size per head; None for width / num_heads.
      qkv_bias: whether query, key and value have biases; the output always has.
      dropout_rate: dropout of the attention weights (dense computation).
      impl: see `dot_product_attention`.
      kernel_init: initializer of the four linear maps.
      dtype: dtype of the computation; parameters are float32.
    """

    num_heads: int
    head_dim: int | None = None
    qkv_bias: bool = True
    dropout_rate: float = 0.0
    impl: str = 'auto'
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        x_kv: Array | None = None,
        *,
        bias: Array | None = None,
        mask: Array | None = None,
        train: bool = False,
    ) -> Array:
        """Lets the tokens of `x` attend to those of `x_kv`.

        Args:
          x: `[B, T, D]`.
          x_kv: `[B, S, E]`, keys and values come from it; None for `x`.
          bias, mask: broadcastable to `[B, N, T, S]`.
          train: whether dropout is on.

        Returns:
          `[B, T, D]`.

        Raises:
          UserError: when `num_heads` does not divide the width.
        """
        width = x.shape[-1]
        x_kv = x if x_kv is None else x_kv
        query, key, value = (
            project_heads(
                self.num_heads,
                resolve_head_dim(width, self.num_heads, self.head_dim),
                kernel_init=self.kernel_init,
                use_bias=self.qkv_bias,
                dtype=self.dtype,
                name=name,
            )(source)
            for name, source in (('query', x), ('key', x_kv), ('value', x_kv))
        )
        if needs_weights(self, self.dropout_rate, train):
            weights = attention_weights(query, key, bias=bias, mask=mask)
            self.sow('intermediates', 'attention_weights', weights)
            weights = Dropout(self.dropout_rate, name='dropout')(weights, train=train)
            out = apply_weights(weights, value)
        else:
            out = dot_product_attention(
                query, key, value, bias=bias, mask=mask, impl=self.impl
            )
        return merge_heads(
            width, kernel_init=self.kernel_init, dtype=self.dtype, name='out'
        )(out)


def resolve_head_dim(width: int, num_heads: int, head_dim: int | None) -> int:
    """`head_dim`, or `width / num_heads` where that is whole."""
    if num_heads <= 0:
        raise UserError(f'num_heads must be above 0, not {num_heads}')
    if head_dim is None and width % num_heads:
        raise UserError(
            f'num_heads {num_heads} does not divide the width {width}; '
            'change one of them or give head_dim'
        )
    return head_dim or width // num_heads


def project_heads(num_heads: int, head_dim: int, **kwargs) -> nn.DenseGeneral:
    """A linear map `[B, T, D]` -> `[B, T, N, H]`."""
    return nn.DenseGeneral((num_heads, head_dim), **kwargs)


def merge_heads(width: int, **kwargs) -> nn.DenseGeneral:
    """A linear map `[B, T, N, H]` -> `[B, T, D]`."""
    return nn.DenseGeneral(width, axis=(-2, -1), **kwargs)


def needs_weights(module: nn.Module, dropout_rate: float, train: bool) -> bool:
    """Whether `module` must form its attention weights: to sow them or drop some."""
    dropping = train and dropout_rate > 0.0
    return dropping or module.is_mutable_collection('intermediates')
