"""Which stages of a ResNet are attention: SASA's eight splits, and other blocks.

vit_jax reproduce attention_in_resnets/digits --workdir=/tmp/runs --jobs=2
"""

import pathlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.config import load_config
from vit_jax.experiment import Cell, Expected, Experiment, Line, build_cell, train_cell
from vit_jax.models import build_model
from vit_jax.results import (
    NOT_RUN,
    difference,
    mean_sd,
    published_table,
    table,
    values_of,
    verdict,
)
from vit_jax.summary import count
from vit_jax.writer import read_evaluations

PAPER = 'arXiv 1906.05909'
SEEDS = (0, 1, 2)
# Stages whose 3x3 convolutions are attention, and the paper's accuracy: of images held
# out of ImageNet's training split.
SPLITS = {
    'none': ((), 79.5),
    '1': ((1,), 79.7),
    '1-2': ((1, 2), 79.6),
    '1-3': ((1, 2, 3), 79.9),
    '1-4': ((1, 2, 3, 4), 80.2),
    '2-4': ((2, 3, 4), 80.7),
    '3-4': ((3, 4), 80.7),
    '4': ((4,), 80.2),
}
LATE = '3-4'  # convolution early, attention late: one of the paper's two best
RIVALS = {'none': 'no attention', '1-2': 'attention early', '1-4': 'attention alone'}
BLOCKS = ('local', 'global', 'augmented', 'sagan')
# Blocks that look at all pairs of positions are tried where the map is small.
LATE_SPLITS = (LATE, '4')
DATASETS = {'digits': 'digits', 'cifar10': 'CIFAR-10'}


class Published(NamedTuple):
    """What the paper's table 1 says of a variant of `configs/imagenet_resnet.py`.

    Attributes:
      params: in millions.
      flops: in thousands of millions; two for each multiply-add.
      top1: accuracy on ImageNet, in per cent.
    """

    params: float
    flops: float
    top1: float


PUBLISHED = {
    'resnet50': Published(25.6, 8.2, 76.9),
    'sasa_conv_stem': Published(18.0, 7.0, 77.4),
    'sasa': Published(18.0, 7.2, 77.6),
}


def sweep() -> Iterator[Cell]:
    """Every cell, the small ones first."""
    for seed in SEEDS:
        for split in SPLITS:
            yield _digits(split, seed)
    for variant, row in PUBLISHED.items():
        for measured in ('params', 'flops'):
            expected = Expected(getattr(row, measured), f'{PAPER}, table 1', 0.05)
            overrides = {'measured': measured, 'variant': variant}
            yield Cell(f'{measured}/{variant}', None, overrides, expected=expected)
    for seed in SEEDS:
        for split in SPLITS:
            yield _cifar10(split, 'local', seed)
        for block in BLOCKS[1:]:
            for split in LATE_SPLITS:
                yield _cifar10(split, block, seed)
    for split in SPLITS:
        yield _imagenet(split)
    for variant, row in PUBLISHED.items():
        expected = Expected(row.top1, f'{PAPER}, table 1')
        config = f'configs/imagenet_resnet.py:{variant}'
        yield Cell(f'top1/{variant}', config, {}, expected=expected)


def name_cell(dataset: str, split: str, block: str = 'local') -> str:
    """'digits/local/3-4'; 'digits/none', whatever the block."""
    return f'{dataset}/none' if split == 'none' else f'{dataset}/{block}/{split}'


def attend(split: str, block: str) -> dict[str, Any]:
    """The stages of a split become attention, as overrides."""
    stages, _ = SPLITS[split]
    if not stages:
        return {}
    return {
        'model.kwargs.attention': block,
        'model.kwargs.attention_stages': stages,
    }


def _digits(split: str, seed: int) -> Cell:
    """One block a stage, on maps of 16x16 to 2x2, of the road's ResNets."""
    overrides = {
        'dataset.image_size': (16, 16),
        'dataset.train_fraction': 0.3,  # with all, a ResNet has hardly an error left
        'augment.pad': 2,  # a pixel of the digits as they are
        'batch_size': 32,
        'num_steps': 600,
        'model.kwargs.stage_sizes': (1, 1, 1, 1),
        'model.kwargs.bottleneck': True,
        'model.kwargs.width': 8,
        **attend(split, 'local'),
    }
    step = 'resnet' if split == 'none' else 'resnet_local'
    config = f'configs/digits_road.py:{step}'
    return Cell(name_cell('digits', split), config, overrides, seed)


def _cifar10(split: str, block: str, seed: int) -> Cell:
    overrides = {
        'model.name': 'ResNet-50',
        'model.kwargs.stage_sizes': (2, 2, 2, 2),
        'model.kwargs.width': 48,
        **attend(split, block),
    }
    config = 'configs/cifar10_resnet.py'
    return Cell(name_cell('cifar10', split, block), config, overrides, seed)


def _imagenet(split: str) -> Cell:
    """The paper's, which held 4% of the training images out for this."""
    overrides = {
        'dataset.train_split': 'train[:96%]',
        'dataset.eval_split': 'train[96%:]',
        'num_epochs': None,
        'num_steps': round(130 * 0.96 * 1_281_167 / 4096),  # 130 epochs of the rest
        **attend(split, 'local'),
    }
    config = 'configs/imagenet_resnet.py:resnet50'
    expected = Expected(SPLITS[split][1], f'{PAPER}, groups that attend')
    return Cell(name_cell('imagenet', split), config, overrides, expected=expected)


def measure(cell: Cell, workdir: pathlib.Path, data_dir: str | None) -> Line:
    """Trains, and counts the multiply-adds of an image; or counts alone.

    Where the parameters are averaged, their average is what is compared.
    """
    if cell.config is None:
        return count_published(**cell.overrides)
    run = build_cell(cell, data_dir=data_dir)
    _, macs = count(run.model, run.inputs)
    line = {**train_cell(cell, workdir, data_dir), 'macs': macs}
    *_, last = read_evaluations(workdir).values()
    if 'ema_accuracy' in last:
        line['value'] = 100 * last['ema_accuracy']
    return line


def count_published(measured: str, variant: str) -> Line:
    """Parameters in millions, or thousands of millions of FLOPs, of a 224x224 image."""
    model = load_config(f'configs/imagenet_resnet.py:{variant}').model
    module = build_model(model.name, 1000, **model.kwargs.to_dict())
    params, macs = count(module, (224, 224, 3))
    return {'value': params / 1e6 if measured == 'params' else 2 * macs / 1e9}


# --- What is told -------------------------------------------------------------------


def render(lines: Sequence[Line]) -> str:
    """Accuracy of each split, the claim, other blocks, the published tables."""
    parts = []
    for dataset in DATASETS:
        parts += [_splits(lines, dataset), _claims(lines, dataset)]
    parts += [_blocks(lines), published_table(sweep(), lines)]
    return '\n'.join(parts)


def _splits(lines: Sequence[Line], dataset: str) -> str:
    late = values_of(lines, name_cell(dataset, LATE))
    rows = []
    for split in SPLITS:
        name = name_cell(dataset, split)
        above = '' if split == LATE else verdict(late, values_of(lines, name))
        rows.append([split, *_describe(lines, name), above])
    header = [f'stages that attend, {DATASETS[dataset]}', 'parameters', 'multiply-adds']
    return table([*header, 'accuracy', f'{LATE} above it?'], rows)


def _describe(lines: Sequence[Line], name: str) -> list[str]:
    """Parameters, multiply-adds, and accuracy."""
    first = next((line for line in lines if line['cell'] == name), None)
    cost = [NOT_RUN] * 2
    if first:
        cost = [f'{first["params"]:,}', f'{first["macs"] / 1e6:.2f}M']
    return [*cost, mean_sd(values_of(lines, name))]


def _claims(lines: Sequence[Line], dataset: str) -> str:
    late = values_of(lines, name_cell(dataset, LATE))
    rows = [
        [
            f'attention in stages {LATE} above {what} ({split})',
            verdict(late, values_of(lines, name_cell(dataset, split))),
        ]
        for split, what in RIVALS.items()
    ]
    claim = '**convolution early and attention late is best**: above all three'
    rows.append([claim, f'**{answer(lines, dataset)}**'])
    return table([f'claim, {DATASETS[dataset]}', 'verdict'], rows)


def answer(lines: Sequence[Line], dataset: str) -> str:
    """Whether attention late is best: 'supports' where it is above all its rivals.

    One that is above it contradicts; a cell that has not run leaves it 'not run'.
    """
    late = values_of(lines, name_cell(dataset, LATE))
    verdicts = set()
    for split in RIVALS:
        other = values_of(lines, name_cell(dataset, split))
        if not (late and other):
            return NOT_RUN
        found = difference(late, other)
        verdicts.add(found.verdict if found else 'inconclusive')
    if 'contradicts' in verdicts:
        return 'contradicts'
    return 'supports' if verdicts == {'supports'} else 'inconclusive'


def _blocks(lines: Sequence[Line]) -> str:
    none = values_of(lines, name_cell('cifar10', 'none'))
    rows = []
    for block in BLOCKS:
        for split in LATE_SPLITS:
            name = name_cell('cifar10', split, block)
            above = verdict(values_of(lines, name), none)
            rows.append([block, split, *_describe(lines, name), above])
    header = ['block, CIFAR-10', 'stages', 'parameters', 'multiply-adds', 'accuracy']
    return table([*header, 'above no attention?'], rows)


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """Which stages attend, and beside it the accuracy: here, and in the paper."""
    found = {
        f'{title}, here': [values_of(lines, name_cell(key, s)) for s in SPLITS]
        for key, title in DATASETS.items()
    }
    panels = {title: rows for title, rows in found.items() if any(rows)}
    panels['ImageNet, published'] = [[top1] for _, top1 in SPLITS.values()]
    figure = Figure(figsize=(2 + 2.6 * len(panels), 3), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    ratios = [1, *[2] * len(panels)]
    stages, *others = figure.subplots(1, len(ratios), sharey=True, width_ratios=ratios)
    _draw_stages(stages)
    for axes, (title, rows) in zip(others, panels.items()):
        for row, values in enumerate(rows):
            axes.plot(values, [row] * len(values), 'o', ms=3, color='0.65')
        means = {
            row: statistics.mean(values) for row, values in enumerate(rows) if values
        }
        axes.plot(list(means.values()), list(means), 'D', ms=5, color='k')
        axes.set_title(title, fontsize=9)
        axes.set_xlabel('accuracy, %')
        axes.grid(axis='x', color='0.9')
        axes.spines[['top', 'right', 'left']].set_visible(False)
        axes.tick_params(axis='y', length=0)
    return {'stages.png': figure}


def _draw_stages(axes: Axes) -> None:
    """A row of four squares for each split."""
    for attends, color, label in (
        (False, '0.85', 'convolution'),
        (True, 'C1', 'attention'),
    ):
        squares = [
            (stage, row)
            for row, (stages, _) in enumerate(SPLITS.values())
            for stage in (1, 2, 3, 4)
            if (stage in stages) == attends
        ]
        axes.plot(*zip(*squares), 's', ms=9, color=color, label=label)
    axes.set_xticks([1, 2, 3, 4])
    axes.set_yticks(range(len(SPLITS)), list(SPLITS))
    axes.set_xlim(0.5, 4.5)
    axes.set_ylim(len(SPLITS) - 0.5, -0.5)
    axes.set_xlabel('stage')
    axes.set_ylabel('stages that attend')
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.legend(fontsize=7, frameon=False, loc='lower left', bbox_to_anchor=(-0.1, 1.0))


EXPERIMENT = Experiment(sweep, render, draw, measure)
