"""Sentence pairs in batches of few, static shapes, each holding about as many tokens.

Pairs of similar length share a batch, padded to the length of their bucket; buckets of
short pairs have more rows. A compiled step exists once for each bucket that is used.

Batch i of training is a function of (seed, i) alone, whatever the number of processes
and threads, and wherever the run was interrupted. So a run's position is one number,
the batches seen. Within an epoch each example counts once: the last batch of a bucket
is filled up by rows of padding, not by other examples.
"""

import dataclasses
import logging
from collections.abc import Sequence

import grain
import numpy as np

from vit_jax.data.input_pipeline import Shard
from vit_jax.data.order import MAX_POSITION, Order
from vit_jax.data.text import Pairs
from vit_jax.data.tokenizer import EOS, PAD, Tokenizer
from vit_jax.data.watch import Watch
from vit_jax.errors import UserError

log = logging.getLogger(__name__)

_LINES = 1 << 16  # encoded at a time; of these alone each line is an array of its own
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids of sentence pairs, without BOS, EOS and padding, end to end.

    Sentence i of the source is `source[source_offsets[i]:source_offsets[i + 1]]`.

    Attributes:
      source: int32 `[all tokens]`.
      source_offsets: int64 `[pairs + 1]`.
      target: as `source`.
      target_offsets: as `source_offsets`.
    """

    source: np.ndarray
    source_offsets: np.ndarray
    target: np.ndarray
    target_offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.source_offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longer side of each pair, with its EOS: int64 `[pairs]`."""
        source, target = np.diff(self.source_offsets), np.diff(self.target_offsets)
        return np.maximum(source, target) + 1


def encode_pairs(pairs: Pairs, tokenizer: Tokenizer) -> Encoded:
    """Token ids of both sides, by one tokenizer.

    Raises:
      UserError: for lines that are no Unicode text.
    """
    return Encoded(*_encode(pairs.source, tokenizer), *_encode(pairs.target, tokenizer))


def _encode(lines: list[str], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    chunks, sizes = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]
    for start in range(0, len(lines), _LINES):
        encoded = tokenizer.encode(lines[start : start + _LINES])
        chunks.append(np.concatenate(encoded))
        sizes.append(np.array([ids.size for ids in encoded], np.int64))
    return np.concatenate(chunks), np.cumsum(np.concatenate(sizes))


def encode_sources(ids: Sequence[np.ndarray]) -> Encoded:
    """Sentences to be translated, from the token ids of each: they have no target."""
    sizes = np.array([0, *(row.size for row in ids)], np.int64)
    source = np.concatenate([np.zeros(0, np.int32), *ids])
    return Encoded(source, np.cumsum(sizes), source[:0], np.zeros_like(sizes))


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A shape of batches.

    Attributes:
      length: tokens of a row, on both sides.
      rows: over all processes.
      padding: rows that are never examples, the last ones.
    """

    length: int
    rows: int
    padding: int = 0

    @property
    def examples(self) -> int:
        """Most examples of a batch."""
        return self.rows - self.padding


def make_buckets(
    lengths: Sequence[int], tokens: int, multiple: int
) -> tuple[Bucket, ...]:
    """The buckets of a budget: as many examples as it has room for.

    How many there are depends on the budget alone, and so do the batches. Where devices
    cannot share them evenly, rows of padding are added.

    Args:
      lengths: of the buckets, ascending; an EOS counts.
      tokens: most tokens of the examples of a batch, on one side, with their padding.
      multiple: what rows must be divisible by: shards of a batch times gradient
        accumulation.

    Raises:
      UserError: when the budget has no room for an example of each bucket, and for
        lengths that are not ascending whole numbers.

    >>> make_buckets((16, 64), tokens=200, multiple=4)
    (Bucket(length=16, rows=12, padding=0), Bucket(length=64, rows=4, padding=1))
    """
    lengths = tuple(lengths)
    whole = all(isinstance(length, int) for length in lengths)
    if not (lengths and whole) or lengths[0] < 2 or sorted({*lengths}) != [*lengths]:
        raise UserError(
            'config.text.buckets must be ascending whole lengths of at least 2, not '
            f'{lengths}'
        )
    if tokens < lengths[-1]:
        raise UserError(
            f'config.text.tokens_per_batch {tokens} has no room for {lengths[-1]} '
            'tokens, the longest of config.text.buckets; it must be as many at least'
        )
    return tuple(_pad_rows(length, tokens // length, multiple) for length in lengths)


def decoding_buckets(
    buckets: Sequence[Bucket], lengths: np.ndarray, *, beam: int, multiple: int
) -> tuple[Bucket, ...]:
    """Buckets for sentences to be decoded, with no more rows than these need.

    A sentence becomes `beam` hypotheses, which share the budget of a batch. Rows of few
    sentences are a power of two, so that other numbers of them are few shapes.

    Args:
      buckets: of the budget, see `make_buckets`.
      lengths: of the sentences `[n]`, see `Encoded.lengths`.
      beam: hypotheses of a sentence.
      multiple: what rows must be divisible by.

    >>> buckets = make_buckets((16, 64), tokens=1024, multiple=1)
    >>> decoding_buckets(buckets, np.array([9, 16, 5, 64]), beam=4, multiple=1)
    (Bucket(length=16, rows=4, padding=0), Bucket(length=64, rows=1, padding=0))
    """
    place = _find_bucket(np.minimum(lengths, buckets[-1].length), buckets)
    found = []
    for i, bucket in enumerate(buckets):
        needed = int((place == i).sum())
        power = 1 << max(needed - 1, 0).bit_length()
        room = max(bucket.examples // beam, 1)
        found.append(_pad_rows(bucket.length, min(power, room), multiple))
    return tuple(found)


def _pad_rows(length: int, examples: int, multiple: int) -> Bucket:
    padding = -examples % multiple
    return Bucket(length, examples + padding, padding)


class Plan:
    """Which examples make up each batch of training.

    The members of a bucket are in another order in each epoch, see `Order`, and so are
    the batches of all buckets. Nothing is stored but the members: a batch is computed
    when asked for, from any thread. It can be pickled.

    >>> buckets = make_buckets((4, 8), tokens=16, multiple=2)
    >>> plan = Plan(np.array([3, 8, 4, 2, 9, 2, 3]), buckets, seed=0)
    >>> plan.batches_per_epoch, plan.too_long
    (3, 1)
    >>> [plan.batch_at(i)[1].tolist() for i in range(3)]
    [[2], [1], [0, 6, 5, 3]]

    Args:
      lengths: of the examples `[n]`, see `Encoded.lengths`.
      buckets: ascending by length.
      seed: of all orders, an integer of 64 bits.

    Attributes:
      used: the buckets that have examples: the shapes that there will be.
      too_long: examples that no bucket is long enough for, which are left out.
      num_examples: those of an epoch, without them.
      batches_per_epoch: the same in all epochs.

    Raises:
      UserError: when there are no examples, or all are too long.
    """

    def __init__(self, lengths: np.ndarray, buckets: Sequence[Bucket], seed: int):
        if len(lengths) == 0:
            raise UserError('the training split has no examples')
        place = _find_bucket(lengths, buckets)
        self.too_long = int((place == len(buckets)).sum())
        self.num_examples = len(lengths) - self.too_long
        if not self.num_examples:
            raise UserError(
                f'all {len(lengths):,} sentence pairs are longer than the longest of '
                f'config.text.buckets, {buckets[-1].length} tokens; the shortest has '
                f'{min(lengths)}'
            )
        members = [np.flatnonzero(place == i) for i in range(len(buckets))]
        used = [i for i, examples in enumerate(members) if examples.size]
        self.used = tuple(buckets[i] for i in used)
        # int32 halves what millions of examples take.
        self._members = [members[i].astype(np.int32) for i in used]
        self._orders = [Order(members[i].size, _seed(seed, 1 + i)) for i in used]
        rows = np.array([bucket.examples for bucket in self.used])
        sizes = np.array([examples.size for examples in self._members])
        counts = -(-sizes // rows)
        self.batches_per_epoch = int(counts.sum())
        # Batches of an epoch by number: those of the first bucket come first.
        self._firsts = np.cumsum(counts) - counts
        self._rows, self._sizes = rows, sizes
        self._batches = Order(self.batches_per_epoch, _seed(seed, 0))

    def batch_at(self, index: int) -> tuple[Bucket, np.ndarray]:
        """The bucket of a batch, and its examples: int64
        `[at most bucket.examples]`.

        Args:
          index: of the batch, counted from the beginning of training.
        """
        number = self._batches.example_at(index)
        bucket = int(np.searchsorted(self._firsts, number, side='right')) - 1
        rows, size = self._rows[bucket], self._sizes[bucket]
        first = (number - self._firsts[bucket]) * rows
        places = np.arange(first, min(first + rows, size))
        epoch = index // self.batches_per_epoch
        found = self._orders[bucket].example_at(epoch * size + places)
        return self.used[bucket], self._members[bucket][found].astype(np.int64)

    def examples_before(self, index: int) -> int:
        """Examples of the first `index` batches of training, exactly."""
        epochs, rest = divmod(index, self.batches_per_epoch)
        numbers = self._batches.example_at(index - rest + np.arange(rest))
        bucket = np.searchsorted(self._firsts, numbers, side='right') - 1
        first = (numbers - self._firsts[bucket]) * self._rows[bucket]
        seen = np.minimum(self._rows[bucket], self._sizes[bucket] - first)
        return epochs * self.num_examples + int(seen.sum())


def _find_bucket(lengths: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """The number of the shortest bucket that fits each length; of none, their count."""
    return np.searchsorted([bucket.length for bucket in buckets], lengths)


def _seed(seed: int, lane: int) -> int:
    """Another seed of 64 bits for each order of a plan."""
    words = np.random.SeedSequence((seed % 2**64, lane)).generate_state(1, np.uint64)
    return int(words[0])


def training_batches(
    encoded: Encoded,
    plan: Plan,
    *,
    start: int,
    shard: Shard,
    timeout_seconds: float = 300.0,
) -> Watch:
    """Endless batches, as the plan says.

    Args:
      encoded: the examples of the plan.
      plan: which of them make up each batch.
      start: batches seen before.
      shard: the rows of this process.
      timeout_seconds: without a batch, after which that is logged.

    Returns:
      An iterator, to be closed, over `{'source', 'target'}`, int32
      `[bucket.rows / shard.count, bucket.length]`: tokens, EOS, and PAD. Rows beyond
      the examples of a batch, which are the last ones, are PAD alone.

    Raises:
      UserError: when the processes cannot share the rows.
    """
    _check_rows(plan.used, shard)
    batches = grain.MapDataset.source(_Training(encoded, plan, shard))[start:]
    return Watch(iter(batches.to_iter_dataset(_READ)), timeout_seconds)


def evaluation_batches(
    encoded: Encoded,
    buckets: Sequence[Bucket],
    *,
    shard: Shard,
    timeout_seconds: float = 300.0,
) -> Watch:
    """Every example once, bucket by bucket and in order; none is left out.

    Of examples that are longer than the longest bucket the end is cut off (not the EOS,
    which stands last then); how many these are is logged.

    Args and result as `training_batches`. The batches also hold 'index', int32
    `[bucket.rows / shard.count]`: the number of each row's example, -1 of padding.

    Raises:
      UserError: when there are no examples, and when the processes cannot share the
        rows.
    """
    if len(encoded) == 0:
        raise UserError('the evaluation split has no examples')
    _check_rows(buckets, shard)
    lengths, longest = encoded.lengths, buckets[-1].length
    if too_long := int((lengths > longest).sum()):
        log.warning(
            '%s of %s sentence pairs to evaluate on are longer than %d tokens, the '
            'longest of config.text.buckets: their ends are cut off',
            f'{too_long:,}',
            f'{len(encoded):,}',
            longest,
        )
    place = _find_bucket(np.minimum(lengths, longest), buckets)
    batches = []
    for i, bucket in enumerate(buckets):
        members = np.flatnonzero(place == i)
        for first in range(0, members.size, bucket.examples):
            batches.append((bucket, members[first : first + bucket.examples]))
    dataset = grain.MapDataset.source(_Evaluation(encoded, batches, shard))
    return Watch(iter(dataset.to_iter_dataset(_READ)), timeout_seconds)


@dataclasses.dataclass(frozen=True)
class _Training:
    """All batches of training, as a source without end."""

    encoded: Encoded
    plan: Plan
    shard: Shard

    def __len__(self) -> int:
        return MAX_POSITION

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        bucket, examples = self.plan.batch_at(index)
        batch = _fill(self.encoded, bucket, examples, self.shard)
        return {'source': batch['source'], 'target': batch['target']}


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    encoded: Encoded
    batches: list[tuple[Bucket, np.ndarray]]
    shard: Shard

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return _fill(self.encoded, *self.batches[index], self.shard)


def _check_rows(buckets: Sequence[Bucket], shard: Shard) -> None:
    for bucket in buckets:
        if bucket.rows % shard.count:
            raise UserError(
                f'the {bucket.rows} rows of {bucket.length} tokens cannot be shared by '
                f'{shard.count} processes: make_buckets needs a multiple of that number'
            )


def _fill(
    encoded: Encoded, bucket: Bucket, examples: np.ndarray, shard: Shard
) -> dict[str, np.ndarray]:
    """The rows of a process."""
    rows = bucket.rows // shard.count
    index = np.full(rows, -1, np.int32)
    own = examples[shard.index * rows : (shard.index + 1) * rows]
    index[: own.size] = own
    return {
        'source': _pad(encoded.source, encoded.source_offsets, index, bucket.length),
        'target': _pad(encoded.target, encoded.target_offsets, index, bucket.length),
        'index': index,
    }


def _pad(
    tokens: np.ndarray, offsets: np.ndarray, index: np.ndarray, length: int
) -> np.ndarray:
    """The sentences `index`, each with its EOS, padded: int32 `[rows, length]`."""
    padded = np.full((index.size, length), PAD, np.int32)
    for row, i in zip(padded, index):
        if i >= 0:
            sentence = tokens[offsets[i] : offsets[i + 1]][: length - 1]
            row[: sentence.size] = sentence
            row[sentence.size] = EOS
    return padded
