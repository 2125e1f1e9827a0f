"""Curves of metrics over the steps of runs: found in their lines, thinned, drawn."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, PercentFormatter

Lines = Sequence[Mapping[str, Any]]  # of metrics.jsonl

# In this order, before all others; what a run is made of, and then how fast it is.
_FIRST = ('loss', 'accuracy', 'bleu', 'exact_match', 'perplexity', 'accuracy_top5')
_LAST = ('learning_rate', 'grad_norm')
# What says how far a run is, or is told once.
_NO_CURVES = ('step', 'examples', 'examples_seen', 'epoch', 'programs')
_RATES = ('step_seconds', 'data_wait', 'flops_utilisation', 'memory_gib')
_SHARES = ('data_wait', 'flops_utilisation')

_MOST_POINTS = 1_000
_LONGEST = 60  # letters of a legend's line
# Told apart by people who see colours in other ways: M. Okabe and K. Ito, "Color
# Universal Design", 2008; those that are dark enough for a thin line.
_COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#000000', '#e69f00', '#56b4e9')


class Curve(NamedTuple):
    """A metric of a run.

    Attributes:
      run: its label.
      kind: 'train' or 'eval'.
      steps: `[n]` int64, n >= 1.
      values: `[n]` float64; may hold NaN and infinities.
    """

    run: str
    kind: str
    steps: np.ndarray
    values: np.ndarray


def find_curves(runs: Mapping[str, Lines]) -> dict[str, list[Curve]]:
    """The metrics that some run has at several steps, by name, in an order of use.

    Args:
      runs: the lines of each run by its label; 'train/loss' and 'eval/loss' are two
        kinds of one metric.

    >>> lines = [{'step': 1, 'train/loss': 3}, {'step': 2, 'train/loss': 2}]
    >>> [curve.values.tolist() for curve in find_curves({'a': lines})['loss']]
    [[3.0, 2.0]]
    """
    found: dict[str, list[Curve]] = {}
    for run, lines in runs.items():
        points: dict[str, list[tuple[int, float]]] = {}
        for line in lines:
            for key, value in line.items():
                if '/' in key and isinstance(value, int | float):
                    points.setdefault(key, []).append((line['step'], value))
        for key, pairs in points.items():
            kind, _, name = key.partition('/')
            if kind not in ('train', 'eval') or name in _NO_CURVES:
                continue
            steps, values = zip(*pairs)
            curve = Curve(run, kind, np.array(steps), np.array(values, float))
            found.setdefault(name, []).append(curve)
    several = (
        n for n, curves in found.items() if max(len(c.steps) for c in curves) > 1
    )
    return {name: found[name] for name in sorted(several, key=_rank)}


def is_rate(name: str) -> bool:
    """Whether a metric tells how fast a run is, not how good."""
    return name in _RATES or name.endswith('_per_second')


def is_share(name: str) -> bool:
    """Whether a metric is told in per cent."""
    return 'accuracy' in name or name in _SHARES


def _rank(name: str) -> tuple[int, int, str]:
    if name in _FIRST:
        return 0, _FIRST.index(name), name
    return (3 if is_rate(name) else 2 if name in _LAST else 1), 0, name


def thin(values: np.ndarray, count: int = _MOST_POINTS) -> np.ndarray:
    """Which points of a long curve to draw, so that it looks the same.

    The smallest and the largest of each stretch stay, and so do the first point and the
    last; what is not finite is left out, and a curve that is short enough stays whole.

    Args:
      values: `[n]`.
      count: of points, about; the more the finer.

    Returns:
      Their indices, int64, ascending.

    >>> thin(np.array([0, 5, 1, 2, -3, 1, 0, 0.5]), count=4)
    array([0, 1, 4, 5, 7])
    """
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) <= count:
        return finite
    kept = {finite[0], finite[-1]}
    for stretch in np.array_split(finite, max(count // 2, 1)):
        kept |= {stretch[values[stretch].argmin()], stretch[values[stretch].argmax()]}
    return np.array(sorted(kept))


def colours(runs: Iterable[str]) -> dict[str, Any]:
    """A colour for each run, the same in all pictures."""
    runs = list(runs)
    if len(runs) <= len(_COLOURS):
        return dict(zip(runs, _COLOURS))
    shades = matplotlib.colormaps['turbo'](np.linspace(0.05, 0.95, len(runs)))
    return dict(zip(runs, shades))


def draw_curves(
    name: str, curves: Sequence[Curve], colour: Mapping[str, Any]
) -> Figure:
    """One metric of all runs: training thin, evaluation with dots.

    Args:
      name: of the metric.
      curves: of it.
      colour: of each run.
    """
    runs = list(dict.fromkeys(curve.run for curve in curves))
    across = max(1, min(len(runs), _LONGEST // (6 + max(map(len, runs)))))
    several = len(colour) > 1  # in the report, of which these may be one
    height = 2.9 + 0.18 * (-(-len(runs) // across) if several else 0)
    figure = Figure(figsize=(5.2, height), dpi=160, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    kinds = {curve.kind for curve in curves}
    for curve in curves:
        kept = thin(curve.values)
        look: dict[str, Any] = {'lw': 1.0, 'alpha': 0.55 if 'eval' in kinds else 0.9}
        if curve.kind == 'eval':
            dots = 'o' if len(kept) <= 40 else ''
            look = {'lw': 1.8, 'marker': dots, 'ms': 3.5, 'zorder': 3}
        x, y = curve.steps[kept], curve.values[kept]
        axes.plot(x, y, color=colour[curve.run], solid_joinstyle='round', **look)
    _style(axes, name, curves)
    _name_kinds(axes, kinds)
    if several:
        legend = figure.legend(
            [Line2D([], [], color=colour[run], lw=2) for run in runs],
            # The end of a long name is what tells it from others.
            [x if len(x) <= _LONGEST else f'…{x[1 - _LONGEST :]}' for x in runs],
            loc='outside lower left',
            ncols=across,
            fontsize=8,
            frameon=False,
            handlelength=1.2,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _style(axes: Axes, name: str, curves: Sequence[Curve]) -> None:
    """Title, scales and ticks."""
    axes.set_title(
        name.replace('_', ' '), loc='left', size=10, weight='bold', parse_math=False
    )
    axes.set_xlabel('step', size=8, loc='right', color='0.35')
    axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    values = np.concatenate([curve.values for curve in curves])
    values = values[np.isfinite(values)]
    decades = name.endswith(('loss', 'perplexity', 'norm')) and values.size
    if decades and values.min() > 0 and values.max() > 100 * values.min():
        axes.set_yscale('log')
    elif is_share(name):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif values.size and max(abs(values)) >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=''))
    axes.tick_params(labelsize=8, color='0.6', labelcolor='0.25')
    axes.grid(axis='y', color='0.9', lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right', 'left']].set_visible(False)
    axes.spines['bottom'].set_color('0.6')
    axes.margins(x=0.01)


def _name_kinds(axes: Axes, kinds: set[str]) -> None:
    """Which lines are of training, at the top right."""
    looks: dict[str, tuple[str, dict[str, Any]]] = {
        'train': ('training', {'lw': 1.0, 'alpha': 0.55}),
        'eval': ('evaluation', {'lw': 1.8, 'marker': 'o', 'ms': 3.5}),
    }
    shown = [looks[kind] for kind in looks if kind in kinds]
    if len(shown) == 1 and 'eval' not in kinds:  # there is nothing to confuse it with
        return
    axes.legend(
        [Line2D([], [], color='0.3', **look) for _, look in shown],
        [text for text, _ in shown],
        loc='lower right',
        bbox_to_anchor=(1.0, 1.0),
        ncols=2,
        fontsize=8,
        frameon=False,
        borderaxespad=0.2,
        handlelength=1.6,
    )
