"""ConViT's table 1: parameters, multiply-adds, speed and accuracy beside DeiT.

vit_jax reproduce convit_table1 --workdir=/tmp/runs --data_dir=/data/tfds
"""

import contextlib
import io
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vit_jax.benchmark import compare
from vit_jax.commands import evaluate
from vit_jax.data.datasets import load_dataset
from vit_jax.experiment import Cell, Expected, Experiment, Line
from vit_jax.layers.attention import target_platform
from vit_jax.models import build_model
from vit_jax.models.convit import ConViT
from vit_jax.pretrained.zoo import ZOO
from vit_jax.results import NOT_RUN, published_table, status, table, values_of
from vit_jax.summary import count

SOURCE = 'arXiv 2103.10697, table 1'
SIDE, PATCH, CLASSES = 224, 16, 1000


class Row(NamedTuple):
    """What the paper says of a model.

    Attributes:
      heads, width: of its tokens.
      params: in millions.
      macs: in thousands of millions; the paper calls them FLOPs.
      speed: images per second on a Quadro GP100, at batches of 128.
      top1: accuracy on ImageNet, in per cent.
      exact: parameters of the public PyTorch model, counted; None where not counted.
    """

    heads: int
    width: int
    params: float
    macs: float
    speed: float
    top1: float
    exact: int | None = None


ROWS = {
    'DeiT-Ti': Row(3, 192, 6, 1, 1442, 72.2, 5_717_416),
    'ConViT-Ti': Row(4, 192, 6, 1, 734, 73.1, 5_710_512),
    'DeiT-Ti+': Row(4, 256, 10, 2, 1036, 75.9),
    'ConViT-Ti+': Row(4, 256, 10, 2, 625, 76.7, 9_972_912),
    'DeiT-S': Row(6, 384, 22, 4.3, 587, 79.8, 22_050_664),
    'ConViT-S': Row(9, 432, 27, 5.4, 305, 81.3, 27_777_322),
    'DeiT-S+': Row(9, 576, 48, 10, 480, 79.0),
    'ConViT-S+': Row(9, 576, 48, 10, 382, 82.2, 48_979_882),
    'DeiT-B': Row(12, 768, 86, 17, 187, 81.8, 86_567_656),
    'ConViT-B': Row(16, 768, 86, 17, 141, 82.4, 86_540_040),
    'DeiT-B+': Row(16, 1024, 152, 30, 114, 77.5),
    'ConViT-B+': Row(16, 1024, 152, 30, 96, 82.5, 153_134_856),
}
CONVITS = tuple(name for name in ROWS if name.startswith('ConViT'))
# (batch, rounds): the paper's batch; a CPU's cores are busy with few images too.
BATCH, CPU_BATCH = (128, 20), (4, 9)


def published_weights(name: str) -> str | None:
    """The address of a model's weights for images of 224, or None: the + models."""
    for weights in ZOO:
        if (weights.model, weights.image_size) == (f'{name}/{PATCH}', SIDE):
            return next(x for x in weights.addresses if x.startswith('hf:'))
    return None


def sweep() -> Iterator[Cell]:
    """Every cell."""
    for name, row in ROWS.items():
        expected = Expected(row.params, SOURCE, rounding(row.params))
        yield _make_cell('params', name, expected)
    for name, row in ROWS.items():
        expected = Expected(row.macs, SOURCE, rounding(row.macs))
        yield _make_cell('macs', name, expected)
    for name in CONVITS:
        yield _make_cell('speed', name)  # of other hardware: nothing to reproduce
    for name, row in ROWS.items():
        if published_weights(name):
            yield _make_cell('top1', name, Expected(row.top1, SOURCE))


def _make_cell(kind: str, name: str, expected: Expected | None = None) -> Cell:
    overrides = {'measured': kind, 'model': name}
    return Cell(f'{kind}/{name}', None, overrides, expected=expected)


def rounding(value: float) -> float:
    """Half a unit of the last digit that is told: of 27 a half, of 5.4 a twentieth."""
    return 0.5 if value == round(value) else 0.05


# --- Parameters and multiply-adds ---------------------------------------------------


def make(name: str, **fields: int) -> nn.Module:
    """The model of a row, for 1,000 classes; `fields` are others than the paper's."""
    row = ROWS[name]
    if name.startswith('ConViT'):
        return build_model(f'{name}/{PATCH}', CLASSES)
    width = {'width': row.width, 'num_heads': row.heads, **fields}
    return build_model(f'DeiT-B/{PATCH}', CLASSES, mlp_dim=4 * width['width'], **width)


def measure_params(name: str, data_dir: str | None) -> Line:
    """Parameters in millions, whole and without the classifier; and to the last."""
    del data_dir
    params, _ = count(make(name), (SIDE, SIDE, 3))
    classifier = CLASSES * (ROWS[name].width + 1)
    return {
        'value': params / 1e6,
        'headless': (params - classifier) / 1e6,
        'params': params,
    }


def measure_macs(name: str, data_dir: str | None) -> Line:
    """Thousands of millions of multiply-adds, all and those of the linear maps."""
    del data_dir
    model = make(name)
    _, macs = count(model, (SIDE, SIDE, 3))
    return {'value': macs / 1e9, 'linear': (macs - attention_macs(model)) / 1e9}


def attention_macs(model: nn.Module) -> int:
    """Those of pairs of tokens: q k^T and A v, and P v of GPSA by its two factors."""
    rows = SIDE // PATCH
    total = 0
    for i in range(model.depth):
        local = isinstance(model, ConViT) and i < model.num_local_layers
        tokens = rows**2 if local else rows**2 + 1  # the class token joins late
        total += 2 * tokens**2 * model.width
        if local:
            total += tokens * 2 * rows * model.width
    return total


# --- Speed --------------------------------------------------------------------------


def timed(name: str) -> dict[str, nn.Module]:
    """A ConViT, the paper's DeiT of that name, and a ViT of equal width if need be."""
    row, deit = ROWS[name], name.replace('ConViT', 'DeiT')
    models = {name: make(name), deit: make(deit)}
    if ROWS[deit].width != row.width:
        equal = make(deit, width=row.width, num_heads=row.heads)
        models[f'ViT of width {row.width}'] = equal
    return models


def measure_speed(name: str, data_dir: str | None) -> Line:
    """Images per second of each model of `timed`.

    Forward passes in float32, in turns, with random parameters.
    """
    del data_dir
    batch, rounds = CPU_BATCH if target_platform() == 'cpu' else BATCH
    models = timed(name)
    images = jax.random.normal(jax.random.key(0), (batch, SIDE, SIDE, 3))
    variables = {
        key: jax.jit(partial(model.init, train=False))(jax.random.key(1), images[:1])
        for key, model in models.items()
    }

    def forward(key: str) -> Callable:
        return lambda variables, images: models[key].apply(variables[key], images)

    measured = compare(
        {key: forward(key) for key in models}, (variables, images), rounds
    )
    speeds = {key: batch / taken.seconds for key, taken in measured.items()}
    return {'images_per_second': speeds, 'batch': batch, 'rounds': rounds}


# --- Accuracy of the published weights ----------------------------------------------


def measure_top1(name: str, data_dir: str | None) -> Line:
    """What `vit_jax evaluate` says of them on the validation set of ImageNet.

    Raises:
      UserError: where ImageNet is not prepared, before anything is fetched.
    """
    load_dataset('imagenet2012', data_dir).open('validation')
    argv = [
        '--config=configs/imagenet_convit.py',
        f'--config.model.name={name}/{PATCH}',
        '--config.dtype=float32',
        f'--weights={published_weights(name)}',
    ]
    if data_dir:
        argv.append(f'--config.dataset.data_dir={data_dir}')
    with contextlib.redirect_stdout(io.StringIO()) as out:
        evaluate.main(argv)
    return {**json.loads(out.getvalue()), 'weights': published_weights(name)}


MEASURES: dict[str, Callable[[str, str | None], Line]] = {
    'params': measure_params,
    'macs': measure_macs,
    'speed': measure_speed,
    'top1': measure_top1,
}


def measure(cell: Cell, workdir: pathlib.Path, data_dir: str | None) -> Line:
    """What the first part of the cell's name says."""
    del workdir
    return MEASURES[cell.overrides['measured']](cell.overrides['model'], data_dir)


def flops(cell: Cell) -> int:
    """Operations of the forward passes; what is counted of modules takes none."""
    kind, name = cell.overrides['measured'], cell.overrides['model']
    batch, rounds = BATCH
    if kind == 'top1':
        models, images = [make(name)], 50_000
    elif kind == 'speed':
        models, images = [*timed(name).values()], (1 + rounds) * batch
    else:
        return 0
    return sum(2 * images * count(model, (SIDE, SIDE, 3))[1] for model in models)


# --- What is told -------------------------------------------------------------------


def render(lines: Sequence[Line]) -> str:
    """The paper's table, its numbers beside ours."""
    top1 = [cell for cell in sweep() if cell.overrides['measured'] == 'top1']
    others = [
        [name, f'{row.top1:g} ({SOURCE})', 'not run: no published weights']
        for name, row in ROWS.items()
        if not published_weights(name)
    ]
    return f"""Parameters, in millions:

{_params(lines)}
Multiply-adds of an image of {SIDE}x{SIDE}, in thousands of millions:

{_macs(lines)}
Images per second, forward, and the ratio to DeiT of the same name:

{_speeds(lines)}
Top-1 accuracy of the published weights on ImageNet, in per cent:

{published_table(top1, lines)}
{table(['model', 'published', 'measured'], others)}"""


def _params(lines: Sequence[Line]) -> str:
    rows = []
    for name, row in ROWS.items():
        expected = Expected(row.params, SOURCE, rounding(row.params))
        cells = [name, f'{row.params:g}']
        for key in ('value', 'headless'):
            cells.append(_compare(values_of(lines, f'params/{name}', key), expected))
        exact, found = row.exact, values_of(lines, f'params/{name}', 'params')
        cells.append(f'{found[0]:,}' if found else NOT_RUN)
        if exact is None:
            cells += ['not counted', '']
        else:
            same = status(found, Expected(exact, 'the public model', 0.0))
            cells += [f'{exact:,}', same]
        rows.append(cells)
    header = ['model', 'paper', 'all', 'without the classifier', 'counted here']
    return table([*header, 'public PyTorch model', 'status'], rows)


def _macs(lines: Sequence[Line]) -> str:
    rows = []
    for name, row in ROWS.items():
        expected = Expected(row.macs, SOURCE, rounding(row.macs))
        cells = [name, f'{row.macs:g}']
        for key in ('value', 'linear'):
            cells.append(_compare(values_of(lines, f'macs/{name}', key), expected))
        rows.append(cells)
    return table(['model', 'paper', 'all', 'without those of pairs of tokens'], rows)


def _compare(values: Sequence[float], expected: Expected) -> str:
    said = status(values, expected)
    return f'{values[0]:.2f}: {said}' if values else said


def _speeds(lines: Sequence[Line]) -> str:
    rows = []
    for name in CONVITS:
        deit = name.replace('ConViT', 'DeiT')
        published = f'{ROWS[name].speed / ROWS[deit].speed:.2f}'
        found = values_of(lines, f'speed/{name}', 'images_per_second')
        if not found:
            rows.append([name, *[NOT_RUN] * 5, published])
            continue
        (speeds,) = found
        (batch,) = values_of(lines, f'speed/{name}', 'batch')
        ours = speeds[name]
        equal = [key for key in speeds if key.startswith('ViT')] or [deit]
        rows.append(
            [
                name,
                f'{batch}',
                f'{ours:.1f}',
                f'{speeds[deit]:.1f}',
                f'{ours / speeds[deit]:.2f}',
                f'{ours / speeds[equal[0]]:.2f}',
                published,
            ]
        )
    header = ['model', 'batch', 'images/s', 'DeiT', 'ratio', 'to a ViT of equal width']
    return table([*header, 'published ratio'], rows)


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """Measured by published parameters and multiply-adds; the speed beside DeiT's."""
    figure = Figure(figsize=(9, 3.2), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    sizes, speeds = figure.subplots(1, 2, width_ratios=[3, 2])
    for kind, key, label, style in (
        ('params', 'value', 'parameters', 'oC0'),
        ('params', 'headless', 'without the classifier', '+C0'),
        ('macs', 'value', 'multiply-adds', 'sC1'),
        ('macs', 'linear', 'without pairs of tokens', 'xC1'),
    ):
        ratios = {
            name: values[0] / getattr(row, kind)
            for name, row in ROWS.items()
            if (values := values_of(lines, f'{kind}/{name}', key))
        }
        places = [[*ROWS].index(name) for name in ratios]
        look = {'ms': 5, 'mfc': 'none', 'label': label}
        sizes.plot(places, list(ratios.values()), style, **look)
    sizes.set_xticks(range(len(ROWS)), ROWS, size=7, rotation=30, ha='right')
    sizes.set_ylabel('counted / published')
    for place, name in enumerate(CONVITS):
        deit = name.replace('ConViT', 'DeiT')
        here = [
            measured[name] / measured[deit]
            for measured in values_of(lines, f'speed/{name}', 'images_per_second')
        ]
        published = ROWS[name].speed / ROWS[deit].speed
        for values, style, label in (
            (here, 'oC0', 'here'),
            ([published], 'DC1', 'published'),
        ):
            first = label if place == 0 else None
            look = {'ms': 5, 'mfc': 'none', 'label': first}
            speeds.plot([place] * len(values), values, style, **look)
    speeds.set_xticks(range(len(CONVITS)), CONVITS, size=7, rotation=30, ha='right')
    speeds.set_ylabel("images per second / DeiT's")
    speeds.set_ylim(bottom=0)
    for axes in (sizes, speeds):
        axes.axhline(1, color='0.8', lw=1, zorder=0)
        axes.legend(fontsize=7, frameon=False)
        axes.spines[['top', 'right']].set_visible(False)
    return {'zoo.png': figure}


EXPERIMENT = Experiment(sweep, render, draw, measure, flops)
