"""How much of GPSA stays convolution: gates over training, by layer and head.

vit_jax reproduce convit_gating/digits --workdir=/tmp/runs
"""

import pathlib
import statistics
from collections.abc import Iterator, Sequence

import jax
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

NAMES = ('digits', 'ConViT-S')
SEEDS = (0, 1, 2)
KEEP = {'checkpoint.every_steps': 100, 'checkpoint.keep': 1000}


def sweep() -> Iterator[Cell]:
    """Every cell, the small ones first."""
    for seed in SEEDS:
        yield Cell('digits', 'configs/digits_convit.py', KEEP, seed)
    keep = {'checkpoint.every_steps': 25_000, 'checkpoint.keep': 1000}
    yield Cell('ConViT-S', 'configs/imagenet_convit.py', keep)


def measure(cell: Cell, workdir: pathlib.Path, data_dir: str | None) -> Line:
    """Trains, and reads the gates of every checkpoint from a forward pass."""
    line = train_cell(cell, workdir, data_dir)
    run = build_cell(cell, data_dir=data_dir)
    images = first_images(run, 1)
    gates_of = jax.jit(lambda variables: attention_maps(run.model, variables, images))
    gates = {}
    for step, variables in each_checkpoint(run, workdir):
        layers = gates_of(variables).layers
        found = [layer.gates for layer in layers if layer.gates is not None]
        gates[str(step)] = [layer.tolist() for layer in jax.device_get(found)]
    return {**line, 'gates': gates}


def render(lines: Sequence[Line]) -> str:
    """The mean gate of each layer, over heads and seeds, on the way; and the claim."""
    parts = []
    for name in NAMES:
        found = values_of(lines, name, 'gates')
        if not found:
            parts.append(table([name, 'gates'], [['all layers', NOT_RUN]]))
            continue
        # A run that was stopped has a checkpoint more, where it was.
        common = [step for step in found[0] if all(step in seed for seed in found)]
        steps = _some(common)
        rows = []
        for layer in range(len(found[0]['0'])):
            means = [
                statistics.mean(gate for seed in found for gate in seed[step][layer])
                for step in steps
            ]
            rows.append([f'block{layer:02d}', *(f'{mean:.3f}' for mean in means)])
        header = [f'{name}, updates', *(f'{int(step):,}' for step in steps)]
        parts.append(table(header, rows))
        before, after = (
            [_means(seed[step]) for seed in found] for step in (steps[0], steps[-1])
        )
        claims = {
            'the first layer keeps more than the last': [x[0] - x[-1] for x in after],
            'the last layer lets go': [x[-1] - y[-1] for x, y in zip(before, after)],
        }
        rows = [[claim, verdict_of_pairs(x, '.3f')] for claim, x in claims.items()]
        parts.append(table([f'{name}, gates at the end', 'over seeds'], rows))
    return '\n'.join(parts)


def _means(gates: list[list[float]]) -> list[float]:
    """Of each layer, over heads."""
    return [statistics.mean(layer) for layer in gates]


def _some(steps: list[str]) -> list[str]:
    """At most seven of them, evenly, first and last included."""
    last = len(steps) - 1
    return [steps[i] for i in sorted({round(last * k / 6) for k in range(7)})]


def draw(lines: Sequence[Line]) -> dict[str, Figure]:
    """A panel for each layer, a line for each head of each seed."""
    pictures = {}
    for name in NAMES:
        if found := values_of(lines, name, 'gates'):
            runs = [{int(step): x for step, x in gates.items()} for gates in found]
            pictures[f'{name}.png'] = draw_heads(runs, 'gate: share of position')
    return pictures


EXPERIMENT = Experiment(sweep, render, draw, measure)
