"""Pairs whose target depends on symbols far away: copying, and associative recall.

What counts is a few symbols among blanks: a longer source is further, not more to
remember.

Copying: symbols at equal distances are to be written again. With as many symbols as
the source is long this is the task of "Neural Turing Machines", arXiv 1410.5401,
section 4.1; with blanks between, one of the long time lags of "Long Short-Term Memory",
Neural Computation 9(8), 1997, section 5.

Recall: the source holds pairs of a key and a value; asked are the values of keys, as
in "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv
2312.04927, section 3. Here the target gives each key before its value, which suits an
encoder and a decoder; and a pair is one symbol, so that what counts is how far it is,
not how two symbols are put together.

A symbol is a character; a source has exactly `length` of them. Example i of a split is
a function of (split, i). The splits are drawn from the same distribution with other
random words: that a source of one is in another is not ruled out, only as likely as for
two independent draws. There are 10**10 copies of ten symbols, and of the sources of
recall of length 16, the shortest that is measured, 3 x 10**10.
"""

import numpy as np

from vit_jax.errors import UserError, unknown

SPLITS = ('train', 'validation', 'test')
EVAL_EXAMPLES = 1_000

BLANK = '.'
SYMBOLS = 'abcdefghij'  # that are copied
KEYS = 'ABCDEFGH'
VALUES = '0123456789'
# A pair, at 10 * key + value: 80 characters without a meaning, of the Braille block.
PAIRS = ''.join(map(chr, range(0x2801, 0x2801 + len(KEYS) * len(VALUES))))

_COPY, _RECALL = range(2)  # streams of random words


def make_copies(
    split: str, num_examples: int, *, length: int, symbols: int = 10
) -> tuple[list[str], list[str]]:
    """The first examples of a split: symbols among blanks, to be written without them.

    Args:
      split: 'train', 'validation' or 'test'.
      num_examples: how many.
      length: of each source.
      symbols: of each source and target; symbol i lies at place i * length // symbols.

    Returns:
      Sources and targets.

    Raises:
      UserError: for another split, and more symbols than places.

    >>> make_copies('train', 2, length=8, symbols=3)
    (['j.i..j..', 'g.d..f..'], ['jij', 'gdf'])
    """
    if not 1 <= symbols <= length:
        raise UserError(
            f'copy of length {length} with {symbols} symbols: there is no room for them'
        )
    words = _random_words(_COPY, split, num_examples, symbols)
    target = _pick(SYMBOLS, words)
    source = np.full((num_examples, length), BLANK)
    source[:, np.arange(symbols) * length // symbols] = target
    return _join(source), _join(target)


def make_recalls(
    split: str, num_examples: int, *, length: int, pairs: int = 4
) -> tuple[list[str], list[str]]:
    """The first examples of a split: pairs among blanks; keys and their values.

    The keys of a source differ. Each set of places of the pairs is equally likely, and
    each order in which they are asked for.

    Args:
      split: 'train', 'validation' or 'test'.
      num_examples: how many.
      length: symbols of each source.
      pairs: of a key and a value, a symbol of `PAIRS` each.

    Returns:
      Sources, and targets of 2 * pairs symbols: a key, its value, the next key.

    Raises:
      UserError: for another split, and numbers that do not fit each other.

    >>> make_recalls('train', 2, length=8, pairs=2)
    (['...⠍.⠚..', '.....⠅⠏.'], ['B2C5', 'B4A4'])
    """
    if not 1 <= pairs <= min(length, len(KEYS)):
        raise UserError(
            f'recall of length {length} with {pairs} pairs: there can be at most '
            f'{len(KEYS)}, and the length must have room for them'
        )
    sizes = length, len(KEYS), pairs
    words = _random_words(_RECALL, split, num_examples, sum(sizes))
    places, keys, values = np.split(words, np.cumsum(sizes)[:-1], axis=1)
    places, keys = (_order(part)[:, :pairs] for part in (places, keys))
    values %= len(VALUES)
    source = np.full((num_examples, length), BLANK)
    which = len(VALUES) * keys + values.astype(keys.dtype)
    np.put_along_axis(source, places, np.array(list(PAIRS))[which], axis=1)
    # The places are in random order, and so are the keys by place.
    target = np.stack([np.array(list(KEYS))[keys], _pick(VALUES, values)], axis=2)
    return _join(source), _join(target.reshape(num_examples, 2 * pairs))


def pair_of(key: str, value: str) -> str:
    """The symbol of a pair.

    >>> pair_of('C', '1')
    '⠖'
    """
    return PAIRS[len(VALUES) * KEYS.index(key) + VALUES.index(value)]


def _random_words(task: int, split: str, rows: int, columns: int) -> np.ndarray:
    """uint64 `[rows, columns]`; row i is the same whatever the number of rows."""
    if split not in SPLITS:
        raise unknown('split of copy and recall', split, SPLITS)
    # Raw words of a named bit generator are the same in every version of NumPy.
    bits = np.random.Philox(key=[task, SPLITS.index(split)])
    return bits.random_raw(rows * columns).reshape(rows, columns)


def _pick(symbols: str, words: np.ndarray) -> np.ndarray:
    """A symbol for each word, equally often up to 1 in 2**60."""
    return np.array(list(symbols))[words % np.uint64(len(symbols))]


def _order(words: np.ndarray) -> np.ndarray:
    """A permutation of the columns for each row."""
    return np.argsort(words, axis=1, kind='stable')


def _join(rows: np.ndarray) -> list[str]:
    """Characters `[rows, columns]` as lines."""
    rows = np.ascontiguousarray(rows)
    return rows.view(f'<U{rows.shape[1]}').ravel().tolist()
