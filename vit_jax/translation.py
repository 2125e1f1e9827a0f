"""Sentences to sentences: a model, its tokens, a way to decode, and how good it is."""

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.data.buckets import (
    Bucket,
    decoding_buckets,
    encode_sources,
    evaluation_batches,
)
from vit_jax.data.input_pipeline import Shard
from vit_jax.data.text import Pairs
from vit_jax.data.tokenizer import BOS, EOS, PAD, UNK, Tokenizer
from vit_jax.decode import beam_search, greedy
from vit_jax.errors import UserError, unknown
from vit_jax.parallel import Parallel
from vit_jax.typing import Array, Batch, Variables

log = logging.getLogger(__name__)

SCORES = ('bleu', 'exact_match', 'none')


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How sentences are decoded.

    Attributes:
      beam: hypotheses that are kept; 1 is greedy decoding.
      length_penalty: of beam search, see `beam_search`.
      extra_length: tokens that a target may have more than its source is padded to.
    """

    beam: int = 1
    length_penalty: float = 0.6
    extra_length: int = 50


def decode_batch(
    variables: Variables, source: Array, *, model: nn.Module, how: Decoding
) -> Array:
    """Translates a batch of sentences, token by token, with cached keys and values.

    Args:
      variables: the model's.
      source: `[B, S]` int32, tokens, EOS, then PAD.
      model: with the methods `encode` and `decode` of `Transformer`.
      how: see `Decoding`.

    Returns:
      `[B, S + extra_length]` int32, with EOS where it ended, then PAD.
    """
    max_length = source.shape[1] + how.extra_length
    model = model.clone(cache_length=max_length)
    encoded = model.apply(variables, source, method='encode')

    def step(tokens: Array, cache: Any) -> tuple[Array, Any]:
        beams = tokens.shape[0] // source.shape[0]  # of each sentence
        given = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), (encoded, source))
        logits, changed = model.apply(
            {**variables, **cache},
            tokens[:, None],
            *given,
            cached=True,
            method='decode',
            mutable=['cache'],
        )
        return logits[:, 0], changed  # type: ignore[index]

    start = jnp.full(source.shape[:1], BOS, jnp.int32)
    logits, cache = step(start, {})
    options: dict[str, Any] = {
        'max_length': max_length,
        'eos': EOS,
        'pad': PAD,
        'forbidden': (BOS, UNK),
    }
    if how.beam == 1:
        return greedy(logits, cache, step, **options)
    tokens, _ = beam_search(
        logits,
        cache,
        step,
        beam=how.beam,
        length_penalty=how.length_penalty,
        fixed=lambda path: 'cross_attention' in path,
        **options,
    )
    return tokens[:, 0]


def to_text(rows: Sequence[np.ndarray], tokenizer: Tokenizer) -> list[str]:
    """The text of decoded tokens.

    A vocabulary may have fewer tokens than the model has logits ('char' has as many as
    there are characters): what a model that has learned little says beyond is UNK.
    """
    size = tokenizer.vocab_size
    texts = tokenizer.decode([np.where(row < size, row, UNK) for row in rows])
    return [re.sub(r'[\r\n]+', ' ', text) for text in texts]  # of single bytes


@dataclasses.dataclass(frozen=True)
class Translator:
    """Translates with a model.

    Attributes:
      model: see `decode_batch`.
      how: see `Decoding`.
      parallel: where it runs; rows of a batch are split over the devices.
    """

    model: nn.Module
    how: Decoding
    parallel: Parallel

    @functools.cached_property
    def _program(self) -> Callable[[Variables, Batch], dict[str, Array]]:
        """Compiled, once for each shape of a batch."""

        def program(variables: Variables, batch: Batch) -> dict[str, Array]:
            tokens = decode_batch(
                variables, batch['source'], model=self.model, how=self.how
            )
            return {'index': batch['index'], 'tokens': tokens}

        return self._on_mesh.eval_step(program)

    @property
    def _on_mesh(self) -> Parallel:
        # What `pmap` returns here would be the same on all devices; rows are not.
        return dataclasses.replace(self.parallel, mode='jit')

    def decode_sources(
        self,
        variables: Variables,
        ids: Sequence[np.ndarray],
        buckets: tuple[Bucket, ...],
    ) -> list[np.ndarray]:
        """The tokens of each translation, in their order.

        Args:
          variables: the model's.
          ids: of each sentence, without its EOS; at least one sentence.
          buckets: most that a batch may hold, see `decoding_buckets`.
        """
        encoded = encode_sources(ids)
        shapes = decoding_buckets(
            buckets,
            encoded.lengths,
            beam=self.how.beam,
            multiple=self.parallel.data * self.parallel.fsdp,
        )
        shard = Shard(jax.process_index(), jax.process_count())
        found: dict[int, np.ndarray] = {}  # by the number of the sentence; -1: padding
        with closing(evaluation_batches(encoded, shapes, shard=shard)) as batches:
            given = ({k: batch[k] for k in ('source', 'index')} for batch in batches)
            for batch in self._on_mesh.prefetch(given):
                out = jax.device_get(self._program(variables, batch))
                found |= dict(zip(out['index'].tolist(), out['tokens']))
        return [found[i] for i in range(len(ids))]

    def translate(
        self,
        variables: Variables,
        lines: Sequence[str],
        tokenizer: Tokenizer,
        buckets: tuple[Bucket, ...],
        first: int = 1,
    ) -> list[str]:
        """Translates lines, in their order; an empty one stays empty.

        A line that is too long for the buckets is cut, which is told.

        Args:
          variables: the model's.
          lines: without their ends.
          tokenizer: of the model.
          buckets: most that a batch may hold.
          first: number of the first line, for what is told.
        """
        ids, longest = tokenizer.encode(lines), buckets[-1].length - 1  # and EOS
        for i, row in enumerate(ids):
            if row.size > longest:
                log.warning(
                    'line %d has %d tokens; what follows the first %d is left out',
                    first + i,
                    row.size,
                    longest,
                )
                ids[i] = row[:longest]
        kept = [i for i, row in enumerate(ids) if row.size]
        out = [''] * len(lines)
        if not kept:
            return out
        tokens = self.decode_sources(variables, [ids[i] for i in kept], buckets)
        for i, text in zip(kept, to_text(tokens, tokenizer)):
            out[i] = text
        return out


@dataclasses.dataclass(frozen=True)
class TranslationScore:
    """How good the translations of a split are.

    Attributes:
      kind: 'bleu' (sacrebleu's, of the text as it is and in lower case),
        'exact_match', or 'none'; perplexity is always told.
      translator: translates, as `vit_jax translate` does: what the references are like
        has no influence.
      buckets: most that its batches hold.
      pairs: () -> the split.
      tokenizer: () -> that of the run.
    """

    kind: str
    translator: Translator
    buckets: tuple[Bucket, ...]
    pairs: Callable[[], Pairs]
    tokenizer: Callable[[], Tokenizer]

    def __post_init__(self) -> None:
        if self.kind not in SCORES:
            raise unknown('text.score', self.kind, SCORES)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the metrics."""
        more = {'bleu': ('bleu', 'bleu_lower_case'), 'exact_match': ('exact_match',)}
        return 'perplexity', *more.get(self.kind, ())

    @property
    def signature(self) -> str | None:
        """What sacrebleu says of how it counts, to be told with every BLEU."""
        if self.kind != 'bleu':
            return None
        metric = _bleu()
        metric.corpus_score(['a'], [['a']])  # it does not know before
        return metric.get_signature().format()

    def __call__(
        self, variables: Variables, means: dict[str, float]
    ) -> dict[str, float]:
        """The metrics.

        Args:
          variables: the model's.
          means: of the pass over batches, 'loss' among them.
        """
        result = {'perplexity': float(np.exp(min(means['loss'], 700.0)))}
        if self.kind == 'none':
            return result
        (sources, references), tokenizer = self.pairs(), self.tokenizer()
        texts = self.translator.translate(variables, sources, tokenizer, self.buckets)
        if self.kind == 'exact_match':
            # Of text as the tokenizer has it: with single spaces, for one.
            references = tokenizer.decode(tokenizer.encode(references))
            hits = [text == wanted for text, wanted in zip(texts, references)]
            return {**result, 'exact_match': float(np.mean(hits))}
        for name, lowercase in (('bleu', False), ('bleu_lower_case', True)):
            metric = _bleu(lowercase)
            result[name] = metric.corpus_score(texts, [references]).score
        return result


def _bleu(lowercase: bool = False) -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise UserError(
            "BLEU needs sacrebleu: install the extra, pip install -e '.[text]', or set "
            "config.text.score='none'"
        ) from error
    return BLEU(lowercase=lowercase)
