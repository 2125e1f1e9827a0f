"""What of ConViT matters: gates, convolutional start, training (ConViT's table 3).

vit_jax reproduce convit_table3/digits --workdir=/tmp/runs --jobs=2
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.experiment import Cell, Expected, Experiment, Line
from vit_jax.results import mean_sd, published_table, table, values_of, verdict

SOURCE = 'arXiv 2103.10697, table 3'
ROWS = {  # top-1 in full, and on a tenth
    'a': ('ConViT', (82.2, 59.7)),
    'b': ('without gates: one half content, one half position', (82.0, 57.4)),
    'c': ('without the convolutional start', (81.4, 56.9)),
    'd': ('without either', (81.6, 54.6)),
    'e': ('without GPSA: DeiT', (79.1, 47.8)),
    'f': ('GPSA frozen at its convolutional start', (78.6, 54.3)),
    'g': ('GPSA frozen at a random start', (73.7, 44.8)),
}
DIFFERENCES = {  # which rows tell it
    'all of it': 'ae',
    'GPSA alone': 'de',
    'gates, with the convolutional start': 'ab',
    'gates, without it': 'cd',
    'convolutional start, with gates': 'ac',
    'convolutional start, without gates': 'bd',
    'training GPSA, convolutional start': 'af',
    'training GPSA, random start': 'cg',
    'frozen at the convolutional start, or DeiT': 'ef',
    'frozen at a random start, or DeiT': 'eg',
}
FRACTIONS = (1.0, 0.1)
SEEDS = (0, 1, 2)
# ConViT-S+ without GPSA.
DEIT = {
    'model.name': 'DeiT-B/16',
    'model.kwargs.width': 576,
    'model.kwargs.mlp_dim': 2304,
    'model.kwargs.num_heads': 9,
}


class Small(NamedTuple):
    """The rows on other data: a ConViT, and what it is without GPSA.

    Attributes:
      convit, vit: configs of equal size.
      deit: overrides of `vit`: whose kernels start as ConViT's do, and as many heads.
      num_local_layers: of GPSA in the ConViT.
      overrides: of the configs.
    """

    convit: str
    vit: str
    deit: dict[str, Any]
    num_local_layers: int
    overrides: dict[str, Any] = {}


SMALL = {
    'digits': Small(
        'configs/digits_road.py:convit',
        'configs/digits_road.py:learned',
        {'model.name': 'DeiT-Ti/2'},
        num_local_layers=3,
        overrides={'num_steps': 2500},  # as many images seen, however small the part
    ),
    # An epoch is all of the data, however small the part.
    'cifar10': Small(
        'configs/cifar10_convit.py',
        'configs/cifar10_vit.py',
        {'model.name': 'DeiT-Ti/4', 'model.kwargs.num_heads': 4},
        num_local_layers=10,
    ),
}


def sweep() -> Iterator[Cell]:
    """Every cell, the small ones first."""
    for data, small in SMALL.items():
        for seed in SEEDS:
            for row in ROWS:
                for fraction in FRACTIONS:
                    yield Cell(
                        f'{data}/{row}/{fraction:.0%}',
                        small.vit if row == 'e' else small.convit,
                        {
                            'dataset.train_fraction': fraction,
                            **small.overrides,
                            **(small.deit if row == 'e' else {}),
                            **ablate(row, small.num_local_layers),
                        },
                        seed,
                    )
    for row, (_, published) in ROWS.items():
        for fraction, top1 in zip(FRACTIONS, published):
            yield Cell(
                f'{row}/{fraction:.0%}',
                'configs/imagenet_convit.py',
                {
                    'dataset.train_fraction': fraction,
                    'optim.learning_rate': 4e-4,
                    **(DEIT if row == 'e' else {'model.name': 'ConViT-S+/16'}),
                    **ablate(row, num_local_layers=10),
                },
                expected=Expected(top1, SOURCE),
            )


def ablate(row: str, num_local_layers: int) -> dict[str, Any]:
    """What a row takes away from ConViT, as overrides."""
    overrides: dict[str, Any] = {}
    if row in 'bd':  # sigmoid(0) is one half, and stays
        overrides['model.kwargs.gating_init'] = 0.0
        overrides['optim.freeze'] = ('.*/gating',)
    if row in 'cdg':
        overrides['model.kwargs.local_init'] = False
    if row in 'fg':
        last = num_local_layers - 1
        overrides['optim.freeze'] = (f'block0[0-{last}]/attention/',)
    return overrides


def render(lines: Sequence[Line]) -> str:
    """Each row on small data, and its differences; then what is published."""
    parts = []
    for data in SMALL:
        rows = [
            [row, what, *(mean_sd(_small(lines, data, row, f)) for f in FRACTIONS)]
            for row, (what, _) in ROWS.items()
        ]
        parts.append(table(['', data, *(f'{f:.0%}' for f in FRACTIONS)], rows))
        header = [data, 'difference', 'paper', 'here']
        parts.append(table(header, _differences(lines, data)))
    parts.append(published_table(sweep(), lines))
    return '\n'.join(parts)


def _differences(lines: Sequence[Line], data: str) -> Iterator[list[str]]:
    """Each in the direction of the paper's."""
    for what, pair in DIFFERENCES.items():
        for i, fraction in enumerate(FRACTIONS):
            high, low = sorted(pair, key=lambda row: ROWS[row][1][i], reverse=True)
            published = ROWS[high][1][i] - ROWS[low][1][i]
            here = verdict(*(_small(lines, data, row, fraction) for row in (high, low)))
            told = f'{what}: {high} above {low}'
            yield [f'{fraction:.0%}', told, f'{published:+.1f}', here]


def _small(lines: Sequence[Line], data: str, row: str, fraction: float) -> list[float]:
    return values_of(lines, f'{data}/{row}/{fraction:.0%}')


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """Accuracy of each row, a point for a seed, beside the published one."""
    prefixes = {f'{data}, here': f'{data}/' for data in SMALL} | {'ImageNet, here': ''}
    panels = {}
    for title, prefix in prefixes.items():
        found = [
            [values_of(lines, f'{prefix}{row}/{f:.0%}') for row in ROWS]
            for f in FRACTIONS
        ]
        if any(map(any, found)):
            panels[title] = found
    panels['ImageNet, published'] = [
        [[top1[i]] for _, top1 in ROWS.values()] for i in range(len(FRACTIONS))
    ]
    figure = Figure(figsize=(4 + 2 * len(panels), 2.8), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (title, found) in zip(grid.flat, panels.items()):
        _draw_rows(axes, title, found)
    figure.axes[0].set_yticks(
        range(len(ROWS)), [f'{row}: {what}' for row, (what, _) in ROWS.items()], size=7
    )
    figure.axes[0].invert_yaxis()
    figure.axes[0].legend(fontsize=7, frameon=False)
    return {'ablations.png': figure}


def _draw_rows(axes: Axes, title: str, found: list[list[list[float]]]) -> None:
    """A colour for each fraction, by row and seed; a diamond for the mean."""
    for i, (fraction, rows) in enumerate(zip(FRACTIONS, found)):
        for place, values in enumerate(rows):
            axes.plot(
                values, [place] * len(values), 'o', ms=3, color=f'C{i}', alpha=0.5
            )
        means = {y: statistics.mean(values) for y, values in enumerate(rows) if values}
        axes.plot(
            list(means.values()),
            list(means),
            'D',
            ms=5,
            mfc='none',
            color=f'C{i}',
            label=f'{fraction:.0%} of the data',
        )
    axes.set_title(title, size=9)
    axes.set_xlabel('accuracy, %')
    axes.grid(axis='x', color='0.9')
    axes.spines[['top', 'right', 'left']].set_visible(False)
    axes.tick_params(axis='y', length=0)


EXPERIMENT = Experiment(sweep, render, draw)
