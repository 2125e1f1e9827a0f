"""How far each layer looks while ConViT, and a ViT, learn.

vit_jax reproduce convit_nonlocality/digits --workdir=/tmp/runs
"""

import itertools
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
from vit_jax.pictures import draw_heads
from vit_jax.results import NOT_RUN, table, values_of, verdict_of_pairs

MODELS = {'ConViT': 'configs/digits_convit.py', 'ViT': 'configs/digits_vit.py'}
CELLS = {
    'digits': [f'digits/{model}' for model in MODELS],
    'ImageNet': ['ConViT-S', 'DeiT-S'],
}
SEEDS = (0, 1, 2)
KEEP = {'checkpoint.every_steps': 100, 'checkpoint.keep': 1000}
IMAGES = 64
AXIS = 'non-locality, patches'
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
    """Trains, and measures each head's non-locality at every checkpoint.

    Also the maps of one query of one image, before and after.
    """
    line = train_cell(cell, workdir, data_dir)
    run = build_cell(cell, data_dir=data_dir)
    images = first_images(run, IMAGES)
    maps_of = jax.jit(lambda variables: attention_maps(run.model, variables, images))
    distances, maps = {}, {}
    for step, variables in each_checkpoint(run, workdir):
        layers = maps_of(variables).layers
        means = [layer.non_locality.mean(axis=0) for layer in layers]
        distances[str(step)] = [heads.tolist() for heads in jax.device_get(means)]
        if step in (0, run.num_steps):
            looks = [layer.grid_weights[0, :, *QUERY] for layer in layers]
            # In float64, whose JSON is as short as the rounded numbers.
            maps[str(step)] = [np.asarray(x, float).round(4).tolist() for x in looks]
    return {**line, 'non_locality_of_heads': distances, 'maps': maps}


def render(lines: Sequence[Line]) -> str:
    """Cells that lie between a query and what it attends to, before and after.

    And the claim: do the layers come to look further, the second least?
    """
    parts = []
    for name in itertools.chain(*CELLS.values()):
        found = values_of(lines, name, 'non_locality_of_heads')
        if not found:
            parts.append(table([name, 'non-locality'], [['all layers', NOT_RUN]]))
            continue
        first, *_, last = found[0]
        before, after = (
            [_over_heads(seed[step]) for seed in found] for step in (first, last)
        )
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


def _over_heads(layers: Sequence[Sequence[float]]) -> list[float]:
    """The mean of each layer."""
    return [statistics.mean(heads) for heads in layers]


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """Non-locality over training by layer and by head; and where one query looks.

    Of digits and of ImageNet, as far as these have run.
    """
    pictures = {}
    for data, names in CELLS.items():
        found = {
            name: values_of(lines, name, 'non_locality_of_heads') for name in names
        }
        found = {name: values for name, values in found.items() if values}
        if found:
            pictures[f'{data}.png'] = _draw_layers(found)
        for name, values in found.items():
            runs = [{int(step): x for step, x in seed.items()} for seed in values]
            model = name.rpartition('/')[2]
            pictures[f'{data}_{model}_heads.png'] = draw_heads(runs, AXIS)
            if 'ConViT' in name:
                maps = values_of(lines, name, 'maps')[0]
                pictures[f'{data}_{model}_maps.png'] = _draw_maps(maps)
    return pictures


def _draw_layers(found: dict[str, list[dict[str, list[list[float]]]]]) -> Figure:
    """A panel for each model, a line for each layer of each seed."""
    size = (0.6 + 3.2 * len(found), 2.8)
    figure = Figure(figsize=size, dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)
    for axes, (name, seeds) in zip(panels.flat, found.items()):
        for seed, values in enumerate(seeds):
            steps = [int(step) for step in values]
            for layer, means in enumerate(zip(*map(_over_heads, values.values()))):
                label = f'block{layer:02d}' if seed == 0 else None
                axes.plot(steps, means, color=f'C{layer}', lw=1, label=label)
        axes.set_title(name.rpartition('/')[2], size=10)
        axes.set_xlabel('updates')
        axes.set_ylim(bottom=0)
        axes.spines[['top', 'right']].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    panels[0, 0].set_ylabel(AXIS)
    return figure


def _draw_maps(maps: dict[str, list]) -> Figure:
    """Of one run: a row for each layer, before beside after."""
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
