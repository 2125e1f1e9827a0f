"""vit_jax check_data"""

from collections.abc import Sequence
from contextlib import closing

import numpy as np

from vit_jax.commands import options

EPILOG = f"""\
{options.CONFIG_HELP}
  vit_jax check_data --config=configs/cifar10_vit.py --config.dataset.data_dir=/data
"""


def main(argv: Sequence[str]) -> None:
    parser = options.make_parser(
        'check_data',
        'What a config will read, where from, and one decoded batch.',
        epilog=EPILOG,
    )
    options.add_config(parser)
    args, overrides = options.parse(parser, argv)
    config = options.read_config(args.config, overrides)

    options.quiet()
    from vit_jax.build import build

    run = build(config, named=options.keys(overrides) or None)
    dataset, names = run.dataset, run.dataset.class_names
    training = run.train_data(0)  # first: raises for data that is not there
    print(f'{dataset.name}: {dataset.location}')
    for split, count in dataset.splits.items():
        print(f'  split {split}: {count:,} examples')
    print(
        f'  {len(names)} classes: {", ".join(names[:10])}{", ..." * (len(names) > 10)}'
    )

    with closing(training) as batches:
        _describe('first training batch', next(batches), names)
    with closing(run.eval_data()) as batches:
        _describe('first evaluation batch', next(batches), names)


def _describe(title: str, batch: dict[str, np.ndarray], names: Sequence[str]) -> None:
    print(f'{title}:')
    for key, value in batch.items():
        print(
            f'  {key:6} {value.dtype!s:8} {list(value.shape)}  '
            f'from {value.min():g} to {value.max():g}, mean {value.mean():.4g}'
        )
    real = batch['label'][batch['weight'] > 0]  # neither padding nor skipped
    counts = np.bincount(real, minlength=len(names))
    most = np.argsort(-counts, kind='stable')[:5]
    print('  most frequent: ' + ', '.join(f'{names[i]} ({counts[i]})' for i in most))
