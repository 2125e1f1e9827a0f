"""What each way of counting positions can do: the argument for sines and cosines.

vit_jax reproduce positional_encodings --workdir=/tmp/runs
"""

import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib.figure import Figure

from vit_jax.experiment import Cell, Expected, Experiment, Line, find_line
from vit_jax.layers.position import (
    binary,
    integer,
    normalized,
    shift_matrix,
    sincos,
    sine,
)
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


def sweep() -> Iterator[Cell]:
    """Every cell."""
    for name, (_, _, holds) in ENCODINGS.items():
        for key, expected in zip(PROPERTIES, holds):
            published = Expected(float(expected), SOURCE, tolerance=0.0)
            overrides = {'encoding': name, 'property': key}
            cell_name = f'computed/{key}/{name}'
            yield Cell(cell_name, None, overrides, expected=published)


def encode(name: str, length: int) -> np.ndarray:
    """The codes of a sequence, `[length, WIDTH]` float64."""
    _, function, _ = ENCODINGS[name]
    return np.float64(function(np.arange(length), WIDTH))


# --- What is measured ---------------------------------------------------------------


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


def measure(cell: Cell, workdir: pathlib.Path, data_dir: str | None) -> Line:
    """Whether an encoding has a property, and the number that says so."""
    del workdir, data_dir
    _, function, limit = PROPERTIES[cell.overrides['property']]
    measured = function(cell.overrides['encoding'])
    return {'value': float(measured <= limit), 'measured': measured}


# --- What is told -------------------------------------------------------------------


def render(lines: Sequence[Line]) -> str:
    """Each property of each encoding: whether, by which number, and as expected?"""
    cells = {cell.name: cell for cell in sweep()}
    rows = []
    for name, (title, _, _) in ENCODINGS.items():
        row = [cells[f'computed/{key}/{name}'] for key in PROPERTIES]
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


# Positions that are drawn.
FEW = 64


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """The derivation: codes, steps, one sine that wraps, a shift as a matrix."""
    del lines  # the codes themselves are drawn
    return {
        'encodings.png': _draw_encodings(),
        'steps.png': _draw_steps(),
        'wrap.png': _draw_wrap(),
        'shift.png': _draw_shift(),
    }


def _draw_encodings() -> Figure:
    """Each encoding as a matrix."""
    figure = Figure(figsize=(11, 4.2), dpi=120, layout='constrained')
    for axes, (name, (title, _, _)) in zip(figure.subplots(1, 5), ENCODINGS.items()):
        code = encode(name, FEW)
        shown = axes.imshow(
            code, cmap='viridis', aspect='auto', interpolation='nearest'
        )
        axes.set_title(title, size=10)
        axes.set_xlabel('feature', size=8)
        bar = figure.colorbar(shown, ax=axes, orientation='horizontal', shrink=0.8)
        bar.ax.tick_params(labelsize=7)
        axes.tick_params(labelsize=7)
    figure.axes[0].set_ylabel('position', size=8)
    return figure


def _draw_steps() -> Figure:
    """The distance of every two codes, and of neighbours at two lengths."""
    figure = Figure(figsize=(11, 4.4), dpi=120, layout='constrained')
    all_axes = figure.subplots(2, 5, height_ratios=(2, 1))
    for (top, bottom), (name, (title, _, _)) in zip(all_axes.T, ENCODINGS.items()):
        code = encode(name, FEW)
        distances = np.linalg.norm(code[:, None] - code[None], axis=-1)
        top.imshow(distances, cmap='viridis', interpolation='nearest')
        top.set_title(title, size=10)
        longest = 0.0
        for length in (FEW, FEW // 2):
            steps = np.linalg.norm(np.diff(encode(name, length), axis=0), axis=1)
            bottom.plot(steps, lw=1, label=f'{length} positions')
            longest = max(longest, steps.max())
        bottom.set_ylim(0, 1.1 * longest)
        bottom.set_xlabel('position', size=8)
        bottom.spines[['top', 'right']].set_visible(False)
        for axes in (top, bottom):
            axes.tick_params(labelsize=7)
    all_axes[0, 0].set_ylabel('distance of two\npositions', size=8)
    all_axes[1, 0].set_ylabel('length of a step', size=8)
    all_axes[1, 0].legend(fontsize=7, frameon=False)
    return figure


def _draw_wrap() -> Figure:
    """One sine has the same value at two places; with its cosine they are apart."""
    figure = Figure(figsize=(9, 3.4), dpi=120, layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    wavelength = 24.0
    turn = 2 * np.pi / wavelength
    line = np.linspace(0, wavelength, 400)
    places = np.arange(wavelength)
    pair = np.array([2, 10])  # on both sides of the crest at 6
    left.plot(line, np.sin(turn * line), color='0.7', lw=1)
    left.plot(places, np.sin(turn * places), 'o', color='C0', ms=4)
    left.plot(pair, np.sin(turn * pair), 'o--', color='C3', ms=7)
    left.set_xlabel('position')
    left.set_ylabel('sine')
    left.set_title('one sine: two positions, one code', size=10)
    right.plot(np.cos(turn * line), np.sin(turn * line), color='0.7', lw=1)
    right.plot(np.cos(turn * places), np.sin(turn * places), 'o', color='C0', ms=4)
    right.plot(np.cos(turn * pair), np.sin(turn * pair), 'o--', color='C3', ms=7)
    right.set_aspect('equal')
    right.set_xlabel('cosine')
    right.set_ylabel('sine')
    right.set_title('a pair: each step the same arc', size=10)
    for position in pair:
        for axes, x in ((left, position), (right, np.cos(turn * position))):
            place = (x, np.sin(turn * position))
            axes.annotate(str(position), place, (0, 7), textcoords='offset points')
    for axes in (left, right):
        axes.spines[['top', 'right']].set_visible(False)
    return figure


def _draw_shift() -> Figure:
    """T(step) of sine and cosine pairs; that of least squares is the same."""
    figure = Figure(figsize=(11, 3.3), dpi=120, layout='constrained')
    all_axes = figure.subplots(1, len(STEPS) + 1)
    fitted = fit_shift(encode('sincos', LONG), STEPS[-1])
    matrices = {f'T({step})': shift_matrix(step, WIDTH) for step in STEPS}
    matrices[f'T({STEPS[-1]}) by least squares'] = fitted
    for axes, (title, matrix) in zip(all_axes, matrices.items()):
        shown = axes.imshow(matrix, cmap='RdBu', vmin=-1, vmax=1)
        axes.set_title(title, size=10)
        axes.set(xticks=range(0, WIDTH, 4), yticks=range(0, WIDTH, 4))
        axes.tick_params(labelsize=7)
    all_axes[0].set_ylabel('feature of x + step: sines, cosines', size=8)
    all_axes[0].set_xlabel('feature of x', size=8)
    figure.colorbar(shown, ax=all_axes, shrink=0.8).ax.tick_params(labelsize=7)
    return figure


EXPERIMENT = Experiment(sweep, render, draw, measure)
