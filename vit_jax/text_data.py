"""What a config says of sentence pairs: where they are, tokens, buckets, batches."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.config import ConfigReader
from vit_jax.data.buckets import (
    Bucket,
    Encoded,
    Plan,
    encode_pairs,
    evaluation_batches,
    make_buckets,
    training_batches,
)
from vit_jax.data.datasets import pick_eval_split
from vit_jax.data.input_pipeline import Shard
from vit_jax.data.text import GENERATED, Pairs, TextDataset, load_text
from vit_jax.data.vocabulary import Vocabulary
from vit_jax.data.watch import Watch
from vit_jax.errors import UserError
from vit_jax.parallel import Parallel
from vit_jax.task_data import TaskData, Units

log = logging.getLogger(__name__)

PAIRS = Units('pairs', 'tokens')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextData(TaskData):
    """The sentence pairs of a run; none has been read.

    The position in the data is the number of batches seen.

    Attributes:
      dataset: what is known of the pairs.
      vocabulary: tokens of both languages.
      buckets: shapes of the batches.
      eval_pairs: () -> the split to evaluate on, in words.
      The others are those of `TaskData`.
    """

    dataset: TextDataset
    vocabulary: Vocabulary
    buckets: tuple[Bucket, ...]
    eval_pairs: Callable[[], Pairs]


def make_text_data(c: ConfigReader, parallel: Parallel) -> TextData:
    """Reads the sections 'dataset' and 'text' of a config.

    Raises:
      UserError: for values that do not fit each other.
    """
    name = c.dataset.name
    generated = name.partition(':')[0] in GENERATED  # which are nowhere
    dataset = load_text(name, None if generated else c.dataset.data_dir)
    train_split, seed = c.dataset.train_split, c.seed
    timeout_seconds = c.dataset.timeout_seconds
    rows = parallel.data * parallel.fsdp * c.accum_steps
    lengths = tuple(c.text.buckets) or _longest(dataset)
    buckets = make_buckets(lengths, c.text.tokens_per_batch, rows)
    shard = Shard(jax.process_index(), jax.process_count())

    def train_lines() -> itertools.chain[str]:
        pairs = dataset.open(train_split)
        # In turns: where only the first lines are learned from, they are of both.
        return itertools.chain.from_iterable(zip(pairs.source, pairs.target))

    vocabulary = Vocabulary(
        train_lines, c.text.vocab_size, c.text.tokenizer, c.init.weights
    )

    @functools.cache
    def planned() -> tuple[Encoded, Plan]:
        encoded = encode_pairs(dataset.open(train_split), vocabulary.tokenizer)
        plan = Plan(encoded.lengths, buckets, seed)
        if plan.too_long:
            log.warning(
                '%s of %s pairs to train on are longer than %d tokens, the longest of '
                'config.text.buckets: they are left out',
                f'{plan.too_long:,}',
                f'{len(encoded):,}',
                buckets[-1].length,
            )
        return encoded, plan

    def train_data(start: int) -> Watch:
        return training_batches(
            *planned(), start=start, shard=shard, timeout_seconds=timeout_seconds
        )

    def seen(position: int) -> dict[str, float]:
        _, plan = planned()
        return {
            'examples_seen': plan.examples_before(position),
            'epoch': position / plan.batches_per_epoch,
        }

    def read_facts() -> dict[str, Any]:
        encoded, _ = planned()
        return {
            'num_train_examples': len(encoded),
            'tokenizer': vocabulary.digest,
        }

    eval_split = c.dataset.eval_split or pick_eval_split(dataset)

    @functools.cache
    def eval_pairs() -> Pairs:
        return dataset.open(eval_split)

    @functools.cache
    def evaluated() -> Encoded:
        return encode_pairs(eval_pairs(), vocabulary.tokenizer)

    def eval_data() -> Watch:
        return evaluation_batches(
            evaluated(), buckets, shard=shard, timeout_seconds=timeout_seconds
        )

    largest = buckets[-1]
    tokens = jax.ShapeDtypeStruct((largest.rows, largest.length), jnp.int32)
    example = jax.ShapeDtypeStruct((1, largest.length), jnp.int32)
    source, target = dataset.languages
    return TextData(
        dataset=dataset,
        num_classes=c.text.vocab_size,
        inputs=(example, example),
        units=PAIRS,
        batch_shape={'source': tokens, 'target': tokens},
        train_data=train_data,
        position_per_step=1,
        seen=seen,
        read_facts=read_facts,
        eval_data=eval_data,
        eval_pairs=eval_pairs,
        vocabulary=vocabulary,
        buckets=buckets,
        facts={
            'dataset': dataset.name,
            'eval_split': eval_split,
            'text': {
                'source': source,
                'target': target,
                'buckets': [bucket.length for bucket in buckets],
                'tokens_per_batch': c.text.tokens_per_batch,
                'extra_length': c.text.extra_length,
            },
        },
    )


def _longest(dataset: TextDataset) -> tuple[int]:
    """The length of a bucket that holds every line, whatever its tokens."""
    if dataset.longest is None:
        raise UserError(
            f'config.text.buckets is empty, and how long the lines of {dataset.name!r} '
            'are is not known before they are read; name lengths, such as 16,32,64'
        )
    # SentencePiece begins a line with a token of its own; and EOS.
    return (dataset.longest + 2,)
