"""The Transformer: an encoder of the source, a decoder that writes the target.

"Attention Is All You Need", arXiv 1706.03762, of the blocks that ViT is made of.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.axes import keep_rows
from vit_jax.errors import UserError
from vit_jax.layers.attention import MultiHeadAttention, padding_mask
from vit_jax.layers.blocks import DecoderBlock, EncoderBlock
from vit_jax.layers.norm import layer_norm
from vit_jax.layers.position import PositionEmbedding
from vit_jax.layers.stochastic import Dropout
from vit_jax.typing import Array, Dtype, Initializer


class Transformer(nn.Module):
    """Logits of each next token of a target, given a source.

    Three methods: `__call__` for training, where all tokens of the target are known;
    `encode`, then `decode`, for writing a target token by token.

    Differences from the paper: sines fill the first half of a position's features and
    cosines the second (section 3.5 takes turns, which is a permutation of features).

    Attributes:
      num_classes: V, size of the vocabulary, which source and target share.
      width: D, size of a token.
      depth: number of encoder blocks.
      decoder_depth: number of decoder blocks; None for `depth`.
      mlp_dim: F, hidden size of the MLPs.
      num_heads: heads of every attention.
      posemb: position embedding of tokens in a row, see `PositionEmbedding`; learned,
        source and target have one each.
      norm_first: norms inside the branches and one behind each stack; False, as in the
        paper, puts them after the sums, see `EncoderBlock`.
      share_embeddings: whether source and target have the same embedding (section 3.4).
      tie_output: whether the logits are products with the target's embedding (section
        3.4), or of a linear map of their own.
      dropout_rate: dropout of the sums of embeddings and positions and of the output of
        each sub-layer (section 5.4), not of the MLPs' hidden units.
      attention_dropout_rate: dropout of the attention weights.
      max_length: rows of learned positions, and the longest cache.
      cache_length: most tokens that cached decoding may see; None for `max_length`. No
        parameter depends on it: `model.clone(cache_length=n)` decodes with the same.
      activation: see `get_activation`.
      layer_norm_eps: epsilon of the LayerNorms.
      attention_impl: see `dot_product_attention`.
      remat: what the backward pass computes again, see `EncoderBlock`.
      kernel_init: initializer of the linear maps.
      dtype: dtype of the computation; parameters are float32.
      pad_id: the token that fills a source up, which nothing attends to.
    """

    num_classes: int
    width: int = 512
    depth: int = 6
    decoder_depth: int | None = None
    mlp_dim: int = 2048
    num_heads: int = 8
    posemb: str = 'sincos1d'
    norm_first: bool = False
    share_embeddings: bool = True
    tie_output: bool = True
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.0
    max_length: int = 256
    cache_length: int | None = None
    activation: str = 'relu'
    layer_norm_eps: float = 1e-6
    attention_impl: str = 'auto'
    remat: str = 'none'
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: Dtype = jnp.float32
    pad_id: int = 0

    def setup(self) -> None:
        if self.num_classes is None:
            raise UserError('a Transformer needs num_classes, the size of a vocabulary')
        cache_length = self.cache_length or self.max_length
        if cache_length > self.max_length:
            raise UserError(
                f'cache_length {cache_length} is above max_length {self.max_length}'
            )
        embed = partial(
            nn.Embed,
            self.num_classes,
            self.width,
            embedding_init=nn.initializers.normal(self.width**-0.5),
            dtype=self.dtype,
        )
        self.target_embed = embed()
        self.source_embed = self.target_embed if self.share_embeddings else embed()
        self.source_posemb = Positions(self.posemb, self.max_length)
        self.target_posemb = Positions(self.posemb, self.max_length)
        self.source_dropout = Dropout(self.dropout_rate)
        self.target_dropout = Dropout(self.dropout_rate)

        attention = partial(
            MultiHeadAttention,
            num_heads=self.num_heads,
            dropout_rate=self.attention_dropout_rate,
            impl=self.attention_impl,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
        )
        fields = {
            'mlp_dim': self.mlp_dim,
            'dropout_rate': self.dropout_rate,
            'hidden_dropout_rate': 0.0,
            'norm_first': self.norm_first,
            'layer_norm_eps': self.layer_norm_eps,
            'activation': self.activation,
            'remat': self.remat,
            'kernel_init': self.kernel_init,
            'dtype': self.dtype,
        }
        norm = partial(layer_norm, self.layer_norm_eps, dtype=self.dtype)
        last = norm if self.norm_first else None
        block: Callable[..., nn.Module] = partial(EncoderBlock, attention, **fields)
        self.encoder = Stack(block, self.depth, last)
        attention = partial(attention, cache_length=cache_length)
        block = partial(DecoderBlock, attention, **fields)
        depth = self.depth if self.decoder_depth is None else self.decoder_depth
        self.decoder = Stack(block, depth, last)
        if not self.tie_output:
            self.output = nn.Dense(
                self.num_classes,
                use_bias=False,
                kernel_init=self.kernel_init,
                dtype=self.dtype,
                dot_general=partial(
                    jax.lax.dot_general, preferred_element_type=jnp.float32
                ),
            )

    def __call__(self, source: Array, target: Array, *, train: bool = False) -> Array:
        """Predicts the token after each of the target.

        Args:
          source: `[B, S]` integers below V, `pad_id` where there is no token.
          target: `[B, T]` integers below V, what the decoder reads: the target behind a
            token that starts it. Logits t depend on no token after t.
          train: whether dropout is on (rng 'dropout').

        Returns:
          Logits `[B, T, V]`, float32.

        Raises:
          UserError: for arrays that are no tokens, more of them than learned positions,
            or fields that do not fit each other.

        >>> model = Transformer(11, width=8, depth=1, mlp_dim=16, num_heads=2)
        >>> source, target = jnp.ones((3, 7), int), jnp.ones((3, 5), int)
        >>> variables = model.init(jax.random.key(0), source, target)
        >>> model.apply(variables, source, target).shape
        (3, 5, 11)
        """
        encoded = self.encode(source, train=train)
        return self.decode(target, encoded, source, train=train)

    def encode(self, source: Array, *, train: bool = False) -> Array:
        """Encodes a source.

        Args:
          source, train: see `__call__`.

        Returns:
          `[B, S, D]`; of no meaning where the source is padding.
        """
        _check_tokens('source', source)
        x = self.source_posemb(self._scaled(self.source_embed, source))
        x = self.source_dropout(keep_rows(x), train=train)
        return self.encoder(x, mask=self._source_mask(source), train=train)

    def decode(
        self,
        target: Array,
        encoded: Array,
        source: Array,
        *,
        cached: bool = False,
        train: bool = False,
    ) -> Array:
        """Predicts the token after each of the target, given an encoded source.

        Args:
          target: `[B, T]`, see `__call__`; cached, the tokens after those of earlier
            calls, one or many.
          encoded: `[B, S, D]` from `encode`; cached, it is read at the first call only.
          source: `[B, S]`, which tells the padding.
          cached: whether `target` follows on earlier calls, whose keys, values and
            number are in the collection 'cache' (mutable; absent at the first call).
          train: whether dropout is on.

        Returns:
          Logits `[B, T, V]`, float32; NaN for what is decoded beyond `cache_length`.

        Raises:
          UserError: as `__call__`, and for a single call with too many tokens.

        >>> model = Transformer(11, width=8, depth=1, mlp_dim=16, num_heads=2)
        >>> source, target = jnp.ones((3, 7), int), jnp.ones((3, 5), int)
        >>> variables = model.init(jax.random.key(0), source, target)
        >>> encoded = model.apply(variables, source, method='encode')
        >>> decode = partial(model.apply, method='decode', cached=True, mutable='cache')
        >>> start, cache = decode(variables, target[:, :4], encoded, source)
        >>> last, cache = decode({**variables, **cache}, target[:, 4:], encoded, source)
        >>> whole = model.apply(variables, source, target)
        >>> bool(jnp.allclose(whole, jnp.concatenate([start, last], 1), atol=1e-5))
        True
        """
        _check_tokens('target', target)
        x = self._scaled(self.target_embed, target)
        x = self.target_posemb(x, decode=cached)
        x = self.target_dropout(keep_rows(x), train=train)
        # Padding of the target needs no mask. It follows the tokens, so the causal mask
        # hides it from them; what is predicted after padding has no weight in a loss.
        x = self.decoder(
            x,
            encoded,
            cross_mask=self._source_mask(source),
            decode=cached,
            train=train,
        )
        if not self.tie_output:
            return keep_rows(self.output(x))
        table = self.target_embed.embedding.astype(self.dtype)
        logits = jnp.einsum('BTD,VD->BTV', x, table, preferred_element_type=jnp.float32)
        return keep_rows(logits)

    def _scaled(self, embed: nn.Embed, tokens: Array) -> Array:
        """Entries of deviation 1, beside those of the positions (section 3.4)."""
        return embed(tokens) * self.width**0.5

    def _source_mask(self, source: Array) -> Array:
        return padding_mask(source != self.pad_id)


class Stack(nn.Module):
    """Blocks one after the other, and a norm behind them.

    Attributes:
      block: makes a block from `name=`.
      depth: number of blocks.
      norm: makes the norm from `name=`; None where the last block ends with its own.
    """

    block: Callable[..., nn.Module]
    depth: int
    norm: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(self, x: Array, *args, **kwargs) -> Array:
        """Args: x, `[B, T, D]`; others, for every block. Returns `[B, T, D]`.

        >>> stack = Stack(partial(nn.Dense, 8), depth=2)
        >>> x = jnp.ones((3, 5, 8))
        >>> variables = stack.init(jax.random.key(0), x)
        >>> list(variables['params'])
        ['block00', 'block01']
        """
        for i in range(self.depth):
            x = self.block(name=f'block{i:02d}')(x, *args, **kwargs)
        return x if self.norm is None else self.norm(name='norm')(x)


class Positions(nn.Module):
    """Adds the embeddings of positions, which may go on from call to call.

    Attributes:
      kind: of tokens in a row, see `PositionEmbedding`.
      max_length: rows of learned embeddings.
    """

    kind: str
    max_length: int

    @nn.compact
    def __call__(self, x: Array, *, decode: bool = False) -> Array:
        """Adds the embeddings.

        Args:
          x: `[B, T, D]`.
          decode: whether `x` follows the tokens of earlier calls, whose number is in
            the collection 'cache'.

        Returns:
          `[B, T, D]`.

        Raises:
          UserError: for more tokens than learned positions, and as `PositionEmbedding`.

        >>> module, x = Positions('integer', 256), jnp.zeros((1, 2, 1))
        >>> _, cache = module.apply({}, x, decode=True, mutable='cache')
        >>> out, cache = module.apply(cache, x, decode=True, mutable='cache')
        >>> out.ravel()
        Array([2., 3.], dtype=float32)
        """
        length, width = x.shape[1:]
        if self.kind == 'learned' and length > self.max_length:
            raise UserError(
                f'{length} tokens are more than the learned positions; increase '
                f'max_length, {self.max_length}'
            )
        # A table of whole rows, for where decoding starts is known at run time only.
        num_rows = max(length, self.max_length)
        rows = jnp.zeros((1, num_rows, width), x.dtype)
        rows = PositionEmbedding(self.kind, name='table')(rows, (num_rows,))
        if not decode:
            return x + rows[:, :length]
        index = self.variable('cache', 'cache_index', jnp.zeros, (), jnp.int32)
        start = index.value
        if not self.is_initializing():
            index.value = start + length
        # Beyond the last row the slice stands still; the attention, whose cache is no
        # longer than this table, makes those tokens NaN.
        return x + jax.lax.dynamic_slice_in_dim(rows, start, length, axis=1)


def _check_tokens(name: str, tokens: Array) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(
            f'a {name} is tokens, integers [B, length]; got {tokens.dtype} of shape '
            f'{tokens.shape}'
        )
