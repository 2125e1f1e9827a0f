"""Pairs whose target depends on symbols far away: copying, and associative recall.

Copying, as in "Neural Turing Machines", arXiv 1410.5401, section 4.1: the target is the
source. Recall, as in "Using Fast Weights to Attend to the Recent Past", arXiv
1610.06258, section 4.1: the source holds pairs of a key and a value, and asks for one.

A symbol is a character; a source has exactly `length` of them. Example i of a split is
a function of (split, i). The splits are drawn from the same distribution with other
random words: that a source of one is in another is not ruled out, only as likely as for
two independent draws. Of copies of length 16, the shortest that is measured, there are
10**16; of the questions of recall of length 16, 5 x 10**17.
"""

import numpy as np

from vit_jax.errors import UserError, unknown

SPLITS = ('train', 'validation', 'test')
EVAL_EXAMPLES = 1_000

SYMBOLS = 'abcdefghij'  # that are copied, or lie between pairs
KEYS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'
VALUES = '0123456789'
QUESTION = '?'

_COPY, _RECALL = range(2)  # streams of random words


def make_copies(
    split: str, num_examples: int, *, length: int
) -> tuple[list[str], list[str]]:
    """The first examples of a split: random symbols, to be written again.

    Args:
      split: 'train', 'validation' or 'test'.
      num_examples: how many.
      length: symbols of each.

    Returns:
      Sources, and targets, which are the same.

    Raises:
      UserError: for another split.

    >>> make_copies('train', 2, length=8)
    (['jijgdfhg', 'facacdjj'], ['jijgdfhg', 'facacdjj'])
    """
    words = _random_words(_COPY, split, num_examples, length)
    lines = _join(_pick(SYMBOLS, words))
    return lines, lines


def make_recalls(
    split: str,
    num_examples: int,
    *,
    length: int,
    pairs: int = 4,
    distance: int | None = None,
) -> tuple[list[str], list[str]]:
    """The first examples of a split: pairs among other symbols, then a question.

    The keys of a source differ. Pairs begin at even places, each set of places being
    equally likely, and each pair is asked for equally often.

    Args:
      split: 'train', 'validation' or 'test'.
      num_examples: how many.
      length: symbols of each source, even; the last two are the question.
      pairs: of a key and a value.
      distance: symbols from the pair that is asked for to the question, even, from 2 to
        `length - 2`; None: uniform.

    Returns:
      Sources, and the values that they ask for, a symbol each.

    Raises:
      UserError: for another split, and numbers that do not fit each other.

    >>> make_recalls('train', 2, length=16)
    (['D3W7G5X0bjdfde?D', 'G9S1ieD6ahceJ2?S'], ['3', '1'])
    >>> make_recalls('train', 1, length=16, distance=2)
    (['hfW7G5X0bjdfD3?D'], ['3'])
    """
    slots = length // 2 - 1
    if length % 2 or not 1 <= pairs <= min(slots, len(KEYS)):
        raise UserError(
            f'recall of length {length} with {pairs} pairs: length must be even, and '
            f'have room for the pairs, at most {len(KEYS)}, and the question'
        )
    if distance is not None and (distance % 2 or not 2 <= distance <= length - 2):
        raise UserError(
            f'recall of length {length} at distance {distance}: distance must be even, '
            f'from 2 to {length - 2}'
        )
    sizes = 2 * slots, slots, len(KEYS), pairs
    words = _random_words(_RECALL, split, num_examples, sum(sizes))
    between, order, keys, values = np.split(words, np.cumsum(sizes)[:-1], axis=1)
    # The pair in the first of the slots in random order is the one that is asked for.
    order = np.argsort(order, axis=1, kind='stable')
    if distance is not None:
        asked = slots - distance // 2
        swapped = np.nonzero(order == asked)
        order[swapped] = order[:, 0]
        order[:, 0] = asked
    places = 2 * order[:, :pairs]
    keys = np.array(list(KEYS))[np.argsort(keys, axis=1, kind='stable')[:, :pairs]]
    values = _pick(VALUES, values)
    source = _pick(SYMBOLS, between)
    np.put_along_axis(source, places, keys, axis=1)
    np.put_along_axis(source, places + 1, values, axis=1)
    question = np.full((num_examples, 1), QUESTION)
    source = np.concatenate([source, question, keys[:, :1]], axis=1)
    return _join(source), _join(values[:, :1])


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


def _join(rows: np.ndarray) -> list[str]:
    """Characters `[rows, columns]` as lines."""
    rows = np.ascontiguousarray(rows)
    return rows.view(f'<U{rows.shape[1]}').ravel().tolist()
