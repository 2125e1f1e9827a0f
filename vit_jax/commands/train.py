"""vit_jax train"""

from collections.abc import Sequence

from vit_jax.commands import options
from vit_jax.errors import UserError

EPILOG = f"""\
{options.CONFIG_HELP}
The same command goes on where an interrupted run stopped. The workdir receives
config.json, launches.jsonl, metrics.jsonl, TensorBoard events and checkpoints/.

  vit_jax train --config=configs/digits_convit.py --workdir=/tmp/digits
"""


def main(argv: Sequence[str]) -> None:
    parser = options.make_parser(
        'train', 'Trains, evaluates, checkpoints; resumes.', epilog=EPILOG
    )
    options.add_config(parser)
    parser.add_argument('--workdir', required=True, help='folder of the run')
    args, overrides = options.parse(parser, argv)
    if not args.workdir:
        raise UserError('--workdir is empty; name the folder of the run')
    config = options.read_config(args.config, overrides)

    options.quiet()
    from vit_jax.build import build
    from vit_jax.train import train
    from vit_jax.writer import format_metrics

    run = build(config, named=options.keys(overrides))
    result = train(run, args.workdir)
    print(
        f'finished at step {run.num_steps}: {format_metrics(result)}\n'
        f'{args.workdir} holds checkpoints/{run.num_steps}, metrics.jsonl and '
        f'config.json\nnext: vit_jax predict --weights={args.workdir} IMAGE'
    )
