"""How far each layer looks while ConViT, and a ViT, learn.

vit_jax reproduce convit_nonlocality/digits --workdir=/tmp/runs
"""

import pathlib
import statistics
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.experiment import (
    Cell,
    Experiment,
    Line,
    build_cell,
    each_checkpoint,
    first_images,
    train_cell,
)
from vit_jax.maps import attention_maps
from vit_jax.results import NOT_RUN, table, values_of, verdict_of_pairs

MODELS = {'ConViT': 'configs/digits_convit.py', 'ViT': 'configs/digits_vit.py'}
SEEDS = (0, 1, 2)
KEEP = {'checkpoint.every_steps': 100, 'checkpoint.keep': 1000}
IMAGES = 64
QUERY = (1, 2)  # of the maps that are drawn, of the first image


def sweep() -> Iterator[Cell]:
    """Every cell, the small ones first."""
    for seed in SEEDS:
        for model, config in MODELS.items():
            yield Cell(f'digits/{model}', config, KEEP, seed)
    keep = {'checkpoint.every_steps': 25_000, 'checkpoint.keep': 1000}
    yield Cell('ConViT-S', 'configs/imagenet_convit.py', keep)
    yield Cell('DeiT-S', 'configs/imagenet_deit.py', keep)


def measure(cell: Cell, workdir: pathlib.Path, data_dir: str | None) -> Line:
    """Trains, and measures each layer's non-locality at every checkpoint.

    Also the maps of one query of one image, before and after.
    """
    line = train_cell(cell, workdir, data_dir)
    run = build_cell(cell, data_dir=data_dir)
    images = first_images(run, IMAGES)
    maps_of = jax.jit(lambda variables: attention_maps(run.model, variables, images))
    distances, maps = {}, {}
    for step, variables in each_checkpoint(run, workdir):
        layers = maps_of(variables).layers
        means = [float(layer.non_locality.mean()) for layer in layers]
        distances[str(step)] = means
        if step in (0, run.num_steps):
            looks = [layer.grid_weights[0, :, *QUERY] for layer in layers]
            # In float64, whose JSON is as short as the rounded numbers.
            maps[str(step)] = [np.asarray(x, float).round(4).tolist() for x in looks]
    return {**line, 'non_locality': distances, 'maps': maps}


def render(lines: Sequence[Line]) -> str:
    """Cells that lie between a query and what it attends to, before and after.

    And the claim: do the layers come to look further, the second least?
    """
    parts = []
    for name in (*(f'digits/{model}' for model in MODELS), 'ConViT-S', 'DeiT-S'):
        found = values_of(lines, name, 'non_locality')
        if not found:
            parts.append(table([name, 'non-locality'], [['all layers', NOT_RUN]]))
            continue
        first, *_, last = found[0]
        before, after = ([seed[step] for seed in found] for step in (first, last))
        rows = []
        for layer, ends in enumerate(zip(zip(*before), zip(*after))):
            further = [end - start for start, end in zip(*ends)]
            means = [f'{statistics.mean(values):.3f}' for values in ends]
            row = [f'block{layer:02d}', *means, verdict_of_pairs(further, '.3f')]
            rows.append(row)
        # Of the others, the one that is nearest to it.
        least = [min(x[0], *x[2:]) - x[1] for x in after]
        told = verdict_of_pairs(least, '.3f')
        rows.append(['block01 looks least far', '', '', told])
        header = [f'{name}, {len(found)} seeds', 'at the start', f'after {int(last):,}']
        parts.append(table([*header, 'further than at the start?'], rows))
    return '\n'.join(parts)


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """Non-locality over training; and where one query looks, before and after."""
    if not values_of(lines, 'digits/ConViT', 'maps'):
        return {}
    figure = Figure(figsize=(7, 2.8), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    for axes, model in zip(figure.subplots(1, len(MODELS), sharey=True), MODELS):
        found = values_of(lines, f'digits/{model}', 'non_locality')
        for seed, distances in enumerate(found):
            steps = [int(step) for step in distances]
            for layer, values in enumerate(zip(*distances.values())):
                label = f'block{layer:02d}' if seed == 0 else None
                axes.plot(steps, values, color=f'C{layer}', lw=1, label=label)
        axes.set_title(model, size=10)
        axes.set_xlabel('updates')
        axes.set_ylim(bottom=0)
        axes.spines[['top', 'right']].set_visible(False)
        if found:
            axes.legend(fontsize=7, frameon=False)
    figure.axes[0].set_ylabel('non-locality, patches')
    return {'non_locality.png': figure, 'maps.png': _draw_maps(lines)}


def _draw_maps(lines: Sequence[Line]) -> Figure:
    """Of ConViT's first seed: a row for each layer, before beside after."""
    maps = values_of(lines, 'digits/ConViT', 'maps')[0]
    before, after = maps.values()
    titles = [f'step {int(step):,}' for step in maps]
    depth, heads = len(before), len(before[0])
    size = (0.8 * 2 * heads + 0.8, 0.8 * depth + 0.5)
    figure = Figure(figsize=size, dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    grid = figure.subplots(depth, 2 * heads)
    for layer in range(depth):
        for column, look in enumerate([*before[layer], *after[layer]]):
            axes = grid[layer, column]
            axes.imshow(look, vmin=0, cmap='viridis')
            axes.plot(QUERY[1], QUERY[0], 'r+', ms=5)
            axes.set_xticks([])
            axes.set_yticks([])
            if layer == 0:
                title = titles[column // heads]
                axes.set_title(f'head {column % heads}\n{title}', size=7)
        grid[layer, 0].set_ylabel(f'block{layer:02d}', size=7)
    return figure


EXPERIMENT = Experiment(sweep, render, draw, measure)
