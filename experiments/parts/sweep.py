"""Parts in their places or in each other's: who can tell.

vit_jax reproduce parts --workdir=/tmp/runs --jobs=2
"""

import pathlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.data.datasets import load_dataset
from vit_jax.data.transforms import decode_image
from vit_jax.experiment import Cell, Experiment, Line, train_cell
from vit_jax.results import NOT_RUN, mean_sd, table, values_of, verdict

from .data import CANVAS, PART

SEEDS = (0, 1, 2)
DEPTHS = (1, 2, 3, 4, 5, 7)  # convolutions 3x3 of stride 1; each sees two pixels more
FOREST = 'forest'  # of half a digit
VIT = {'width': 64, 'depth': 4, 'mlp_dim': 128, 'num_heads': 4}


def receptive_field(depth: int) -> int:
    """Pixels a side that a stack of 3x3 convolutions sees.

    >>> receptive_field(3)
    7
    """
    return 1 + 2 * depth


def models() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Of each cell: what it is, a step of the road, and the model's fields."""
    found: dict[str, tuple[str, str, dict[str, Any]]] = {}
    for depth in DEPTHS:
        side = receptive_field(depth)
        fields = {
            'widths': (32,) * depth,
            'strides': (1,) * depth,
            'padding': 'circular',  # with zeros the border tells a part's place
        }
        found[f'CNN-{side}'] = (f'CNN that sees {side}x{side} pixels', 'cnn', fields)
    found['ViT'] = ('ViT, learned positions', 'learned', VIT)
    found['ViT-none'] = ('ViT without positions', 'no_positions', VIT)
    return found


def sweep() -> Iterator[Cell]:
    """Every cell."""
    for seed in SEEDS:
        for name, (_, step, fields) in models().items():
            overrides: dict[str, Any] = {
                'dataset.name': 'experiments.parts.data:make_halves',
                'augment.crop': 'none',
                **{f'model.kwargs.{key}': value for key, value in fields.items()},
            }
            yield Cell(name, f'configs/digits_road.py:{step}', overrides, seed)
        yield Cell(FOREST, None, {'sees': 'upper parts'}, seed)


def measure(cell: Cell, workdir: pathlib.Path, data_dir: str | None) -> Line:
    """Trains a model, or the forest."""
    if cell.config:
        return train_cell(cell, workdir, data_dir)
    return {'accuracy': forest_accuracy(cell.seed, data_dir)}


def forest_accuracy(seed: int, data_dir: str | None) -> float:
    """How much the two parts give away that lie above, to who knows that they do.

    They are the upper half of a digit, where it is right, or its lower half.

    Args:
      seed: of the random forest.
      data_dir: where datasets lie.

    Returns:
      Its accuracy on the test split, as a share.
    """
    from sklearn.ensemble import RandomForestClassifier

    def halves(split: str) -> tuple[np.ndarray, np.ndarray]:
        source = load_dataset('digits', data_dir).open(split)
        found = map(source.__getitem__, range(len(source)))
        digits = np.stack([decode_image(x['image'], 1, x['name']) for x in found])
        above = np.concatenate([digits[:, :PART], digits[:, PART:]])
        return above.reshape(len(above), -1), np.repeat([0, 1], len(digits))

    forest = RandomForestClassifier(300, random_state=seed).fit(*halves('train'))
    return float(forest.score(*halves('test')))


def render(lines: Sequence[Line]) -> str:
    """Accuracy of each; chance is 50%."""
    rows = []
    for name, (what, *_) in models().items():
        params = [f'{line["params"]:,}' for line in lines if line['cell'] == name]
        cells = [*params[:1], NOT_RUN][:1]
        rows.append([what, *cells, mean_sd(values_of(lines, name))])
    told = 'random forest that is told what lies above, and sees that alone'
    rows.append([told, '', mean_sd(values_of(lines, FOREST))])
    _, second, *_, last = (f'CNN-{receptive_field(depth)}' for depth in DEPTHS)
    claims = [
        [
            f'{one} above {other}',
            verdict(values_of(lines, one), values_of(lines, other)),
        ]
        for one, other in (
            (last, second),  # the first is at chance by construction
            ('CNN-11', 'CNN-7'),  # 11x11 pixels hold the whole
            ('ViT', 'ViT-none'),
            (second, 'ViT'),
        )
    ]
    accuracies = table(['model', 'parameters', 'accuracy'], rows)
    return f'{accuracies}\n{table(["claim", "verdict"], claims)}'


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """Accuracy by receptive field, a point for a seed; ViT on the right."""
    figure = Figure(figsize=(4.5, 3), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    sides = {
        receptive_field(depth): f'CNN-{receptive_field(depth)}' for depth in DEPTHS
    }
    found = {side: values_of(lines, name) for side, name in sides.items()}
    means = {side: statistics.mean(values) for side, values in found.items() if values}
    axes.plot(list(means), list(means.values()), color='C0', lw=1, ls=':', label='CNN')
    for side, values in found.items():
        axes.plot([side] * len(values), values, 'o', ms=3, color='C0')
    for i, (name, label) in enumerate(
        (('ViT', 'ViT'), ('ViT-none', 'ViT without positions'))
    ):
        values = values_of(lines, name)  # on the right, for it sees the whole canvas
        axes.plot(
            [CANVAS + i] * len(values),
            values,
            's',
            ms=4,
            mfc='none',
            color=f'C{i + 1}',
            label=label,
        )
    axes.axhline(50, color='0.8', lw=1, label='chance')
    axes.set_xticks(list(sides))
    axes.set_xlabel('receptive field, pixels a side')
    axes.set_ylabel('test accuracy, %')
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return {'parts.png': figure}


EXPERIMENT = Experiment(sweep, render, draw, measure)
