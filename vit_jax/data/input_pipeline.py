"""From a source of examples to batches, in an order that is a pure function.

Example i of training is a function of (seed, i) alone, whatever the number of
processes, workers and threads, and wherever the run was interrupted. So a run's
position is one number, the examples seen, and resuming is slicing.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import absl.flags
import grain

from vit_jax.data.datasets import DataSource
from vit_jax.errors import UserError

Transform = Callable[..., dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of every batch that this process reads: contiguous rows.

    Attributes:
      index: number of this process.
      count: how many processes there are.
    """

    index: int = 0
    count: int = 1


def train_batches(
    source: DataSource,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    shard: Shard = Shard(),
    num_workers: int = 0,
) -> grain.DatasetIterator:
    """Endless batches: shuffle (anew each epoch), repeat, augment, batch.

    Args:
      source: the training examples.
      transform: (example, NumPy Generator) -> example of arrays.
      batch_size: rows over all processes; divisible by their number.
      seed: of order and augmentation.
      start: examples seen before, over all processes.
      shard: the rows of this process.
      num_workers: processes that decode; 0 for threads in this one.

    Returns:
      An iterator, to be closed, over dicts of arrays: `batch_size / shard.count`
      rows each.
    """
    if len(source) == 0:
        raise UserError('the training split has no examples')
    examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    examples = examples.random_map(transform)[start:]
    return _batches(examples, batch_size, shard, num_workers)


def eval_batches(
    source: DataSource,
    transform: Transform,
    *,
    batch_size: int,
    shard: Shard = Shard(),
    num_workers: int = 0,
) -> grain.DatasetIterator:
    """Every example once, in order; rows that fill the last batch have weight 0.

    Args and result as `train_batches`; `transform` takes an example with 'weight'.
    """
    if len(source) == 0:
        raise UserError('the evaluation split has no examples')
    examples = grain.MapDataset.source(_Padded(source, batch_size)).map(transform)
    return _batches(examples, batch_size, shard, num_workers)


@dataclasses.dataclass(frozen=True)
class _Padded:
    """`source`, filled up to whole batches by its first example at weight 0."""

    source: DataSource
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size) * self.batch_size

    def __getitem__(self, index: int) -> dict[str, Any]:
        real = index < len(self.source)
        example = self.source[index if real else 0]
        return {**example, 'weight': 1.0 if real else 0.0}


def _batches(
    examples: grain.MapDataset, batch_size: int, shard: Shard, num_workers: int
) -> grain.DatasetIterator:
    # Batches of a process's share of the rows, of which it takes every count-th:
    # its rows of a global batch are contiguous.
    # There is no remainder to drop; but without it grain computes the length of an
    # endless dataset in floating point, too large an integer at one row.
    batches = examples.batch(batch_size // shard.count, drop_remainder=True)
    batches = batches[shard.index :: shard.count]
    # A thread makes a whole batch. Decoding leaves Python's lock, the rest does not:
    # more threads than half the cores slow each other (and the model on a CPU) down.
    threads = min(max((os.cpu_count() or 1) // 2, 1), 16)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    dataset = batches.to_iter_dataset(options)
    if num_workers:
        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()  # grain's workers inherit absl's flags
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2)
        )
    return iter(dataset)
