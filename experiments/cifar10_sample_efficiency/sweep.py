"""CNN, ViT and ConViT of equal size on a tenth of CIFAR-10: when a gap opens.

vit_jax reproduce cifar10_sample_efficiency --workdir=/tmp/runs --data_dir=/data/tfds
"""

from collections.abc import Iterator, Sequence

from vit_jax.experiment import Cell, Experiment, Line
from vit_jax.results import mean_sd, table, values_of

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
        for model, name in MODELS.items():
            yield Cell(name, f'configs/cifar10_{model}.py:small', OVERRIDES, seed)


def render(lines: Sequence[Line]) -> str:
    """Accuracy on the way, mean and standard deviation over seeds, in per cent."""
    rows = []
    for step in lines[0]['accuracies'] if lines else ():
        found = [values_of(lines, name, 'accuracies', step) for name in MODELS.values()]
        cells = [mean_sd([100 * value for value in values]) for values in found]
        rows.append([f'{int(step):,}', *cells])
    return table(['steps', *MODELS.values()], rows)


EXPERIMENT = Experiment(sweep, render)
