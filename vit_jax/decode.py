"""Sequences from a model that gives the logits of the next token: greedy, beam search.

The model is a function `step(tokens [R], cache) -> (logits [R, V], cache)`. Its cache
is any pytree: arrays whose first axis is the R rows, and scalars. The caller has run it
on the start of each sequence, so there are logits of the first token to begin with.

>>> import jax.numpy as jnp
>>> logits = jnp.log(jnp.array([  # of what follows tokens 0, 1, 2 and 3
...     [0.1, 0.1, 0.1, 0.7], [0.0, 0.2, 0.4, 0.4], [0.0, 0.9, 0.1, 0.0],
...     [0.0, 0.4, 0.3, 0.3]]))
>>> step = lambda tokens, cache: (logits[tokens], cache)
>>> start = jnp.log(jnp.array([[0.0, 0.0, 0.4, 0.6]]))
>>> greedy(start, {}, step, max_length=3, eos=1)
Array([[3, 1, 0]], dtype=int32)
>>> tokens, scores = beam_search(start, {}, step, beam=2, max_length=3, eos=1)
>>> tokens[:, 0]  # 0.4 * 0.9 is more than 0.6 * 0.4
Array([[2, 1, 0]], dtype=int32)
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from vit_jax.axes import ROW_AXES, keep_rows
from vit_jax.errors import UserError
from vit_jax.typing import Array

Step = Callable[[Array, Any], tuple[Array, Any]]

_MAX_CANDIDATES = 2**31 - 1  # which `top_k` counts in int32


def greedy(
    logits: Array,
    cache: Any,
    step: Step,
    *,
    max_length: int,
    eos: int,
    pad: int = 0,
    forbidden: tuple[int, ...] = (),
) -> Array:
    """The likeliest token at every step, the lowest id where several are.

    Args:
      logits: `[B, V]`, of the first token.
      cache: what `step` is given with the first token, B rows.
      step: see the module; rows that have ended are given `pad`.
      max_length: L, most tokens of a sequence, EOS included.
      eos: id of the token that ends a sequence.
      pad: what follows EOS; never chosen.
      forbidden: ids that are never chosen, beside `pad`.

    Returns:
      `[B, L]` int32: EOS is included where there is one.

    Raises:
      UserError: for sizes below 1, ids outside the vocabulary, and an `eos` that may
        not be chosen.
    """
    _check_sizes(max_length=max_length)
    blocked = _blocked(logits.shape[-1], eos, pad, forbidden)

    def choose(length: Array, tokens: Array, ended: Array, logits: Array):
        token = jnp.argmax(jnp.where(blocked, -jnp.inf, logits), axis=-1)
        token = jnp.where(ended, pad, token.astype(jnp.int32))
        return length + 1, tokens.at[:, length].set(token), ended | (token == eos)

    def goes_on(state) -> Array:
        (length, _, ended), _ = state
        return (length < max_length) & ~jnp.all(ended)

    def advance(state):
        (length, tokens, ended), cache = state
        logits, cache = step(tokens[:, length - 1], cache)
        return choose(length, tokens, ended, logits), cache

    batch = logits.shape[0]
    nothing = jnp.full((batch, max_length), pad, jnp.int32)
    begun = choose(jnp.int32(0), nothing, jnp.zeros(batch, bool), logits)
    (_, tokens, _), _ = jax.lax.while_loop(goes_on, advance, (begun, cache))
    return tokens


class Hypotheses(NamedTuple):
    """What a beam search knows after `length` tokens, K hypotheses of each kind.

    Those that are not there have the score -inf.

    Attributes:
      length: scalar int32, tokens of those that go on.
      tokens: `[B, K, L]` int32, those that go on.
      scores: `[B, K]` float32, their log probabilities.
      ended: `[B, K, L]` int32, those with EOS, best first.
      ended_scores: `[B, K]` float32, their penalised log probabilities.
    """

    length: Array
    tokens: Array
    scores: Array
    ended: Array
    ended_scores: Array


def beam_search(
    logits: Array,
    cache: Any,
    step: Step,
    *,
    beam: int,
    max_length: int,
    eos: int,
    pad: int = 0,
    forbidden: tuple[int, ...] = (),
    length_penalty: float = 0.6,
    fixed: Callable[[str], bool] | None = None,
) -> tuple[Array, Array]:
    """The K best sequences found by keeping the K likeliest at every step.

    Of all continuations of a row's hypotheses by one token, the K likeliest are kept.
    Those that end in EOS leave the beam for the K best that have ended, which the score
    of "Google's Neural Machine Translation System", arXiv 1609.08144, equation 14, puts
    in order: the log probability over lp(l) = ((5 + l) / 6)^length_penalty, l counting
    EOS. A beam of one is thus `greedy`.

    A row is done when none of its hypotheses can do better than the worst of its K
    that have ended. More tokens make no log probability s larger, and none is above 0,
    while lp grows with the length: s / lp(L) bounds all that a hypothesis can become.

    Args:
      logits: `[B, V]`, of the first token, of any floating dtype.
      cache: what `step` is given with the first token, B rows; they become B * K rows,
        those of an example side by side, and follow their hypotheses.
      step: see the module, for B * K rows.
      beam: K; may be larger than V.
      max_length: L, most tokens of a sequence, EOS included.
      eos: id of the token that ends a sequence.
      pad: what follows EOS; never chosen.
      forbidden: ids that are never chosen, beside `pad`. The others' probabilities stay
        as they are.
      length_penalty: 0 for plain log probabilities; the larger, the longer sequences.
      fixed: tells from the path of an array of the cache, such as
        'decoder/block00/cross_attention/cached_key', whether it is the same for all
        hypotheses of an example: keys and values of a source need not be moved.

    Returns:
      Tokens `[B, K, L]` int32 and scores `[B, K]` float32, best first. Where fewer than
      K sequences ended, the rest is `pad` with the score -inf; where none did, they are
      those of full length without EOS.

    Raises:
      UserError: for a `length_penalty` below 0 (its scores would have no such bound)
        or above 10 (they would all be 0), sizes below 1 or beyond what can be sorted,
        ids outside the vocabulary, and an `eos` that may not be chosen.
    """
    _check_sizes(beam=beam, max_length=max_length)
    if not 0.0 <= length_penalty <= 10.0:
        raise UserError(f'length_penalty must be from 0 to 10, not {length_penalty}')
    batch, vocabulary = logits.shape
    if beam * vocabulary > _MAX_CANDIDATES:
        raise UserError(
            f'a beam of {beam} has too many candidates, {vocabulary} each; it can be '
            f'at most {_MAX_CANDIDATES // vocabulary}'
        )
    lengths = np.arange(1, max_length + 1)
    penalties = jnp.asarray(((5 + lengths) / 6) ** length_penalty, jnp.float32)
    extend = partial(
        _extend,
        blocked=_blocked(vocabulary, eos, pad, forbidden),
        penalties=penalties,
        eos=eos,
    )

    def goes_on(state: tuple[Hypotheses, Any]) -> Array:
        hypotheses, _ = state
        bound = jnp.max(hypotheses.scores, axis=1) / penalties[-1]
        done = bound <= jnp.min(hypotheses.ended_scores, axis=1)
        return (hypotheses.length < max_length) & ~jnp.all(done)

    def advance(state: tuple[Hypotheses, Any]) -> tuple[Hypotheses, Any]:
        hypotheses, cache = state
        last = hypotheses.tokens[:, :, hypotheses.length - 1]
        logits, cache = step(last.reshape(-1), cache)
        hypotheses, parents = extend(hypotheses, logits.reshape(batch, beam, -1))
        return hypotheses, _reorder(cache, parents, fixed)

    nothing = jnp.full((batch, beam, max_length), pad, jnp.int32)
    none = jnp.full((batch, beam), -jnp.inf, jnp.float32)
    # One hypothesis, the empty one: K equal ones would be extended alike.
    empty = Hypotheses(jnp.int32(0), nothing, none.at[:, 0].set(0.0), nothing, none)
    begun, _ = extend(
        empty, jnp.broadcast_to(logits[:, None], (batch, beam, vocabulary))
    )
    state = begun, _repeat(cache, beam)
    hypotheses, _ = jax.lax.while_loop(goes_on, advance, state)

    some_ended = hypotheses.ended_scores[:, :1] > -jnp.inf
    scores = jnp.where(
        some_ended, hypotheses.ended_scores, hypotheses.scores / penalties[-1]
    )
    tokens = jnp.where(some_ended[..., None], hypotheses.ended, hypotheses.tokens)
    return jnp.where(scores[..., None] > -jnp.inf, tokens, pad), scores


def _extend(
    hypotheses: Hypotheses,
    logits: Array,
    *,
    blocked: Array,
    penalties: Array,
    eos: int,
) -> tuple[Hypotheses, Array]:
    """The K likeliest continuations of hypotheses by a token.

    Args:
      hypotheses: after `length` tokens.
      logits: `[B, K, V]`, of the next token.
      blocked: `[V]` boolean, ids that are never chosen.
      penalties: `[L]`, what divides the log probabilities of 1, ..., L tokens.
      eos: id that ends a sequence.

    Returns:
      Hypotheses after one token more, and `[B, K]`, which one each has come from.
    """
    batch, beam, vocabulary = logits.shape
    length, tokens, scores, ended, ended_scores = hypotheses
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    log_probs = jnp.where(blocked, -jnp.inf, log_probs)
    candidates = (scores[..., None] + log_probs).reshape(batch, beam * vocabulary)
    scores, chosen = _top_k(candidates, beam)
    parents, token = chosen // vocabulary, chosen % vocabulary
    tokens = _take(tokens, parents).at[:, :, length].set(token)

    ends = token == eos
    new_scores = jnp.where(ends, scores / penalties[length], -jnp.inf)
    # At equal scores the earlier ones stay: a row that is done does not change.
    all_ended = jnp.concatenate([ended, tokens], axis=1)
    all_scores = jnp.concatenate([ended_scores, new_scores], axis=1)
    ended_scores, best = _top_k(all_scores, beam)
    ended = _take(all_ended, best)

    scores = jnp.where(ends, -jnp.inf, scores)
    return Hypotheses(length + 1, tokens, scores, ended, ended_scores), parents


def _top_k(x: Array, k: int) -> tuple[Array, Array]:
    """The k largest of each row of `x` `[B, M]`, and where they are.

    XLA sends all rows to all devices for it, if it is not told that each device may
    sort its own.
    """
    top_k = partial(jax.lax.top_k, k=k)
    if 'fsdp' not in jax.sharding.get_abstract_mesh().axis_names:
        return top_k(x)
    rows = PartitionSpec(ROW_AXES)
    return jax.shard_map(top_k, in_specs=rows, out_specs=rows)(x)


def _take(x: Array, indices: Array) -> Array:
    """`[B, K, ...]` -> `x[b, indices[b]]` of each example, `indices` `[B, K']`."""
    return keep_rows(jax.vmap(lambda x, i: x[i])(x, indices))


def _repeat(cache: Any, beam: int) -> Any:
    """B rows to B * K: each K times, side by side; scalars stay."""
    return jax.tree.map(
        lambda x: keep_rows(jnp.repeat(x, beam, axis=0)) if jnp.ndim(x) else x, cache
    )


def _reorder(cache: Any, parents: Array, fixed: Callable[[str], bool] | None) -> Any:
    """Gives each hypothesis the rows of the one it has come from.

    Args:
      cache: arrays of B * K rows, and scalars, which stay.
      parents: `[B, K]`.
      fixed: tells from its path whether an array stays too.
    """

    def move(path, x: Array) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        if not jnp.ndim(x) or (fixed is not None and fixed(name)):
            return x
        rows = x.reshape(*parents.shape, *x.shape[1:])
        return keep_rows(_take(rows, parents).reshape(x.shape))

    return jax.tree_util.tree_map_with_path(move, cache)


def _blocked(vocabulary: int, eos: int, pad: int, forbidden: tuple[int, ...]) -> Array:
    """`[V]` boolean: ids that are never chosen."""
    for token in (eos, pad, *forbidden):
        if not 0 <= token < vocabulary:
            raise UserError(f'token {token} is outside the vocabulary of {vocabulary}')
    blocked = np.zeros(vocabulary, bool)
    blocked[[pad, *forbidden]] = True
    if blocked[eos]:
        raise UserError(f'eos {eos} may not be pad or forbidden: nothing would end')
    return jnp.asarray(blocked)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f'{name} must be above 0, not {size}')
