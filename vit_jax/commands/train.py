"""vit_jax train"""

import argparse
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from vit_jax import cluster
from vit_jax.commands import options
from vit_jax.errors import UserError

EPILOG = f"""\
{options.CONFIG_HELP}
The same command goes on where an interrupted run stopped. SIGTERM and Ctrl-C save and
stop; the second one acts at once. The workdir receives config.json, launches.jsonl,
metrics.jsonl, TensorBoard events and checkpoints/.

  vit_jax train --config=configs/digits_convit.py --workdir=/tmp/digits
  vit_jax train --config=configs/digits_convit.py --workdir=/tmp/three --seeds=0,1,2
"""


def main(argv: Sequence[str]) -> None:
    parser = options.make_parser(
        'train', 'Trains, evaluates, checkpoints; resumes.', epilog=EPILOG
    )
    options.add_config(parser)
    parser.add_argument('--workdir', required=True, help='folder of the run')
    parser.add_argument(
        '--seeds',
        type=_seeds,
        metavar='0,1,2',
        help='one run after another, in WORKDIR/seed0 and so on; mean and spread',
    )
    parser.add_argument(
        '--allow_changes',
        action='store_true',
        help='go on with a run that was begun with another config',
    )
    # Where there are several processes and nothing else tells of them.
    parser.add_argument('--coordinator', metavar='HOST:PORT', help='of process 0')
    parser.add_argument('--num_processes', type=int, help='that train together')
    parser.add_argument('--process_id', type=int, help='of this one, from 0')
    args, overrides = options.parse(parser, argv)
    if not args.workdir:
        raise UserError('--workdir is empty; name the folder of the run')
    config = options.read_config(args.config, overrides)

    options.quiet()
    cluster.join(
        args.coordinator,
        args.num_processes,
        args.process_id,
        heartbeat_timeout_seconds=config.parallel.heartbeat_seconds,
    )
    if args.seeds:
        _train_seeds(config, args, options.keys(overrides))
        return
    from vit_jax.build import build
    from vit_jax.train import train
    from vit_jax.writer import format_metrics

    run = build(config, named=options.keys(overrides) or None)
    result = train(run, args.workdir, args.allow_changes)
    next_command = f'predict --weights={args.workdir} IMAGE'
    if run.vocabulary:
        next_command = f'translate --weights={args.workdir} FILE'
    elif run.metadata['model']['num_classes'] is None:
        next_command = f'evaluate --workdir={args.workdir}'
    options.print_once(
        f'finished at step {run.num_steps}: {format_metrics(result)}\n'
        f'{args.workdir} holds checkpoints/{run.num_steps}, metrics.jsonl and '
        f'config.json\nnext: vit_jax {next_command}'
    )


def _seeds(text: str) -> list[int]:
    return [int(seed) for seed in text.split(',')]


def _train_seeds(
    config: ConfigDict, args: argparse.Namespace, named: Sequence[str]
) -> None:
    from vit_jax.build import build
    from vit_jax.train import train
    from vit_jax.writer import format_metrics, format_spread

    if 'seed' in named:
        raise UserError('--seeds sets config.seed; leave out --config.seed')
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError('--seeds names a seed twice')
    results = []
    for seed in args.seeds:
        config.seed = seed
        run = build(config, named or None)
        workdir = pathlib.Path(args.workdir) / f'seed{seed}'
        results.append(train(run, workdir, args.allow_changes))
        options.print_once(f'seed {seed}: {format_metrics(results[-1])}')
    options.print_once(f'{len(results)} seeds: {format_spread(results)}')
