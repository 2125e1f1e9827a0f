"""CNN, ViT and ConViT of equal size on a tenth of CIFAR-10: when a gap opens.

    python experiments/cifar10_sample_efficiency/sweep.py \\
        --workdir=/tmp/cifar10_sweep --data_dir=/data/tfds

Runs every cell that `results.jsonl` does not hold yet, then writes `table.md`.
"""

import pathlib
import sys
from collections.abc import Iterator

from vit_jax.sweep import Cell, main, percent

HERE = pathlib.Path(__file__).parent
MODELS = {'cnn': 'CNN', 'vit': 'ViT', 'convit': 'ConViT'}
OVERRIDES = {
    'dataset.train_fraction': 0.1,
    'num_steps': 2000,
    'eval.every_steps': 250,
    'checkpoint.every_steps': 500,
}
SEEDS = (0, 1, 2)


def sweep() -> Iterator[Cell]:
    """Every cell."""
    for seed in SEEDS:
        for model in MODELS:
            yield Cell(f'configs/cifar10_{model}.py:small', OVERRIDES, seed)


def render(lines: list[dict]) -> str:
    """The table: accuracy on the way, mean and standard deviation over seeds."""
    rows = [f'| steps | {" | ".join(MODELS.values())} |', '| --- ' * 4 + '|']
    overrides = {key.replace('.', '__'): value for key, value in OVERRIDES.items()}
    for step in lines[0]['accuracies'] if lines else ():
        here = [{**line, 'accuracy': line['accuracies'][step]} for line in lines]
        cells = [
            percent(here, f'configs/cifar10_{model}.py:small', **overrides)
            for model in MODELS
        ]
        rows.append(f'| {int(step):,} | {" | ".join(cells)} |')
    return '\n'.join(rows) + '\n'


if __name__ == '__main__':
    sys.exit(main(__doc__, HERE, sweep(), render))
