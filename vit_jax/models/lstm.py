"""An LSTM encoder-decoder, with attention: the baseline that the Transformer replaced.

"Effective Approaches to Attention-based Neural Machine Translation", arXiv 1508.04025:
global attention with the score 'general' (section 3.1) and input feeding (section 3.3).
The encoder reads both ways, as in arXiv 1409.0473; dropout is on the connections that
are not recurrent, as in arXiv 1409.2329. Without attention it is that of "Sequence to
Sequence Learning with Neural Networks", arXiv 1409.3215: all that the decoder knows of
the source is the last state of the encoder.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.axes import keep_rows
from vit_jax.errors import UserError
from vit_jax.layers.stochastic import Dropout
from vit_jax.typing import Array, Dtype

Carry = tuple[Array, Array]  # (cell, hidden), `[B, D]` each


def global_attention(
    query: Array, key: Array, value: Array, mask: Array
) -> tuple[Array, Array]:
    """softmax(q k^T) v for one query of each example, the softmax in float32.

    Luong's 'general' score is q^T W v: the keys are the values times W. It is not
    divided by the square root of the width.

    Args:
      query: `[B, D]`.
      key, value: `[B, S, D]`.
      mask: `[B, S]` boolean, True = keep.

    Returns:
      `[B, D]`, of the dtype of `value`, and the weights `[B, S]`, float32; 0 where the
      mask keeps nothing.

    >>> x = jnp.ones((2, 3, 5))
    >>> context, attn_weights = global_attention(
    ...     x[:, 0], x, x, jnp.ones((2, 3), bool))
    >>> context.shape, attn_weights.shape
    ((2, 5), (2, 3))
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum('BD,BSD->BS', query, key, preferred_element_type=dtype)
    logits = jnp.where(mask, logits, jnp.finfo(dtype).min)
    attn_weights = jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0.0)
    context = jnp.einsum('BS,BSD->BD', attn_weights.astype(value.dtype), value)
    return context, attn_weights


class BidirectionalLSTM(nn.Module):
    """Two LSTMs over a sequence, one from each end, side by side.

    Both step over padding, wherever it is, as if it were not there: the state at a
    token, and the last one, are those of the sequence without padding.

    Attributes:
      width: D, both directions together.
      dtype: dtype of the gates; the states are float32, as what cells sum up would
        else be rounded at each token. Parameters are float32.
    """

    width: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> tuple[Array, Carry]:
        """Args: x, `[B, S, E]`; mask, `[B, S]` boolean, True = a token.

        Returns:
          States `[B, S, D]`, and the last (cell, hidden), `[B, D]` float32.

        >>> layer = BidirectionalLSTM(8)
        >>> x, mask = jnp.ones((2, 3, 5)), jnp.ones((2, 3), bool)
        >>> states, (cell, hidden) = layer.init_with_output(
        ...     jax.random.key(0), x, mask)[0]
        >>> states.shape, cell.shape
        ((2, 3, 8), (2, 8))
        """
        forward = self._scan('forward', x, mask)
        backward = self._scan('backward', x, mask)
        return jax.tree.map(lambda *both: jnp.concatenate(both, -1), forward, backward)

    def _scan(self, name: str, x: Array, mask: Array) -> tuple[Array, Carry]:
        def advance(cell: nn.Module, carry: Carry, args: tuple[Array, Array]):
            x, keep = args
            after, _ = cell(carry, x)
            carry = jax.tree.map(
                lambda new, old: jnp.where(keep[:, None], new, old), after, carry
            )
            return carry, carry[1].astype(self.dtype)

        # Not `nn.RNN`: its `seq_lengths` are of padding at the end only, and a row of
        # nothing else would have the state after its padding.
        scan = nn.scan(
            advance,
            variable_broadcast='params',
            split_rngs={'params': False},
            in_axes=1,
            out_axes=1,
            reverse=name == 'backward',
        )
        size = self.width // 2
        cell = nn.OptimizedLSTMCell(size, dtype=self.dtype, name=name)
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        zeros = jnp.zeros((x.shape[0], size), dtype)
        carry, states = scan(cell, (zeros, zeros), (x, mask))
        return states, carry


class LSTMDecoder(nn.Module):
    """LSTMs over the target, which see what they have attended to before.

    Each step is given its token beside the attentional vector of the step before
    (input feeding); the last LSTM's state h attends to the source, and the next vector
    is tanh(W [context, h]), arXiv 1508.04025, equation 5. The weights of the attention
    are sown as `attention_weights`, `[B, 1, T, S]`. Without a source to attend to, a
    step is given its token alone, and h is what comes out.

    Attributes:
      width: D.
      depth: number of LSTMs.
      dropout_rate: dropout of what each LSTM is given, but for its own state.
      dtype: of the computation, see `BidirectionalLSTM`.
    """

    width: int
    depth: int
    dropout_rate: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        start: tuple[Carry, ...],
        key: Array | None = None,
        value: Array | None = None,
        mask: Array | None = None,
        *,
        cached: bool = False,
        train: bool = False,
    ) -> Array:
        """Decodes tokens.

        Args:
          x: `[B, T, D]`, embedded tokens.
          start: the (cell, hidden) that each LSTM begins with, `[B, D]` float32.
          key, value: `[B, S, D]`, of the source; None: there is no attention.
          mask: `[B, S]` boolean, True = a token of the source; None with them.
          cached: whether `x` follows the tokens of earlier calls. The collection
            'cache', which must be mutable, has what they left; it starts absent, and
            `start` is not looked at again.
          train: whether dropout is on.

        Returns:
          Attentional vectors `[B, T, D]`, or states.

        Raises:
          UserError: for a cache of another B.

        >>> decoder = LSTMDecoder(width=8, depth=1)
        >>> x, source = jnp.ones((2, 3, 8)), jnp.ones((2, 5, 8))
        >>> zeros = jnp.zeros((2, 8))
        >>> args = x, ((zeros, zeros),), source, source, jnp.ones((2, 5), bool)
        >>> decoder.init_with_output(jax.random.key(0), *args)[0].shape
        (2, 3, 8)
        """
        batch = x.shape[0]
        carry = start, jnp.zeros((batch, self.width), self.dtype)
        # What `init` is given is nothing to remember.
        cached = cached and not self.is_initializing()
        if cached:
            memory = self.variable('cache', 'carry', lambda: carry)
            carry = memory.value
            if carry[1].shape[0] != batch:
                raise UserError(
                    f'the cache has {carry[1].shape[0]} rows, the target {batch}'
                )

        attend: Callable[[Array], tuple[Array, Array]] | None = None
        if key is not None and value is not None and mask is not None:
            attend = partial(global_attention, key=key, value=value, mask=mask)

        def advance(self: LSTMDecoder, carry: Any, x: Array):
            (states, vector), after = carry, []
            if attend:
                x = jnp.concatenate([x, vector], axis=-1)
            for i, state in enumerate(states):
                x = Dropout(self.dropout_rate, name=f'dropout{i:02d}')(x, train=train)
                cell = nn.OptimizedLSTMCell(
                    self.width, dtype=self.dtype, name=f'layer{i:02d}'
                )
                state, x = cell(state, x)
                x = x.astype(self.dtype)
                after.append(state)
            if attend:
                context, attn_weights = attend(x)
                # Of one query and one head; the scan lays the queries side by side.
                self.sow('intermediates', 'attention_weights', attn_weights[:, None])
                combine = nn.Dense(
                    self.width, use_bias=False, dtype=self.dtype, name='combine'
                )
                x = jnp.tanh(combine(jnp.concatenate([context, x], axis=-1)))
            return (tuple(after), x), x

        scan = nn.scan(
            advance,
            variable_axes={'intermediates': 2},
            variable_broadcast='params',
            split_rngs={'params': False, 'dropout': True},
            in_axes=1,
            out_axes=1,
        )
        carry, vectors = scan(self, carry, x)
        if cached:
            memory.value = carry
        return vectors


class LSTM(nn.Module):
    """Reads a source both ways, and writes the target token by token.

    Attributes:
      num_classes: V, size of the vocabulary that source and target share.
      width: D, even: of embeddings, of both directions of the encoder together, and of
        the decoder.
      depth: number of LSTMs of the encoder, and of the decoder. The last state of an
        encoder's LSTM is the first one of the decoder's at the same depth.
      attention: whether the decoder attends to the source; if not, that state is all it
        has of it.
      share_embeddings: whether source and target have one table of embeddings.
      tie_output: whether that of the target gives the logits too.
      dropout_rate: dropout of what each LSTM is given, but for its own state, and
        before the logits.
      max_length, cache_length: not used, as nothing here depends on the length; they
        are fields of the Transformer, which may take this model's place.
      dtype: dtype of the computation; states of LSTMs, logits and parameters are
        float32.
      pad_id: the token that is padding.
    """

    num_classes: int
    width: int = 256
    depth: int = 2
    attention: bool = True
    share_embeddings: bool = True
    tie_output: bool = True
    dropout_rate: float = 0.2
    max_length: int = 256
    cache_length: int | None = None
    dtype: Dtype = jnp.float32
    pad_id: int = 0

    def setup(self) -> None:
        if self.width % 2:
            raise UserError(
                f'width must be even, half for each direction, not {self.width}'
            )

        def embed() -> nn.Embed:
            return nn.Embed(self.num_classes, self.width, dtype=self.dtype)

        if self.share_embeddings:
            self.embedding = embed()
            self.source_embedding = self.target_embedding = self.embedding
        else:
            self.source_embedding, self.target_embedding = embed(), embed()
        self.encoder = [
            BidirectionalLSTM(self.width, dtype=self.dtype) for _ in range(self.depth)
        ]
        if self.attention:
            self.key = nn.Dense(self.width, use_bias=False, dtype=self.dtype)
        self.decoder = LSTMDecoder(
            self.width, self.depth, self.dropout_rate, dtype=self.dtype
        )
        self.dropout = Dropout(self.dropout_rate)
        if not self.tie_output:
            self.logits = nn.Dense(self.num_classes, use_bias=False)

    def __call__(self, source: Array, target: Array, *, train: bool = False) -> Array:
        """Logits of all tokens of the target, each from those before it.

        Args:
          source: `[B, S]` integers; padding does not matter, wherever it is.
          target: `[B, T]` integers, what the decoder is given: the target behind a
            token that begins it.
          train: whether dropout is on (rng 'dropout').

        Returns:
          `[B, T, V]` float32, of the token that follows each.

        Raises:
          UserError: for an odd width, and where source and target differ in B.

        >>> model = LSTM(num_classes=11, width=8, depth=1)
        >>> source, target = jnp.array([[3, 5, 7, 0]]), jnp.array([[1, 4, 6]])
        >>> params = model.init(jax.random.key(0), source, target)
        >>> model.apply(params, source, target).shape
        (1, 3, 11)
        """
        encoded = self.encode(source, train=train)
        return self.decode(target, encoded, source, train=train)

    def encode(self, source: Array, *, train: bool = False) -> dict[str, Any]:
        """What the decoder needs of a source `[B, S]`.

        Args:
          source: `[B, S]` integers.
          train: whether dropout is on.

        Returns:
          'carry', the (cell, hidden) that each LSTM of the decoder begins with,
          `[B, D]` float32; with attention also its 'value' and 'key', `[B, S, D]`.
        """
        x, mask, carry = self.source_embedding(source), source != self.pad_id, []
        for layer in self.encoder:
            x, last = layer(self.dropout(x, train=train), mask)
            x = keep_rows(x)
            carry.append(last)
        encoded: dict[str, Any] = {'carry': tuple(carry)}
        if self.attention:
            encoded |= {'value': x, 'key': self.key(x)}
        return encoded

    def decode(
        self,
        target: Array,
        encoded: dict[str, Any],
        source: Array,
        *,
        cached: bool = False,
        train: bool = False,
    ) -> Array:
        """Logits of what follows each token of the target.

        Args:
          target: `[B, T]` integers, see `__call__`; the next ones, if cached.
          encoded: what `encode` has made of `source`.
          source: `[B, S]` integers, for its padding.
          cached: whether `target` follows the tokens of earlier calls, see
            `LSTMDecoder`.
          train: whether dropout is on.

        Returns:
          `[B, T, V]` float32.

        Raises:
          UserError: for a cache, or a source, of another B.
        """
        if len(source) != len(target):
            raise UserError(
                f'source and target must have as many rows: {len(source)} are not '
                f'{len(target)}'
            )
        attended: tuple[Array, ...] = ()
        if self.attention:
            attended = encoded['key'], encoded['value'], source != self.pad_id
        x = self.decoder(
            self.target_embedding(target),
            encoded['carry'],
            *attended,
            cached=cached,
            train=train,
        )
        x = keep_rows(self.dropout(x, train=train))
        if not self.tie_output:
            return self.logits(x.astype(jnp.float32))
        embedding = self.target_embedding.embedding.astype(x.dtype)
        return jnp.einsum(
            'BTD,VD->BTV', x, embedding, preferred_element_type=jnp.float32
        )
