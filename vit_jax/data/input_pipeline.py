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
import numpy as np

from vit_jax.data.datasets import DataSource
from vit_jax.data.order import MAX_POSITION, Order
from vit_jax.data.watch import Watch
from vit_jax.errors import UserError, reason

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
    repeats: int = 1,
    timeout_seconds: float = 300.0,
) -> Watch:
    """Endless batches: shuffle (anew each epoch, see `Order`), augment, batch.

    Args:
      source: the training examples.
      transform: (example, NumPy Generator) -> example of arrays; the example also
        holds 'draw', see `TrainTransform`.
      batch_size: rows over all processes; divisible by their number.
      seed: of order and augmentation.
      start: examples seen before, over all processes.
      shard: the rows of this process.
      num_workers: processes that decode; 0 for threads in this one.
      repeats: how often a batch shows each of its images.
      timeout_seconds: without a batch, after which that is logged.

    Returns:
      An iterator, to be closed, over dicts of arrays: `batch_size / shard.count`
      rows each. It raises UserError for an example that cannot be read or decoded,
      and when a worker died.

    Raises:
      UserError: when there are no examples, and for impossible `repeats`.
    """
    if len(source) == 0:
        raise UserError('the training split has no examples')
    order = Order(len(source), seed, batch_size, repeats)
    examples = grain.MapDataset.source(_Ordered(source, order))
    # The generator is keyed by the position, which slicing afterwards does not change.
    examples = examples.random_map(transform, seed=seed)[start:]
    return _batches(examples, batch_size, shard, num_workers, timeout_seconds)


def eval_batches(
    source: DataSource,
    transform: Transform,
    *,
    batch_size: int,
    shard: Shard = Shard(),
    num_workers: int = 0,
    timeout_seconds: float = 300.0,
) -> Watch:
    """Every example once, in order; rows that fill the last batch have weight 0.

    Args and result as `train_batches`; `transform` takes an example with 'weight'.
    """
    if len(source) == 0:
        raise UserError('the evaluation split has no examples')
    examples = grain.MapDataset.source(_Padded(source, batch_size)).map(transform)
    return _batches(examples, batch_size, shard, num_workers, timeout_seconds)


@dataclasses.dataclass(frozen=True)
class _Ordered:
    """Training as a source without end: the example at each position, and its words.

    Both are computed for many positions at once, which costs a thousandth of one
    at a time.
    """

    source: DataSource
    order: Order
    blocks: dict[int, tuple[np.ndarray, np.ndarray]] = dataclasses.field(
        default_factory=dict
    )

    def __len__(self) -> int:
        return MAX_POSITION

    def __getitem__(self, position: int) -> dict[str, Any]:
        block, place = divmod(position, _BLOCK)
        known = self.blocks.get(block)
        if known is None:
            positions = block * _BLOCK + np.arange(_BLOCK)
            known = self.order.example_at(positions), self.order.words_at(positions)
            if len(self.blocks) >= 16:  # far more than threads are apart
                self.blocks.clear()
            self.blocks[block] = known
        indices, words = known
        example = read_example(self.source, int(indices[place]))
        return {**example, 'draw': words[place]}


_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class _Padded:
    """`source`, filled up to whole batches by its first example at weight 0."""

    source: DataSource
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size) * self.batch_size

    def __getitem__(self, index: int) -> dict[str, Any]:
        real = index < len(self.source)
        example = read_example(self.source, index if real else 0)
        return {**example, 'weight': 1.0 if real else 0.0}


def read_example(source: DataSource, index: int) -> dict[str, Any]:
    """`source[index]`; of a file that cannot be read, the image is a UserError.

    Who decodes raises it, or skips the example.
    """
    try:
        return source[index]
    except OSError as error:
        name = error.filename or f'example {index}'
        unread = UserError(f'{name} cannot be read: {reason(error)}')
        return {'image': unread, 'label': 0, 'name': name}


def _batches(
    examples: grain.MapDataset,
    batch_size: int,
    shard: Shard,
    num_workers: int,
    timeout_seconds: float,
) -> Watch:
    # Batches of a process's share of the rows, of which it takes every count-th:
    # its rows of a global batch are contiguous.
    # There is no remainder to drop; but without it grain computes the length of an
    # endless dataset in floating point, too large an integer at one row.
    batches = examples.batch(batch_size // shard.count, drop_remainder=True)
    batches = batches[shard.index :: shard.count]
    # A thread makes a whole batch. Decoding leaves Python's lock, the rest does not:
    # more threads than half the cores slow each other (and the model on a CPU) down.
    threads = min(max((os.cpu_count() or 1) // 2, 1), 16)
    if num_workers:  # each has threads and a buffer of its own
        threads = 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    dataset = batches.to_iter_dataset(options)
    if num_workers:
        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()  # grain's workers inherit absl's flags
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2)
        )
    return Watch(iter(dataset), timeout_seconds)
