"""Which example stands at which position of training, and how it is augmented.

Position p counts the examples seen. Each epoch is a permutation of the examples of
its own, and every place of it is computed alone, from (seed, epoch, place): on the
host in NumPy, inside a compiled step in JAX, the same bits. So there is no list of
indices to store, to send or to restore.

So are the random numbers of a position (`draw_words`), and what is made of them, how
an image is cut and mirrored (`shift_of`).

The permutation is a keyed cipher on {0, ..., n - 1}: the generalised Feistel network
with cycle walking of Black and Rogaway, "Ciphers with arbitrary finite domains"
(2002, https://eprint.iacr.org/2001/012), whose round function is the finaliser of
Appleby's MurmurHash3 (`fmix32`).
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax.errors import UserError

if TYPE_CHECKING:
    import jax  # which the processes that decode can do without

MAX_EXAMPLES = 2**31 - 1
MAX_POSITION = 2**53  # 7 million epochs of ImageNet

_ROUNDS = 16  # even of 5 examples, all orders are equally frequent
_WORD = 2**32 - 1
_GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: an increment without structure

# What tells the rounds apart, for two at a time.
_STEPS = (np.arange(_ROUNDS, dtype=np.uint64) * _GOLDEN & _WORD).astype(np.uint32)
_STEPS = _STEPS.reshape(-1, 2)

Words = Any  # an array of uint32, of NumPy or of JAX


@dataclasses.dataclass(frozen=True)
class Order:
    """The endless, shuffled sequence of a run's training examples.

    With repeated augmentation (Hoffer et al., arXiv 1901.09335; DeiT's is
    arXiv 2012.12877, section 6) a step draws fewer images and shows each several times:
    row r is image r modulo `distinct` of the step. So copies never lie in neighbouring
    rows, which may be mixed with each other.

    >>> order = Order(num_examples=5, seed=0)
    >>> order.example_at(np.arange(10)).tolist()
    [1, 4, 2, 0, 3, 4, 3, 2, 0, 1]

    Attributes:
      num_examples: n, at most 2**31 - 1.
      seed: of the permutations, an integer of 64 bits.
      batch_size: rows of a step; has no influence without `repeats`.
      repeats: how often a batch shows each of its images.

    Raises:
      UserError: for numbers out of range, and when a batch would show one image only.
    """

    num_examples: int
    seed: int
    batch_size: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.num_examples <= MAX_EXAMPLES:
            raise UserError(
                f'a training split has 1 to {MAX_EXAMPLES:,} examples, not '
                f'{self.num_examples:,}'
            )
        if self.repeats < 1:
            raise UserError(f'augment.repeats must be at least 1, not {self.repeats}')
        if self.repeats > 1 and self.distinct == 1:
            raise UserError(
                f'augment.repeats {self.repeats} fills the batch of {self.batch_size} '
                f'with one image; it can be at most {max(self.batch_size - 1, 1)}'
            )

    @property
    def distinct(self) -> int:
        """Images of a batch."""
        return -(-self.batch_size // self.repeats)

    def words_at(self, position: np.ndarray) -> np.ndarray:
        """`draw_words` of positions `[n]`: uint32 `[n, 3]`."""
        position = np.asarray(position, np.int64)
        words = draw_words((_word(position), _word(position >> 32)), self.seed)
        return np.stack(words, axis=-1)

    def example_at(self, position: int | np.ndarray) -> np.ndarray:
        """The index of the example at a position, or at each of an array's.

        Args:
          position: in [0, 2**53).

        Returns:
          int64, of the shape of `position`.
        """
        shape = np.shape(position)
        image = self._image_at(np.atleast_1d(np.asarray(position, np.int64)))
        epoch, place = np.divmod(image, self.num_examples)
        words = (_word(epoch), _word(epoch >> 32))
        index = permute(_word(place), words, self.num_examples, self.seed)
        return index.astype(np.int64).reshape(shape)

    def first_of(self, position: int | np.ndarray) -> dict[str, np.ndarray]:
        """What `examples_of` is told of the batch that begins at a position.

        Args:
          position: of the first row, or an array of them for several batches.

        Returns:
          'epoch' and 'place', uint32, of the shape of `position`.

        Raises:
          UserError: for a position inside a step, with `repeats`.
        """
        position = np.asarray(position, np.int64)
        if self.repeats > 1 and (position % self.batch_size).any():
            raise UserError(
                f'with augment.repeats, a run goes on from whole batches: the examples '
                f'seen are no multiple of batch_size {self.batch_size}'
            )
        epoch, place = np.divmod(self._image_at(position), self.num_examples)
        if (epoch >= _WORD - self.batch_size).any():
            raise UserError(f'a run on the device has fewer than {_WORD:,} epochs')
        return {'epoch': epoch.astype(np.uint32), 'place': place.astype(np.uint32)}

    def examples_of(self, first: dict[str, Any], rows: 'jax.Array') -> 'jax.Array':
        """The examples of a batch, inside a compiled step.

        Args:
          first: of one batch, see `first_of`.
          rows: `[B]` uint32, rows of the batch.

        Returns:
          `[B]` int32.
        """
        place = first['place'] + self._image_at(rows, np.uint32)
        epoch = first['epoch'] + place // np.uint32(self.num_examples)
        place = place % np.uint32(self.num_examples)
        words = (epoch, epoch & np.uint32(0))
        return permute(place, words, self.num_examples, self.seed).astype(np.int32)

    def _image_at(self, position: Any, dtype: Any = np.int64) -> Any:
        """Counts images as they are drawn, each once however often it is shown."""
        if self.repeats == 1:
            return position
        size, distinct = dtype(self.batch_size), dtype(self.distinct)
        return position // size * distinct + position % size % distinct


def permute(
    place: Words, epoch: tuple[Words, Words], num_examples: int, seed: int
) -> Words:
    """A permutation of [0, num_examples), chosen by `seed` and `epoch`.

    The cipher works on a rectangle of numbers (left, right) that is hardly larger than
    `num_examples`; what falls outside is enciphered again.

    Args:
      place: in [0, num_examples).
      epoch: low and high word of its number, of the shape of `place`.
      num_examples: in [1, 2**31 - 1].
      seed: 64 bits.

    Returns:
      As `place`.
    """
    rows = math.isqrt(num_examples - 1) + 1
    rows += rows % 2  # shifts of an odd number of items are even permutations, all
    columns = -(-num_examples // rows)
    m, n, k = (np.uint32(size) for size in (rows, columns, num_examples))
    keys = [_key(lane, seed, epoch) for lane in (1, 2)]

    def two_rounds(halves: tuple[Words, Words], steps: Words) -> Any:
        left, right = halves
        left = (left + _round(right, keys, steps[0]) % m) % m
        right = (right + _round(left, keys, steps[1]) % n) % n
        return (left, right), None

    if isinstance(place, np.ndarray):
        outside = np.ones(place.shape, bool)
        while outside.any():
            halves = place // n, place % n
            for steps in _STEPS:
                halves, _ = two_rounds(halves, steps)
            place = np.where(outside, halves[0] * n + halves[1], place)
            outside = place >= k
        return place

    import jax

    def encipher(state: tuple[Words, Words]) -> tuple[Words, Words]:
        place, outside = state
        halves, _ = jax.lax.scan(two_rounds, (place // n, place % n), _STEPS)
        place = jax.numpy.where(outside, halves[0] * n + halves[1], place)
        return place, place >= k

    state = (place, jax.numpy.ones_like(place, bool))
    return jax.lax.while_loop(lambda state: state[1].any(), encipher, state)[0]


def draw_words(position: tuple[Words, Words], seed: int) -> tuple[Words, ...]:
    """Three random words for each position of training.

    Args:
      position: low and high word of each, arrays.
      seed: 64 bits.

    Returns:
      As the words of `position`.
    """
    low, high = position
    keys = [_key(lane, seed, (high,)) for lane in (3, 4)]  # 1 and 2 are of `permute`
    return tuple(_round(low, keys, step) for step in _STEPS.ravel()[:3])


def shift_of(words: tuple[Words, ...], pad: int) -> tuple[Words, Words, Words]:
    """How an image is cut out of the one padded on all sides, and then mirrored.

    Args:
      words: see `draw_words`.
      pad: pixels; 0 for none.

    Returns:
      The first row and the first column, 0 to 2 * pad, and whether to mirror.
    """
    places = np.uint32(2 * pad + 1)
    return words[0] % places, words[1] % places, words[2] >> np.uint32(31) == 1


def _key(lane: int, seed: int, words: tuple[Words, ...]) -> Words:
    """A word that depends on every bit of seed and words; another one in each lane."""
    values = [_word(np.asarray([part])) for part in (lane, seed, seed >> 32)]
    key = np.zeros(1, np.uint32)
    for value in (*values, *words):
        key = _mix(key ^ value ^ np.uint32(_GOLDEN))
    return key


def _round(x: Words, keys: list[Words], step: Words) -> Words:
    """A function of one half of the state, another one in each round."""
    return _mix(_mix(x + keys[0] + step) ^ keys[1])


def _mix(x: Words) -> Words:
    """`fmix32` of MurmurHash3: each bit of the result depends on each bit of `x`."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _word(x: np.ndarray) -> np.ndarray:
    """The low 32 bits."""
    return (x & _WORD).astype(np.uint32)
