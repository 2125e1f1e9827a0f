"""The road from convolution to attention on digits: ten models, one recipe.

vit_jax reproduce digits_road --workdir=/tmp/runs
"""

from collections.abc import Iterator, Sequence

from vit_jax.experiment import Cell, Experiment, Line
from vit_jax.results import NOT_RUN, mean_sd, table, values_of

STEPS = {
    'cnn': 'convolution',
    'sagan': "SAGAN's attention inside the CNN",
    'resnet': 'ResNet, convolution in all three stages',
    'resnet_late': 'ResNet, global attention in the last stage',
    'resnet_local': 'ResNet, local attention in every stage',
    'no_positions': 'Transformer, no positions',
    'integer': 'Transformer, positions as integers',
    'sincos': 'Transformer, sines and cosines',
    'learned': 'Transformer, learned positions: ViT',
    'convit': 'gated positional self-attention: ConViT',
}
SEEDS = (0, 1, 2)


def sweep() -> Iterator[Cell]:
    """Every cell."""
    for seed in SEEDS:
        for step in STEPS:
            yield Cell(step, f'configs/digits_road.py:{step}', {}, seed)


def render(lines: Sequence[Line]) -> str:
    """Parameters; mean and standard deviation over seeds, in per cent."""
    params = {line['cell']: f'{line["params"]:,}' for line in lines}
    rows = [
        [f'`{step}`', what, params.get(step, NOT_RUN), mean_sd(values_of(lines, step))]
        for step, what in STEPS.items()
    ]
    return table(['step', 'model', 'parameters', 'accuracy'], rows)


EXPERIMENT = Experiment(sweep, render)
