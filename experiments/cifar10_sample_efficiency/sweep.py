"""CNN, ViT and ConViT of equal size on a tenth of CIFAR-10: when a gap opens.

    python experiments/cifar10_sample_efficiency/sweep.py \\
        --workdir=/tmp/cifar10_sweep --data_dir=/data/tfds

Runs every cell that `results.jsonl` does not hold yet, then writes `table.md`.
"""

import pathlib
import statistics
import sys
from collections.abc import Iterator

from vit_jax.sweep import Cell, main

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
    for step in lines[0]['accuracies']:
        cells = []
        for model in MODELS:
            config = f'configs/cifar10_{model}.py:small'
            found = [
                100 * line['accuracies'][step]
                for line in lines
                if line['config'] == config
            ]
            spread = statistics.stdev(found) if len(found) > 1 else float('nan')
            cells.append(f'{statistics.mean(found):.1f} ± {spread:.1f}')
        rows.append(f'| {int(step):,} | {" | ".join(cells)} |')
    return '\n'.join(rows) + '\n'


if __name__ == '__main__':
    sys.exit(main(__doc__, HERE, sweep(), render))
