"""Scaled dot-product attention: pure functions, and the multi-head module.

"Attention Is All You Need", arXiv 1706.03762, section 3.2. Shapes follow
`jax.nn.dot_product_attention`: query `[B, T, N, H]`, key and value `[B, S, N, H]`.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

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
    causal: bool = False,
    impl: str = 'auto',
) -> Array:
    """softmax(q k^T / sqrt(H) + bias) v, with the softmax in float32.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, N, H]`.
      value: `[B, S, N, H2]`; mostly H2 = H.
      bias: added to the logits, finite, broadcastable to `[B, N, T, S]`.
      mask: boolean, True = keep, broadcastable to `[B, N, T, S]`. A row that keeps
        no key gives 0, and its gradient is 0.
      causal: keep only keys at or before the query's place, beside `mask`.
      impl: 'xla'; 'cudnn' (a fused GPU kernel, half precision only); 'chunked'
        (blocks of queries, recomputed in the backward pass: memory O(S) per
        query block); 'dense' (the plain formula, the others' reference); or
        'auto', which chooses by platform, dtype and length.

    Returns:
      `[B, T, N, H2]`. Key, value and result have the dtype of `query`.

    Raises:
      UserError: for an unknown `impl`, one that cannot run here, or shapes that do
        not fit.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((2, 3, 5, 7))
    >>> dot_product_attention(x, x, x).shape
    (2, 3, 5, 7)
    """
    _check_shapes(query, key, value, bias, mask)
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    if impl == 'auto':
        impl = auto_impl(query, key, bias, mask)
        if impl in ('xla', 'cudnn') and value.shape != key.shape:
            # The libraries' kernels take values as large as keys.
            impl = 'dense' if key.shape[1] <= _MAX_PLAIN_TOKENS else 'chunked'
    if impl == 'chunked':
        return _chunked(query, key, value, bias, mask, causal)
    if mask is not None and causal:
        mask, causal = mask & causal_mask(query.shape[1], key.shape[1]), False
    if impl == 'dense':
        weights = attention_weights(query, key, bias=bias, mask=mask, causal=causal)
        return apply_weights(weights, value)
    if impl not in ('xla', 'cudnn'):
        raise unknown('attention impl', impl, IMPLS)
    if value.shape != key.shape:
        raise UserError(
            f'attention impl {impl!r} needs values as large as keys, not {value.shape} '
            f"for {key.shape}; use 'auto'"
        )
    if impl == 'cudnn' and not _has_cudnn_attention():
        raise UserError(
            "attention impl 'cudnn' needs an NVIDIA GPU of compute capability 8.0 or "
            "more; use 'auto'"
        )
    try:
        out = jax.nn.dot_product_attention(  # type: ignore[call-overload]
            query,
            key,
            value,
            bias=bias,
            mask=mask,
            is_causal=causal,
            implementation=impl,
        )
    except NotImplementedError as error:  # what the kernel does not do
        raise UserError(f"attention impl {impl!r}: {error}; use 'auto'") from error
    return _zero_empty_rows(out, mask)


def attention_weights(
    query: Array,
    key: Array,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    causal: bool = False,
) -> Array:
    """softmax(q k^T / sqrt(H) + bias), rows that keep no key being 0.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, N, H]`.
      bias, mask, causal: as for `dot_product_attention`.

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
    if causal:
        allowed = causal_mask(*logits.shape[-2:])
        mask = allowed if mask is None else mask & allowed
    if mask is not None:
        # A finite floor: the softmax of a row of -inf is NaN, which the `where` below
        # would hide but `jax_debug_nans` would not.
        logits = jnp.where(mask, logits, jnp.finfo(dtype).min)
    weights = jax.nn.softmax(logits, axis=-1)
    return weights if mask is None else jnp.where(mask, weights, 0.0)


def apply_weights(weights: Array, value: Array) -> Array:
    """Averages `value` `[B, S, N, H]` by `weights` `[B, N, T, S]` -> `[B, T, N, H]`."""
    return jnp.einsum('BNTS,BSNH->BTNH', weights.astype(value.dtype), value)


def causal_mask(length: int, source: int, offset: int | Array = 0) -> Array:
    """Which keys are at or before each query: queries do not see what comes after.

    "Attention Is All You Need", arXiv 1706.03762, section 3.2.3.

    Args:
      length: T, number of queries.
      source: S, number of keys.
      offset: place of the first query among the keys.

    Returns:
      `[T, S]` boolean.

    >>> causal_mask(2, 4, offset=1).astype(int)
    Array([[1, 1, 0, 0],
           [1, 1, 1, 0]], dtype=int32)
    """
    return jnp.arange(source) <= offset + jnp.arange(length)[:, None]


def padding_mask(keep: Array) -> Array:
    """`keep` `[B, S]` boolean, True = a token, to a mask `[B, 1, 1, S]` of keys."""
    return keep[:, None, None, :]


def auto_impl(
    query: Array,
    key: Array,
    bias: Array | None = None,
    mask: Array | None = None,
) -> str:
    """The `impl` that 'auto' stands for, from static facts only."""
    # Of a batch of any size is an exported program, which is for every platform.
    portable = is_symbolic_dim(query.shape[0])
    head_dim = query.shape[-1]
    if (
        not portable
        and _has_cudnn_attention()
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and head_dim % 8 == 0
        and head_dim <= 128
        and bias is None
        and mask is None
    ):
        return 'cudnn'
    if portable or target_platform() == 'cpu':
        # XLA's CPU backend runs our einsums faster than those of `jax.nn`.
        return 'dense' if key.shape[1] <= _MAX_PLAIN_TOKENS_CPU else 'chunked'
    return 'xla' if key.shape[1] <= _MAX_PLAIN_TOKENS else 'chunked'


def target_platform() -> str:
    """'cpu', 'gpu' or 'tpu': what the function being traced will run on.

    That is where we are, unless a mesh of other devices is in context.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _has_cudnn_attention() -> bool:
    """Whether cuDNN's fused attention runs here: on NVIDIA GPUs from Ampere on."""
    if target_platform() != 'gpu':
        return False
    capability = getattr(jax.devices()[0], 'compute_capability', '')
    major = str(capability).partition('.')[0]
    return major.isdigit() and int(major) >= 8  # AMD's are named 'gfx90a'


def _chunked(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    causal: bool,
) -> Array:
    """Attention by blocks of queries; the backward pass recomputes each block."""
    length = query.shape[1]
    num_blocks = max(-(-length // _QUERY_BLOCK), 1)
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
    def attend(offset: Array, args: dict[str, Any]) -> Array:
        args = args | shared
        if causal:
            allowed = causal_mask(block, key.shape[1], offset)
            args['mask'] = allowed & args.get('mask', True)
        return apply_weights(attention_weights(key=key, **args), value)

    offsets = block * jnp.arange(num_blocks)
    out = jax.lax.map(lambda xs: attend(*xs), (offsets, per_block))
    out = jnp.moveaxis(out, 0, 1)
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
    expected = (batch, source, heads, size)
    if key.shape != expected or value.shape[:3] != expected[:3]:
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

    Decoding token by token (`decode=True`, the collection 'cache' mutable) gives what
    one pass over all tokens gives. Each call takes the next T tokens, one or many,
    and keeps their keys and values; the source of cross-attention is projected at
    the first call only, and given to the others for its shape. A cache starts absent,
    or empty as `init(..., decode=True)` makes it.

    Attributes:
      num_heads: heads; must divide the width unless `head_dim` is given.
      head_dim: size per head; None for width / num_heads.
      causal: self-attention sees only tokens at or before its own; cross-attention
        sees the whole source.
      cache_length: L, most tokens that decoding may see.
      qkv_bias: whether query, key and value have biases; the output always has.
      dropout_rate: dropout of the attention weights (dense computation).
      impl: see `dot_product_attention`.
      kernel_init: initializer of the four linear maps.
      dtype: dtype of the computation; parameters are float32.
    """

    num_heads: int
    head_dim: int | None = None
    causal: bool = False
    cache_length: int | None = None
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
        decode: bool = False,
        train: bool = False,
    ) -> Array:
        """Lets the tokens of `x` attend to those of `x_kv`.

        Args:
          x: `[B, T, D]`.
          x_kv: `[B, S, E]`, keys and values come from it; None for `x`.
          bias, mask: broadcastable to `[B, N, T, S]`; S is L where `x` is decoded.
          decode: whether `x` follows the tokens of earlier calls.
          train: whether dropout is on.

        Returns:
          `[B, T, D]`; NaN where the cache is too short for all tokens.

        Raises:
          UserError: when `num_heads` does not divide the width, shapes do not fit,
            or self-attention decodes without `causal` and `cache_length`.

        >>> layer = MultiHeadAttention(num_heads=2, causal=True, cache_length=5)
        >>> x = jax.random.normal(jax.random.key(0), (1, 5, 8))
        >>> params = layer.init(jax.random.key(1), x)
        >>> whole = layer.apply(params, x)
        >>> start, cache = layer.apply(params, x[:, :3], decode=True, mutable=['cache'])
        >>> rest, cache = layer.apply(
        ...     {**params, **cache}, x[:, 3:], decode=True, mutable=['cache'])
        >>> bool(jnp.allclose(whole, jnp.concatenate([start, rest], 1), atol=1e-6))
        True
        """
        width = x.shape[-1]

        def project(name: str, source: Array) -> Array:
            return project_heads(
                self.num_heads,
                resolve_head_dim(width, self.num_heads, self.head_dim),
                kernel_init=self.kernel_init,
                use_bias=self.qkv_bias,
                dtype=self.dtype,
                name=name,
            )(source)

        query = project('query', x)
        source = x if x_kv is None else x_kv
        # What `init` is given is no source to remember.
        if decode and x_kv is not None and not self.is_initializing():
            cached = partial(self.variable, 'cache')
            key = cached('cached_key', project, 'key', source).value
            value = cached('cached_value', project, 'value', source).value
            if key.shape[:2] != source.shape[:2]:
                raise UserError(
                    f'the cache is of a source [B, S] = {key.shape[:2]}; this one has '
                    f'{source.shape[:2]}'
                )
        else:
            key, value = project('key', source), project('value', source)
        causal, seen, overflow = self.causal and x_kv is None, None, None
        if decode and x_kv is None:
            key, value, seen, overflow = self._extend_cache(key, value)
        _check_shapes(query, key, value, bias, mask)
        if seen is not None:
            mask, causal = seen if mask is None else seen & mask, False

        if needs_weights(self, self.dropout_rate, train):
            weights = attention_weights(query, key, bias=bias, mask=mask, causal=causal)
            self.sow('intermediates', 'attention_weights', weights)
            weights = Dropout(self.dropout_rate, name='dropout')(weights, train=train)
            out = apply_weights(weights, value)
        else:
            out = dot_product_attention(
                query, key, value, bias=bias, mask=mask, causal=causal, impl=self.impl
            )
        if overflow is not None:
            out = jnp.where(overflow, jnp.nan, out)
        return merge_heads(
            width, kernel_init=self.kernel_init, dtype=self.dtype, name='out'
        )(out)

    def _extend_cache(
        self, key: Array, value: Array
    ) -> tuple[Array, Array, Array, Array]:
        """Appends `[B, T, N, H]` to the cache.

        Returns:
          All keys and values `[B, L, N, H]`, which of them each new token may see
          `[T, L]`, and whether there were too many tokens.
        """
        length = self.cache_length
        if not self.causal or length is None:
            raise UserError('decoding needs causal=True and cache_length')
        batch, num_new, *head = key.shape
        if num_new > length:
            raise UserError(
                f'{num_new} tokens do not fit cache_length {length}; increase it'
            )
        shape = (batch, length, *head)
        keys = self.variable('cache', 'cached_key', jnp.zeros, shape, key.dtype)
        values = self.variable('cache', 'cached_value', jnp.zeros, shape, value.dtype)
        index = self.variable('cache', 'cache_index', jnp.zeros, (), jnp.int32)
        if keys.value.shape != shape:
            raise UserError(
                f'the cache has shape {keys.value.shape}, these tokens need {shape}'
            )
        start = index.value
        update = partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
        all_keys = update(keys.value, key, start)
        all_values = update(values.value, value, start)
        if not self.is_initializing():
            keys.value, values.value = all_keys, all_values
            index.value = start + num_new
        seen = causal_mask(num_new, length, start)
        return all_keys, all_values, seen, start + num_new > length


def resolve_head_dim(width: int, num_heads: int, head_dim: int | None) -> int:
    """`head_dim`, or `width / num_heads` where that is whole."""
    for name, value in (('num_heads', num_heads), ('head_dim', head_dim)):
        if value is not None and value <= 0:
            raise UserError(f'{name} must be above 0, not {value}')
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
