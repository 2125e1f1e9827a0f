"""The road from convolution to attention on digits: ten models, one recipe.

    python experiments/digits_road/sweep.py --workdir=/tmp/road

Runs every cell that `results.jsonl` does not hold yet, then writes `table.md`.
"""

import pathlib
import sys
from collections.abc import Iterator

from vit_jax.sweep import Cell, main, percent

HERE = pathlib.Path(__file__).parent
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
            yield Cell(f'configs/digits_road.py:{step}', {}, seed)


def render(lines: list[dict]) -> str:
    """The table: parameters; mean and standard deviation over seeds, in per cent."""
    params = {line['config']: line['params'] for line in lines}
    rows = ['| step | model | parameters | accuracy |', '| --- | --- | --- | --- |']
    for step, what in STEPS.items():
        config = f'configs/digits_road.py:{step}'
        size = f'{params[config]:,}' if config in params else 'not run'
        rows.append(f'| `{step}` | {what} | {size} | {percent(lines, config)} |')
    return '\n'.join(rows) + '\n'


if __name__ == '__main__':
    sys.exit(main(__doc__, HERE, sweep(), render))
