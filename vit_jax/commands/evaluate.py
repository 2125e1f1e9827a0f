"""vit_jax evaluate"""

import json
import pathlib
from collections.abc import Sequence

from vit_jax.commands import options
from vit_jax.errors import UserError

EPILOG = f"""\
{options.CONFIG_HELP}
  vit_jax evaluate --workdir=/tmp/digits
  vit_jax evaluate --workdir=/tmp/digits --config.dataset.eval_split=train
  vit_jax evaluate --config=configs/digits_convit.py --weights=/tmp/digits
"""


def main(argv: Sequence[str]) -> None:
    parser = options.make_parser(
        'evaluate', 'Exact metrics on a split, as JSON on stdout.', epilog=EPILOG
    )
    parser.add_argument('--workdir', help='folder of a run: its config, its weights')
    options.add_config(parser, required=False)
    parser.add_argument(
        '--weights', help='workdir whose weights to take, with --config'
    )
    args, overrides = options.parse(parser, argv)
    given = bool(args.workdir), bool(args.config), bool(args.weights)
    if given not in ((True, False, False), (False, True, True)):
        raise UserError('give --workdir=DIR, or both --config=FILE and --weights=DIR')

    options.quiet()
    from vit_jax.build import build
    from vit_jax.checkpoint import load_metadata, restore_variables, shapes_on
    from vit_jax.config import from_dict, override
    from vit_jax.evaluate import evaluate

    workdir = pathlib.Path(args.workdir or args.weights)
    step, metadata = load_metadata(workdir)
    if args.config:
        config = options.read_config(args.config, overrides)
    else:
        config = override(from_dict(metadata['config']), overrides)
    run = build(config, named=options.keys(overrides))
    _check_model(workdir, metadata, json.loads(json.dumps(run.metadata)))
    like = shapes_on(run.parallel.replicated, run.state_shape.variables)
    variables = restore_variables(workdir, step, like)
    about = {'dataset': run.dataset.name, 'split': run.metadata['eval_split']}
    print(json.dumps({**about, 'step': step, **evaluate(run, variables)}))


def _check_model(workdir: pathlib.Path, there: dict, here: dict) -> None:
    """Raises UserError when the weights are of another model or other classes."""
    pairs = {
        'model': (there['model'], here['model']),
        'class names': (there['class_names'], here['class_names']),
        'channels': [m['preprocessing']['channels'] for m in (there, here)],
    }
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise UserError(
                f'{workdir} holds weights for {what} {theirs}, the config has {ours}'
            )
