"""vit_jax train"""

from collections.abc import Sequence

from vit_jax.commands import options

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
    config, named = options.read_config(args.config, overrides)

    options.quiet()
    from vit_jax.build import build
    from vit_jax.train import train

    run = build(config, named)
    result = train(run, args.workdir)
    correct = round(result['accuracy'] * result['examples'])
    print(
        f'finished at step {run.num_steps}: accuracy {100 * result["accuracy"]:.2f}% '
        f'({correct} of {result["examples"]}), loss {result["loss"]:.4f}\n'
        f'{args.workdir} holds checkpoints/{run.num_steps}, metrics.jsonl, config.json; '
        f'next: vit_jax predict --weights={args.workdir} IMAGE'
    )
