"""How local a start, in how many layers, helps on little data (ConViT's figure 8).

vit_jax reproduce convit_locality/digits --workdir=/tmp/runs --jobs=2
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.experiment import Cell, Experiment, Line
from vit_jax.results import by_seed, mean_sd, table, values_of, verdict_of_pairs

SEEDS = (0, 1, 2)
# Numbers of layers that are GPSA, of four and of twelve; strengths.
GRIDS = {
    'digits': ((1, 2, 3), (0.25, 0.5, 1.0, 2.0)),
    'ConViT-S': ((3, 6, 9), (0.01, 0.1, 1.0)),
}
TITLES = {
    'digits': 'on a tenth of the digits',
    'ConViT-S': 'on 100 classes of ImageNet',
}
PAPER_STEPS = {  # 300 epochs, of which 5 warm-up, of some 130,000 images
    'num_epochs': None,
    'num_steps': 76_000,
    'optim.warmup_steps': 1267,
}


def sweep() -> Iterator[Cell]:
    """Every cell, the small ones first."""
    few = {'dataset.train_fraction': 0.1, 'num_steps': 1000}
    for seed in SEEDS:
        for name, overrides in _grid('digits'):
            config = 'configs/digits_road.py:convit'
            yield Cell(name, config, {**few, **overrides}, seed)
    for name, overrides in _grid('ConViT-S'):
        yield Cell(name, 'configs/imagenet_convit.py', {**PAPER_STEPS, **overrides})


def _grid(data: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cells and their overrides; without GPSA there is no strength."""
    all_layers, strengths = GRIDS[data]
    yield f'{data}/0', {'model.kwargs.num_local_layers': 0}
    for layers in all_layers:
        for strength in strengths:
            yield (
                f'{data}/{layers}/{strength:g}',
                {
                    'model.kwargs.num_local_layers': layers,
                    'model.kwargs.locality_strength': strength,
                },
            )


def render(lines: Sequence[Line]) -> str:
    """Accuracy by strength and number of layers, and both parts of the claim."""
    parts = []
    for data, (layers, strengths) in GRIDS.items():
        header = [f'{data}: GPSA layers', *(f'strength {s:g}' for s in strengths)]
        rows = [['0', *[mean_sd(values_of(lines, f'{data}/0'))] * len(strengths)]]
        for n in layers:
            names = (f'{data}/{n}/{s:g}' for s in strengths)
            rows.append([str(n), *(mean_sd(values_of(lines, name)) for name in names)])
        parts.append(table(header, rows))

        least, most, weak, strong = layers[0], layers[-1], strengths[0], strengths[-1]
        by_layers = {n: [f'{data}/{n}/{s:g}' for s in strengths] for n in layers}
        by_strength = {s: [f'{data}/{n}/{s:g}' for n in layers] for s in strengths}
        rows = [
            [
                f'{least} above 0 layers, mean over strengths',
                _compare(lines, by_layers[least], [f'{data}/0']),
            ],
            [
                f'{most} above {least} layers, mean over strengths',
                _compare(lines, by_layers[most], by_layers[least]),
            ],
            [
                f'strength {strong:g} above {weak:g}, mean over layers',
                _compare(lines, by_strength[strong], by_strength[weak]),
            ],
        ]
        parts.append(table([data, 'over seeds'], rows))
    return '\n'.join(parts)


def _compare(lines: Sequence[Line], first: Sequence[str], second: Sequence[str]) -> str:
    """Whether the first cells are above the second, by seed: each has its own part."""
    sides = [[by_seed(lines, name) for name in names] for names in (first, second)]
    seeds = set.intersection(*(set(cell) for side in sides for cell in side))
    differences = []
    for seed in sorted(seeds):
        a, b = (statistics.mean(cell[seed] for cell in side) for side in sides)
        differences.append(a - b)
    return verdict_of_pairs(differences)


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """Accuracy over strength, a line for a number of layers, a point for a seed."""
    return {
        f'{data}.png': _draw_grid(lines, data)
        for data in GRIDS
        if any(line['cell'].startswith(f'{data}/') for line in lines)
    }


def _draw_grid(lines: Sequence[Line], data: str) -> Figure:
    all_layers, strengths = GRIDS[data]
    figure = Figure(figsize=(4.5, 3.2), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if none := values_of(lines, f'{data}/0'):
        axes.axhline(statistics.mean(none), color='0.6', lw=1, label='none')
        axes.plot([strengths[0]] * len(none), none, 'o', ms=3, color='0.6')
    for i, layers in enumerate(all_layers):
        found = {s: values_of(lines, f'{data}/{layers}/{s:g}') for s in strengths}
        means = {s: statistics.mean(values) for s, values in found.items() if values}
        for strength, values in found.items():
            axes.plot([strength] * len(values), values, 'o', ms=3, color=f'C{i}')
        axes.plot(list(means), list(means.values()), color=f'C{i}', label=f'{layers}')
    axes.set_xscale('log', base=2)
    axes.set_xticks(strengths, [f'{strength:g}' for strength in strengths])
    axes.set_title(TITLES[data], size=10)
    axes.set_xlabel('locality strength')
    axes.set_ylabel('test accuracy, %')
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(title='GPSA layers', fontsize=8, frameon=False)
    return figure


EXPERIMENT = Experiment(sweep, render, draw)
