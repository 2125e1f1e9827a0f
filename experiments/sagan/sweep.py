"""SAGAN with self-attention and without: how close its images are to real ones.

vit_jax reproduce sagan/digits --workdir=/tmp/runs --jobs=2
"""

import base64
import io
import pathlib
from collections.abc import Iterator, Sequence

import filelock
import jax
import matplotlib.image
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.build import Run
from vit_jax.experiment import (
    Cell,
    Experiment,
    Line,
    build_cell,
    cell_folder,
    train_cell,
)
from vit_jax.generation import to_pixels
from vit_jax.pretrained import load_variables
from vit_jax.results import mean_sd, table, values_of, verdict
from vit_jax.train import train
from vit_jax.typing import Array, Variables
from vit_jax.writer import read_evaluations, read_metrics

DATASETS = ('digits', 'cifar10')
VARIANTS = {'attention': '', 'plain': ':plain'}
NETS = ('generator', 'discriminator')
SEEDS = (0, 1, 2)
# In whose features the distance is measured: one for all cells of a dataset.
CLASSIFIERS = {name: f'configs/{name}_cnn.py' for name in DATASETS}
GRID = 6  # images along each side of a picture
MAPPED = 3  # images whose attention is shown
QUERIES = ((0.3, 0.3), (0.5, 0.5), (0.7, 0.7))  # (down, right), shares of the map


def sweep() -> Iterator[Cell]:
    """Every cell."""
    for dataset in DATASETS:
        for seed in SEEDS:
            for variant, suffix in VARIANTS.items():
                config = f'configs/{dataset}_sagan.py{suffix}'
                yield Cell(f'{dataset}/{variant}', config, {}, seed)


def measure(cell: Cell, workdir: pathlib.Path, data_dir: str | None) -> Line:
    """Trains a cell, and before it the classifier that judges it, if need be."""
    root = workdir.parents[cell.name.count('/') + 1]
    dataset = cell.name.partition('/')[0]
    judge = Cell(f'{dataset}/classifier', CLASSIFIERS[dataset], {})
    folder = cell_folder(judge, root)
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.parent / '.lock'):  # cells run side by side
        judged = train(build_cell(judge, data_dir=data_dir), folder)

    # Where the classifier lies is no part of the cell.
    overrides = {**cell.overrides, 'gan.classifier': str(folder)}
    given = cell._replace(overrides=overrides)
    line = train_cell(given, workdir, data_dir)
    run = build_cell(given, data_dir=data_dir)
    variables, _ = load_variables(f'{workdir}@ema', run.model, run.inputs)
    line['test'] = {
        'classifier_accuracy': judged['accuracy'],
        'frechet_by_step': {
            str(step): evaluation['ema_frechet']
            for step, evaluation in read_evaluations(workdir).items()
        },
        'gamma_by_step': read_gammas(workdir),
        **measure_distance(run, variables),
    }
    if cell.seed == SEEDS[0]:
        line['pictures'] = take_pictures(run, variables)
    return line


def read_gammas(workdir: pathlib.Path) -> dict[str, dict[str, float]]:
    """Net -> step -> its gamma, a mean over the steps between two lines of the log."""
    lines = read_metrics(workdir)
    names = {net: f'train/{net}_attention_gamma' for net in NETS}
    return {
        net: {str(line['step']): line[name] for line in lines if name in line}
        for net, name in names.items()
    }


def measure_distance(run: Run, variables: Variables) -> Line:
    """Frechet distances from the images that were trained on.

    Returns:
      'frechet', of many generated images; 'floor', of the held-out real images; and,
      since few images are farther away by chance alone, 'frechet_of_few', of as many
      generated ones as there are held-out ones, 'held_out'.
    """
    score = run.score
    real = score.image_features(run.eval_data())
    count = max(score.num_samples, len(real))
    features = score.sample_features(variables, count)
    return {
        'frechet': score.distance(features[: score.num_samples]),
        'samples': score.num_samples,
        'floor': score.distance(real),
        'frechet_of_few': score.distance(features[: len(real)]),
        'held_out': len(real),
    }


def take_pictures(run: Run, variables: Variables) -> Line:
    """Real and generated images, and where both nets attend in the latter, as JSON."""
    sampler = run.score.sampler
    pixels = sampler(variables, GRID**2)
    batch = next(iter(run.parallel.prefetch(run.eval_data())))
    real = np.asarray(batch['image']).reshape(-1, *pixels.shape[1:])
    result = {'samples': encode(tile(pixels)), 'real': encode(tile(real[: GRID**2]))}
    if run.model.attention:
        latents = sampler.latents(np.arange(MAPPED))
        images, *of_generator = attend(run, variables, latents, 'generate')
        _, *of_discriminator = attend(run, variables, images, '__call__')
        result['mapped'] = encode(np.concatenate(to_pixels(images), axis=1))
        result['maps'] = dict(zip(NETS, (*of_generator, *of_discriminator)))
    return result


def attend(run: Run, variables: Variables, given: Array, method: str) -> tuple:
    """What a net makes of its inputs, and its maps `[image][query][row][column]`."""

    @jax.jit
    def apply(variables: Variables, given: Array):
        return run.model.apply(
            variables, given, train=False, method=method, mutable=['intermediates']
        )

    out, sown = apply(variables, given)
    (weights,) = jax.tree.leaves(sown)  # [B, 1, R, C, R', C']
    maps = []
    for image in np.asarray(weights)[:, 0]:
        places = [query_place(query, image.shape[:2]) for query in QUERIES]
        maps.append([image[place].round(5).tolist() for place in places])
    return out, maps


def query_place(query: tuple[float, float], grid: tuple[int, ...]) -> tuple[int, ...]:
    """(row, column) of a query point on a map.

    >>> query_place((0.3, 0.5), (8, 16))
    (2, 8)
    """
    return tuple(int(share * n) for share, n in zip(query, grid))


def tile(pixels: np.ndarray) -> np.ndarray:
    """`[GRID^2, h, w, c]` side by side, a grey line after each."""
    framed = np.pad(pixels, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=128)
    rows = framed.reshape(GRID, GRID, *framed.shape[1:])
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def encode(pixels: np.ndarray) -> str:
    """`[h, w, c]` uint8, c = 1 or 3, as PNG in base64."""
    file = io.BytesIO()
    rgb = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    matplotlib.image.imsave(file, rgb, format='png', metadata={'Software': None})
    return base64.b64encode(file.getvalue()).decode()


def decode(text: str) -> np.ndarray:
    """The image behind `encode`, `[h, w, 3]` or with opacity, float32 in [0, 1]."""
    return matplotlib.image.imread(io.BytesIO(base64.b64decode(text)), format='png')


def render(lines: Sequence[Line]) -> str:
    """Distances of the averaged generator with the floor beside; the claim."""
    rows, claims = [], []
    for dataset in DATASETS:
        found = {
            variant: values_of(lines, f'{dataset}/{variant}', 'test', 'frechet')
            for variant in VARIANTS
        }
        for variant in VARIANTS:
            name = f'{dataset}/{variant}'
            distances = [
                mean_sd(values_of(lines, name, 'test', key), '.2f')
                for key in ('frechet', 'frechet_of_few', 'floor')
            ]
            same = [line for line in lines if line['cell'] == name]
            params = f'{same[0]["params"]:,}' if same else ''
            minutes = f'{max(x["seconds"] for x in same) / 60:.0f}' if same else ''
            rows.append([name, params, *distances, minutes])
        claims.append([dataset, verdict(found['plain'], found['attention'], '.2f')])
    header = ['cell', 'parameters', 'Fréchet distance', 'of few', 'floor', 'minutes']
    return f"""Of the averaged generator, in the features of this project's own CNN:

{table(header, rows)}
Attention brings the distance down, by plain less attention:

{table(['data', 'verdict'], claims)}"""


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """Curves, samples and maps of each dataset that has run."""
    figures = {}
    for dataset in DATASETS:
        found = [line for line in lines if line['cell'].startswith(f'{dataset}/')]
        if not found:
            continue
        figures[f'{dataset}_curves.png'] = draw_curves(found)
        shown = [line for line in found if 'pictures' in line]
        if shown:
            figures[f'{dataset}_samples.png'] = draw_samples(shown)
        for line in shown:
            if 'maps' in line['pictures']:
                figures[f'{dataset}_maps.png'] = draw_maps(line['pictures'])
    return figures


def draw_curves(lines: Sequence[Line]) -> Figure:
    """Distance and gamma over training, a line for each seed."""
    figure, (left, right) = make_figure((9, 3.2), (1, 2))
    for line in lines:
        variant = line['cell'].partition('/')[2]
        test, color = line['test'], f'C{list(VARIANTS).index(variant)}'
        label = variant if line['seed'] == SEEDS[0] else None
        plot(left, test['frechet_by_step'], color=color, label=label)
        for i, net in enumerate(NETS):
            values, label = test['gamma_by_step'][net], None
            if values and line['seed'] == SEEDS[0]:
                label = net
            plot(right, values, color=f'C{i}', label=label)
    left.axhline(lines[0]['test']['floor'], color='0.5', ls='--', label='real images')
    left.set_yscale('log')
    left.set_ylabel('Fréchet distance')
    right.set_ylabel('gamma of attention')
    for axes in (left, right):
        axes.set_xlabel('steps')
        axes.spines[['top', 'right']].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    return figure


def plot(axes: Axes, by_step: dict[str, float], **style) -> None:
    axes.plot([int(step) for step in by_step], list(by_step.values()), **style)


def draw_samples(lines: Sequence[Line]) -> Figure:
    """Real images, and those of each cell."""
    panels = {'real': lines[0]['pictures']['real']}
    panels |= {line['cell']: line['pictures']['samples'] for line in lines}
    figure, all_axes = make_figure((3 * len(panels), 3.3), (1, len(panels)))
    for axes, (name, picture) in zip(all_axes, panels.items()):
        show(axes, decode(picture), name)
    return figure


def draw_maps(pictures: Line) -> Figure:
    """A generated image a row, and where each query point of both nets attends."""
    columns = 1 + len(NETS) * len(QUERIES)
    figure, all_axes = make_figure((1.6 * columns, 1.8 * MAPPED), (MAPPED, columns))
    images = np.split(decode(pictures['mapped']), MAPPED, axis=1)
    for i, (row, image) in enumerate(zip(all_axes, images)):
        show(row[0], image, 'image')
        panels = iter(row[1:])
        for net in NETS:
            for query, heat in zip(QUERIES, pictures['maps'][net][i]):
                axes = next(panels)
                show(axes, np.asarray(heat), f'{net}, max {np.max(heat):.2g}')
                place = query_place(query, np.shape(heat))
                axes.plot(*place[::-1], 'o', color='red', ms=4)
    return figure


def show(axes: Axes, image: np.ndarray, title: str) -> None:
    axes.imshow(image, interpolation='nearest')
    axes.set_title(title, size=8)
    axes.set_axis_off()


def make_figure(size: tuple[float, float], shape: tuple[int, int]):
    figure = Figure(figsize=size, dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    return figure, figure.subplots(*shape)


EXPERIMENT = Experiment(sweep, render, draw, measure)
