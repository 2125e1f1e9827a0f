"""vit_jax check_data"""

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np

from vit_jax.commands import options

if TYPE_CHECKING:  # JAX is imported when it is needed
    from vit_jax.data.tokenizer import Tokenizer

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
    dataset, names = run.dataset, run.metadata.get('class_names')
    training = run.train_data(0)  # first: raises for data that is not there
    print(f'{dataset.name}: {dataset.location}')
    for split, count in dataset.splits.items():
        print(f'  split {split}: {count:,} examples')
    if names:
        more = ', ...' * (len(names) > 10)
        print(f'  {len(names)} classes: {", ".join(names[:10])}{more}')
    for title, opened in (('training', training), ('evaluation', run.eval_data())):
        with closing(opened) as batches:
            batch = next(batches)
        print(f'first {title} batch:')
        for key, value in batch.items():
            print(
                f'  {key:6} {value.dtype!s:8} {list(value.shape)}  '
                f'from {value.min():g} to {value.max():g}, mean {value.mean():.4g}'
            )
        if run.vocabulary:
            _show_pair(batch, run.vocabulary.tokenizer)
        else:
            _count_classes(batch, names or [])


def _show_pair(batch: dict[str, np.ndarray], tokenizer: 'Tokenizer') -> None:
    padding = np.mean([(batch[side] == 0).mean() for side in ('source', 'target')])
    pair = [tokenizer.decode(list(batch[side][:1]))[0] for side in ('source', 'target')]
    print(f'  {padding:.0%} padding; the first pair: {pair[0]!r} -> {pair[1]!r}')


def _count_classes(batch: dict[str, np.ndarray], names: Sequence[str]) -> None:
    real = batch['label'][batch['weight'] > 0]  # neither padding nor skipped
    counts = np.bincount(real, minlength=len(names))
    most = np.argsort(-counts, kind='stable')[:5]
    print('  most frequent: ' + ', '.join(f'{names[i]} ({counts[i]})' for i in most))
