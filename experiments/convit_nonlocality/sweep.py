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
from vit_jax.results import NOT_RUN, table, values_of

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
            maps[str(step)] = [np.round(look, 4).tolist() for look in looks]
    return {**line, 'non_locality': distances, 'maps': maps}


def render(lines: Sequence[Line]) -> str:
    """Cells that lie between a query and what it attends to, before and after."""
    parts = []
    for name in (*(f'digits/{model}' for model in MODELS), 'ConViT-S', 'DeiT-S'):
        found = values_of(lines, name, 'non_locality')
        if not found:
            parts.append(table([name, 'non-locality'], [['all layers', NOT_RUN]]))
            continue
        first, *_, last = found[0]
        rows = []
        for layer in range(len(found[0][first])):
            cells = [
                f'{statistics.mean(seed[step][layer] for seed in found):.3f}'
                for step in (first, last)
            ]
            rows.append([f'block{layer:02d}', *cells])
        header = [f'{name}, {len(found)} seeds', 'at the start', f'after {int(last):,}']
        parts.append(table(header, rows))
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
        axes.legend(fontsize=7, frameon=False)
    figure.axes[0].set_ylabel('non-locality, patches')
    return {'non_locality.png': figure, 'maps.png': _draw_maps(lines)}


def _draw_maps(lines: Sequence[Line]) -> Figure:
    """Of ConViT's first seed: a row for each layer, before beside after."""
    maps = values_of(lines, 'digits/ConViT', 'maps')[0]
    (before, after), titles = maps.values(), [f'{int(step):,}' for step in maps]
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
