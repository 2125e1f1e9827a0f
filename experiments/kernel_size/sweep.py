"""What large kernels cost, in multiply-adds and in data: CNNs of kernels 3 to 15.

vit_jax reproduce kernel_size --workdir=/tmp/runs --jobs=2
"""

import pathlib
import statistics
from collections.abc import Iterator, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.experiment import Cell, Experiment, Line, build_cell, train_cell
from vit_jax.results import (
    NOT_RUN,
    by_seed,
    mean_sd,
    table,
    values_of,
    verdict_of_pairs,
)
from vit_jax.summary import count

KERNELS = (3, 5, 7, 11, 15)
SMALL = (3, 5)  # of three layers that see a part of a digit, and the whole
FRACTIONS = (0.1, 0.3, 1.0)
SEEDS = (0, 1, 2)


def sweep() -> Iterator[Cell]:
    """Every cell."""
    for seed in SEEDS:
        for fraction in FRACTIONS:
            for kernel in KERNELS:
                overrides = {
                    'dataset.train_fraction': fraction,
                    'dataset.image_size': (16, 16),  # room for the largest
                    'model.kwargs.widths': (24, 24, 48),
                    'model.kwargs.strides': (2, 1, 2),
                    'model.kwargs.kernel_size': kernel,
                }
                config = 'configs/digits_road.py:cnn'
                yield Cell(f'digits/{kernel}/{fraction:.0%}', config, overrides, seed)


def measure(cell: Cell, workdir: pathlib.Path, data_dir: str | None) -> Line:
    """Trains, and counts the multiply-adds of an image."""
    run = build_cell(cell, data_dir=data_dir)
    _, macs = count(run.model, run.inputs)
    return {**train_cell(cell, workdir, data_dir), 'macs': macs}


def render(lines: Sequence[Line]) -> str:
    """Cost and accuracy of each kernel; whether small ones are above the largest.

    These are compared by seed, which has the same part of the digits for all kernels.
    """
    rows = []
    for kernel in KERNELS:
        first = [line for line in lines if line['cell'].startswith(f'digits/{kernel}/')]
        cost = [NOT_RUN] * 3
        if first:
            rate = statistics.median(line['rates']['step_seconds'] for line in first)
            cost = [
                f'{first[0]["params"]:,}',
                f'{first[0]["macs"] / 1e6:.2f}M',
                f'{1000 * rate:.1f}',
            ]
        names = [f'digits/{kernel}/{fraction:.0%}' for fraction in FRACTIONS]
        rows.append(
            [str(kernel), *cost, *(mean_sd(values_of(lines, n)) for n in names)]
        )
    header = ['kernel', 'parameters', 'multiply-adds', 'ms a step']
    header += [f'{fraction:.0%} of the digits' for fraction in FRACTIONS]
    *_, largest = KERNELS
    claims = []
    for fraction in map('{:.0%}'.format, FRACTIONS):
        found = {k: by_seed(lines, f'digits/{k}/{fraction}') for k in KERNELS}
        claims.append([fraction, *(_above(found[k], found[largest]) for k in SMALL)])
    titles = [f'{kernel} is more accurate than {largest}' for kernel in SMALL]
    return f'{table(header, rows)}\n{table(["digits", *titles], claims)}'


def _above(first: dict[int, float], second: dict[int, float]) -> str:
    return verdict_of_pairs([first[s] - second[s] for s in first if s in second])


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """Accuracy over the kernel, a line for each fraction; multiply-adds beside."""
    figure = Figure(figsize=(7, 3), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    accuracy, cost = figure.subplots(1, 2)
    for fraction in FRACTIONS:
        found = {k: values_of(lines, f'digits/{k}/{fraction:.0%}') for k in KERNELS}
        means = {k: statistics.mean(values) for k, values in found.items() if values}
        label = f'{fraction:.0%} of the digits'
        accuracy.plot(list(means), list(means.values()), 'o-', ms=4, label=label)
    macs = {int(line['cell'].split('/')[1]): line['macs'] / 1e6 for line in lines}
    kernels = sorted(macs)
    cost.plot(kernels, [macs[kernel] for kernel in kernels], 'o-', color='k', ms=4)
    accuracy.set_ylabel('test accuracy, %')
    cost.set_ylabel('million multiply-adds an image')
    for axes in (accuracy, cost):
        axes.set_xticks(KERNELS)
        axes.set_xlabel('side of the kernel')
        axes.spines[['top', 'right']].set_visible(False)
    cost.set_ylim(bottom=0)
    accuracy.legend(fontsize=8, frameon=False)
    return {'kernel_size.png': figure}


EXPERIMENT = Experiment(sweep, render, draw, measure)
