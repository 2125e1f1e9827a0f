"""How local a start, in how many layers, helps on little data (ConViT's figure 8).

vit_jax reproduce convit_locality/digits --workdir=/tmp/runs --jobs=2
"""

import statistics
from collections.abc import Iterator, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.experiment import Cell, Experiment, Line
from vit_jax.results import by_seed, mean_sd, table, values_of, verdict_of_pairs

STRENGTHS = (0.25, 0.5, 1.0, 2.0)
LAYERS = (1, 2, 3)  # of four that are GPSA
SEEDS = (0, 1, 2)
PAPER_STRENGTHS = (0.5, 1.0, 1.5, 2.0)
PAPER_LAYERS = (3, 6, 9, 10)  # of twelve


def sweep() -> Iterator[Cell]:
    """Every cell, the small ones first."""
    for seed in SEEDS:
        for layers in LAYERS:
            for strength in STRENGTHS:
                overrides = {
                    'dataset.train_fraction': 0.1,
                    'num_steps': 1000,
                    'model.kwargs.num_local_layers': layers,
                    'model.kwargs.locality_strength': strength,
                }
                name = f'digits/{layers}/{strength:g}'
                yield Cell(name, 'configs/digits_road.py:convit', overrides, seed)
    for layers in PAPER_LAYERS:
        for strength in PAPER_STRENGTHS:
            overrides = {
                'dataset.train_fraction': 0.1,  # 300 epochs of all: 3,000 of it
                'model.kwargs.num_local_layers': layers,
                'model.kwargs.locality_strength': strength,
            }
            name = f'ConViT-S/{layers}/{strength:g}'
            yield Cell(name, 'configs/imagenet_convit.py', overrides)


def render(lines: Sequence[Line]) -> str:
    """Accuracy by strength and number of layers, and both parts of the claim."""
    parts = []
    for data, all_layers, strengths in (
        ('digits', LAYERS, STRENGTHS),
        ('ConViT-S', PAPER_LAYERS, PAPER_STRENGTHS),
    ):
        rows = [
            [
                str(layers),
                *(
                    mean_sd(values_of(lines, f'{data}/{layers}/{s:g}'))
                    for s in strengths
                ),
            ]
            for layers in all_layers
        ]
        header = [f'{data}: GPSA layers', *(f'strength {s:g}' for s in strengths)]
        parts.append(table(header, rows))
        rows = [
            [
                f'{all_layers[-1]} layers above {all_layers[0]}, mean over strengths',
                _compare(
                    lines,
                    [f'{data}/{all_layers[-1]}/{s:g}' for s in strengths],
                    [f'{data}/{all_layers[0]}/{s:g}' for s in strengths],
                ),
            ],
            [
                f'strength {strengths[-1]:g} above {strengths[0]:g}, mean over layers',
                _compare(
                    lines,
                    [f'{data}/{n}/{strengths[-1]:g}' for n in all_layers],
                    [f'{data}/{n}/{strengths[0]:g}' for n in all_layers],
                ),
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
    if not any(line['cell'].startswith('digits/') for line in lines):
        return {}
    figure = Figure(figsize=(4.5, 3.2), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, layers in enumerate(LAYERS):
        found = {s: values_of(lines, f'digits/{layers}/{s:g}') for s in STRENGTHS}
        means = {s: statistics.mean(values) for s, values in found.items() if values}
        for strength, values in found.items():
            axes.plot([strength] * len(values), values, 'o', ms=3, color=f'C{i}')
        label = f'{layers} of 4'
        axes.plot(list(means), list(means.values()), color=f'C{i}', label=label)
    axes.set_xscale('log', base=2)
    axes.set_xticks(STRENGTHS, [f'{strength:g}' for strength in STRENGTHS])
    axes.set_title('on a tenth of the digits', size=10)
    axes.set_xlabel('locality strength')
    axes.set_ylabel('test accuracy, %')
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(title='GPSA layers', fontsize=8, frameon=False)
    return {'locality.png': figure}


EXPERIMENT = Experiment(sweep, render, draw)
