"""Pictures: the derivation of sines and cosines, and what training made of them."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from vit_jax.experiment import Line
from vit_jax.layers.position import shift_matrix
from vit_jax.results import values_of

from . import unseen
from .computed import ENCODINGS, LONG, STEPS, WIDTH, encode, fit_shift

FEW = 64  # positions that are drawn


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """Codes, steps, one sine that wraps, a shift as a matrix; what was trained."""
    figures = {
        'encodings.png': _draw_encodings(),  # the codes themselves
        'steps.png': _draw_steps(),
        'wrap.png': _draw_wrap(),
        'shift.png': _draw_shift(),
    }
    if any(line['cell'].startswith('unseen/') for line in lines):
        figures['unseen.png'] = _draw_unseen(lines)
    return figures


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


def _draw_unseen(lines: Sequence[Line]) -> Figure:
    """Gradients of the first steps; accuracy by length and by place; means of seeds."""
    figure = Figure(figsize=(11, 6), dpi=120, layout='constrained')
    all_axes = figure.subplots(2, 3)
    lengths = unseen.LENGTHS
    places = range(unseen.BACK, max(lengths))
    for row, (norm, where) in zip(all_axes, unseen.NORMS.items()):
        gradient, by_length, by_place = row
        for i, (encoding, (title, _, _)) in enumerate(ENCODINGS.items()):
            read = partial(values_of, lines, unseen.cell_name(encoding, norm))
            if norms := read('grad_norms'):
                style = {'color': f'C{i}', 'label': title, 'lw': 1}
                gradient.plot(np.mean(norms, axis=0), **style)
                shares = [list(right.values()) for right in read('right_by_length')]
                by_length.plot(lengths, np.mean(shares, axis=0), 'o-', ms=3, **style)
                by_place.plot(places, np.mean(read('right_by_place'), axis=0), **style)
        gradient.set_ylim(bottom=0)
        gradient.set_ylabel(f'{where}\n\nnorm of the gradient')
        for axes in (by_length, by_place):
            axes.axvline(unseen.TRAINED[1], color='0.8', lw=1)  # where training ends
            axes.axhline(100 / unseen.SYMBOLS, color='0.8', lw=1)  # chance
            axes.set_ylim(0, 105)
            axes.set_ylabel('right, %')
        for axes in row:
            axes.spines[['top', 'right']].set_visible(False)
    labels = 'step', 'length of the sequence', f'place, at length {max(lengths)}'
    for axes, label in zip(all_axes[1], labels):
        axes.set_xlabel(label)
    all_axes[0, 0].legend(fontsize=8, frameon=False)
    return figure
