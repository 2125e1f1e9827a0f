"""The Transformer's blocks, for any attention."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.axes import keep_rows
from vit_jax.errors import unknown
from vit_jax.layers.mlp import MlpBlock
from vit_jax.layers.norm import layer_norm
from vit_jax.layers.stochastic import Dropout, DropPath
from vit_jax.sharding import gather_params
from vit_jax.typing import Array, Dtype, Initializer

# What the backward pass keeps of a block, beside its input; it computes the rest again.
REMAT: dict[str, Callable[..., bool] | None] = {
    'none': None,  # everything: nothing is computed twice
    'dots': jax.checkpoint_policies.dots_saveable,  # results of matrix products
    'full': jax.checkpoint_policies.nothing_saveable,
}


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Attention mixes tokens, the MLP transforms each of them ("An Image is Worth
    16x16 Words", arXiv 2010.11929, equations 2 and 3).

    Attributes:
      attention: makes the attention module from `name=`, which is called as
        `module(x, train=train)` and keeps the shape `[B, T, D]`.
      mlp_dim: F, hidden size of the MLP.
      dropout_rate: dropout after the attention and in the MLP.
      hidden_dropout_rate: of the MLP's hidden units, see `MlpBlock`.
      drop_path_rate: stochastic depth of both branches.
      norm_first: norms inside the branches, as above; False puts them after the
        sums, norm(x + attention(x)), as "Attention Is All You Need" does.
      layer_scale: where the factors of the branches start, see `LayerScale`; None
        for branches without.
      layer_norm_eps: epsilon of the LayerNorms, which compute in float32.
      activation: of the MLP, see `get_activation`.
      remat: what the backward pass computes again, a key of `REMAT`.
      kernel_init: initializer of the MLP's kernels.
      dtype: dtype of the computation; parameters are float32.
    """

    attention: Callable[..., nn.Module]
    mlp_dim: int
    dropout_rate: float = 0.0
    hidden_dropout_rate: float | None = None
    drop_path_rate: float = 0.0
    norm_first: bool = True
    layer_scale: float | None = None
    layer_norm_eps: float = 1e-6
    activation: str = 'gelu'
    remat: str = 'none'
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, *, mask: Array | None = None, train: bool = False
    ) -> Array:
        """Encodes tokens.

        Args:
          x: `[B, T, D]`.
          mask: for attention that takes one, broadcastable to `[B, N, T, T]`.
          train: whether dropout is on.

        Returns:
          `[B, T, D]`.

        >>> import jax
        >>> from functools import partial
        >>> from vit_jax.layers.attention import MultiHeadAttention
        >>> block = EncoderBlock(partial(MultiHeadAttention, num_heads=2), mlp_dim=16)
        >>> x = jnp.ones((3, 5, 8))
        >>> block.apply(block.init(jax.random.key(0), x), x).shape
        (3, 5, 8)
        """
        given = {} if mask is None else {'mask': mask}  # not every attention takes it

        def encode(self: EncoderBlock, x: Array) -> Array:
            def attend(x: Array) -> Array:
                x = self.attention(name='attention')(x, **given, train=train)
                return Dropout(self.dropout_rate, name='dropout')(x, train=train)

            x = _residual(self, 1, attend, x, train)
            return _residual(self, 2, _mlp(self, train), x, train)

        return _lift(encode, self, self.remat)(self, x)


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to the encoded source, then the MLP.

    "Attention Is All You Need", arXiv 1706.03762, section 3.1.

    Attributes:
      attention: makes a `MultiHeadAttention` from `causal=` and `name=`.
      The others are those of `EncoderBlock`.
    """

    attention: Callable[..., nn.Module]
    mlp_dim: int
    dropout_rate: float = 0.0
    hidden_dropout_rate: float | None = None
    drop_path_rate: float = 0.0
    norm_first: bool = True
    layer_scale: float | None = None
    layer_norm_eps: float = 1e-6
    activation: str = 'gelu'
    remat: str = 'none'
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        encoded: Array,
        *,
        self_mask: Array | None = None,
        cross_mask: Array | None = None,
        decode: bool = False,
        train: bool = False,
    ) -> Array:
        """Decodes tokens.

        Args:
          x: `[B, T, D]`, the target; token t sees tokens up to t.
          encoded: `[B, S, E]`, the source.
          self_mask: broadcastable to `[B, N, T, T]`, beside the causal mask; to
            `[B, N, T, L]`, L the length of the cache, where tokens are decoded.
          cross_mask: broadcastable to `[B, N, T, S]`.
          decode: whether `x` follows the tokens of earlier calls, see
            `MultiHeadAttention`.
          train: whether dropout is on.

        Returns:
          `[B, T, D]`.

        >>> import jax
        >>> from functools import partial
        >>> from vit_jax.layers.attention import MultiHeadAttention
        >>> block = DecoderBlock(partial(MultiHeadAttention, num_heads=2), mlp_dim=16)
        >>> target, source = jnp.ones((3, 5, 8)), jnp.ones((3, 7, 8))
        >>> params = block.init(jax.random.key(0), target, source)
        >>> block.apply(params, target, source).shape
        (3, 5, 8)
        """

        def decode_tokens(self: DecoderBlock, x: Array, encoded: Array) -> Array:
            def attend_self(x: Array) -> Array:
                attention = self.attention(causal=True, name='self_attention')
                x = attention(x, mask=self_mask, decode=decode, train=train)
                return Dropout(self.dropout_rate, name='self_dropout')(x, train=train)

            def attend_source(x: Array) -> Array:
                attention = self.attention(causal=False, name='cross_attention')
                x = attention(x, encoded, mask=cross_mask, decode=decode, train=train)
                return Dropout(self.dropout_rate, name='cross_dropout')(x, train=train)

            x = _residual(self, 1, attend_self, x, train)
            x = _residual(self, 2, attend_source, x, train)
            return _residual(self, 3, _mlp(self, train), x, train)

        # Decoding with a cache has no backward pass that could compute anything again.
        remat = 'none' if decode else self.remat
        return _lift(decode_tokens, self, remat)(self, x, encoded)


class LayerScale(nn.Module):
    """A learned factor for each feature of a residual branch.

    "Going deeper with Image Transformers", arXiv 2103.17239, section 2: from a small
    start, a deep network is near the identity.

    Attributes:
      start: of all factors.
    """

    start: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Args: x, `[B, T, D]`, a residual branch. Returns the same shape.

        >>> import jax
        >>> x = jnp.ones((1, 1, 2))
        >>> LayerScale(0.1).init_with_output(jax.random.key(0), x)[0]
        Array([[[0.1, 0.1]]], dtype=float32)
        """
        init = nn.initializers.constant(self.start)
        scale = self.param('scale', init, x.shape[-1:], jnp.float32)
        return x * scale.astype(x.dtype)


def _lift(
    body: Callable[..., Array], block: EncoderBlock | DecoderBlock, remat: str
) -> Callable[..., Array]:
    """`body(block, ...)`: its parameters whole, computed again as `remat` says."""
    if remat not in REMAT:
        raise unknown('remat', remat, REMAT)
    body = gather_params(body, block, block.dtype)
    return body if remat == 'none' else nn.remat(body, policy=REMAT[remat])


def _residual(
    block: EncoderBlock | DecoderBlock,
    i: int,
    branch: Callable[[Array], Array],
    x: Array,
    train: bool,
) -> Array:
    """x + branch(norm(x)), or norm(x + branch(x)): the `i`-th of a block."""

    def scaled(x: Array) -> Array:
        x = branch(x)
        if block.layer_scale is not None:
            x = LayerScale(block.layer_scale, name=f'layer_scale{i}')(x)
        return drop_path(x, train=train)

    norm = layer_norm(block.layer_norm_eps, dtype=block.dtype, name=f'norm{i}')
    drop_path = DropPath(block.drop_path_rate, name=f'drop_path{i}')
    if block.norm_first:
        return keep_rows(x + scaled(norm(x)))
    return keep_rows(norm(x + scaled(x)))


def _mlp(block: EncoderBlock | DecoderBlock, train: bool) -> Callable[[Array], Array]:
    mlp = MlpBlock(
        block.mlp_dim,
        block.dropout_rate,
        block.activation,
        block.hidden_dropout_rate,
        kernel_init=block.kernel_init,
        dtype=block.dtype,
        name='mlp',
    )
    return lambda x: mlp(x, train=train)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth of each block: from 0 at the first to `rate` at the last.

    >>> drop_path_rates(0.5, 3)
    [0.0, 0.25, 0.5]
    """
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
