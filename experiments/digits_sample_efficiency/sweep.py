"""CNN, ViT and ConViT of equal size on all and on a tenth of the training digits.

vit_jax reproduce digits_sample_efficiency --workdir=/tmp/runs
"""

from collections.abc import Iterator, Sequence

from vit_jax.experiment import Cell, Experiment, Line
from vit_jax.results import mean_sd, table, values_of

MODELS = {'cnn': 'CNN', 'vit': 'ViT', 'convit': 'ConViT'}
FRACTIONS = (1.0, 0.1)
SEEDS = (0, 1, 2)


def sweep() -> Iterator[Cell]:
    """Every cell."""
    for seed in SEEDS:
        for fraction in FRACTIONS:
            for model, name in MODELS.items():
                overrides = {'dataset.train_fraction': fraction}
                config = f'configs/digits_{model}.py'
                yield Cell(f'{name}/{fraction:.0%}', config, overrides, seed)


def render(lines: Sequence[Line]) -> str:
    """Mean and standard deviation over seeds, in per cent."""
    rows = []
    for fraction in map('{:.0%}'.format, FRACTIONS):
        cells = [values_of(lines, f'{name}/{fraction}') for name in MODELS.values()]
        rows.append([fraction, *map(mean_sd, cells)])
    return table(['training digits', *MODELS.values()], rows)


EXPERIMENT = Experiment(sweep, render)
