"""CNN, ViT and ConViT of equal size on all and on a tenth of the training digits.

    python experiments/digits_sample_efficiency/sweep.py --workdir=/tmp/digits_sweep

Runs every cell that `results.jsonl` does not hold yet, then writes `table.md`.
"""

import pathlib
import sys
from collections.abc import Iterator

from vit_jax.sweep import Cell, main, percent

HERE = pathlib.Path(__file__).parent
MODELS = ('cnn', 'vit', 'convit')
FRACTIONS = (1.0, 0.1)
SEEDS = (0, 1, 2)


def sweep() -> Iterator[Cell]:
    """Every cell."""
    for seed in SEEDS:
        for fraction in FRACTIONS:
            for model in MODELS:
                overrides = {'dataset.train_fraction': fraction}
                yield Cell(f'configs/digits_{model}.py', overrides, seed)


def render(lines: list[dict]) -> str:
    """The table: mean and standard deviation over seeds, in per cent."""
    rows = ['| training digits | CNN | ViT | ConViT |', '| --- | --- | --- | --- |']
    for fraction in FRACTIONS:
        cells = [
            percent(
                lines, f'configs/digits_{model}.py', dataset__train_fraction=fraction
            )
            for model in MODELS
        ]
        rows.append(f'| {fraction:.0%} | {" | ".join(cells)} |')
    return '\n'.join(rows) + '\n'


if __name__ == '__main__':
    sys.exit(main(__doc__, HERE, sweep(), render))
