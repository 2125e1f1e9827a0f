"""What is computed of each encoding: whether it has a property, and by which number."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from vit_jax.experiment import Cell, Expected, Line, find_line
from vit_jax.layers.position import binary, integer, normalized, sincos, sine
from vit_jax.results import NOT_RUN, status, table

WIDTH = 16
SHORT, LONG = 64, 3001  # positions; the second are many more than features
STEPS = (1, 5, 64)
SOURCE = "the article's table of encodings"

# Name -> title, encoding, which of the properties it has.
ENCODINGS: dict[str, tuple[str, Callable, tuple[bool, ...]]] = {
    'integer': ('integer', integer, (False, True, True, False)),
    'normalized': ('index / length', normalized, (True, False, False, False)),
    'binary': ('binary digits', binary, (True, True, False, False)),
    'sine': ('one sine a feature', sine, (True, True, False, False)),
    'sincos': ('sine and cosine pairs', sincos, (True, True, True, True)),
}


def cells() -> Iterator[Cell]:
    """Every property of every encoding."""
    for name, (_, _, holds) in ENCODINGS.items():
        for key, expected in zip(PROPERTIES, holds):
            published = Expected(float(expected), SOURCE, tolerance=0.0)
            overrides = {'encoding': name, 'property': key}
            cell_name = f'computed/{key}/{name}'
            yield Cell(cell_name, None, overrides, expected=published)


def encode(name: str, length: int, width: int = WIDTH) -> np.ndarray:
    """The codes of a sequence, `[length, width]` float64."""
    _, function, _ = ENCODINGS[name]
    return np.float64(function(np.arange(length), width))


def largest_feature(name: str) -> float:
    """Of all positions of a long sequence."""
    return float(np.abs(encode(name, LONG)).max())


def dependence_on_length(name: str) -> float:
    """How far the code of a position in a short sequence is from that in a long one."""
    return float(np.abs(encode(name, SHORT) - encode(name, LONG)[:SHORT]).max())


def spread_of_steps(name: str) -> float:
    """(longest - shortest) / mean distance of neighbours, of both lengths together."""
    steps = [np.diff(encode(name, length), axis=0) for length in (SHORT, LONG)]
    distances = np.linalg.norm(np.concatenate(steps), axis=1)
    return float(np.ptp(distances) / distances.mean())


def miss_of_shift(name: str) -> float:
    """How far PE(x + step) is from T PE(x) for the best T, the same for all x.

    The largest error of a feature by the largest change of one: 1 is a T that is no
    better than leaving the code as it is. Of the step that is missed most.
    """
    code = encode(name, LONG)
    misses = []
    for step in STEPS:
        before, after = code[:-step], code[step:]
        error = before @ fit_shift(code, step).T - after
        misses.append(np.abs(error).max() / np.abs(after - before).max())
    return float(max(misses))


def fit_shift(code: np.ndarray, step: int) -> np.ndarray:
    """The T for which T PE(x) is nearest to PE(x + step), `[D, D]`: least squares."""
    return np.linalg.lstsq(code[:-step], code[step:], rcond=1e-9)[0].T


# Name -> title, what is measured, up to which number the property is there.
PROPERTIES: dict[str, tuple[str, Callable[[str], float], float]] = {
    'bounded': ('bounded', largest_feature, 1.0),
    'any_length': ('same code at any length', dependence_on_length, 1e-3),
    'equal_steps': ('equal steps, equal distance', spread_of_steps, 1e-3),
    'linear_shift': ('PE(x+d) = T(d) PE(x)', miss_of_shift, 1e-3),
}


def measure(cell: Cell) -> Line:
    """Whether an encoding has a property, and the number that says so."""
    _, function, limit = PROPERTIES[cell.overrides['property']]
    measured = function(cell.overrides['encoding'])
    return {'value': float(measured <= limit), 'measured': measured}


def render(lines: Sequence[Line]) -> str:
    """Each property of each encoding: whether, by which number, and as expected?"""
    by_name = {cell.name: cell for cell in cells()}
    rows = []
    for name, (title, _, _) in ENCODINGS.items():
        row = [by_name[f'computed/{key}/{name}'] for key in PROPERTIES]
        rows.append([title, *(_describe(cell, lines) for cell in row)])
    titles = [title for title, _, _ in PROPERTIES.values()]
    return f"""{table(['encoding', *titles], rows)}
In brackets the number that decides: the largest feature of {LONG:,} positions; the
largest difference of a code in a sequence of {SHORT} and one of {LONG:,}; the spread of
the distances of neighbours by their mean, over both lengths; the largest error of the
best T, over steps of {', '.join(map(str, STEPS))}, by the largest change of a feature.
"""


def _describe(cell: Cell, lines: Sequence[Line]) -> str:
    line = find_line(cell, lines)
    if line is None or cell.expected is None:
        return NOT_RUN
    answer = 'yes' if line['value'] else 'no'
    return (
        f'{answer} ({line["measured"]:.4g}): {status([line["value"]], cell.expected)}'
    )
