"""vit_jax report"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from vit_jax.commands import options
from vit_jax.errors import UserError, reason, some

EPILOG = """\
A PATH is the workdir of a run, which may still be training; or the folder of an
experiment, or of its results, where table.md and the pictures are written again from
results.jsonl. In DIR,
  report.html   is one file that needs no server, no network, and nothing beside it
  report.md     holds the same tables, and shows the pictures that lie beside it as PNG
Both show curves of all runs, their last evaluations and rates, where their models
attend on images of the evaluation split, GPSA's gates and non-locality, what differs
between their configs, and what they ran on; of experiments, table, pictures and README.

  vit_jax report /tmp/digits
  vit_jax report /tmp/runs/digits_road/convit/* --out=/tmp/seeds
  vit_jax report experiments/digits_road --out=/tmp/road
"""


def main(argv: Sequence[str]) -> None:
    parser = options.make_parser(
        'report',
        'Curves, tables and pictures of runs and experiments, as one HTML file.',
        epilog=EPILOG,
    )
    parser.add_argument(
        'paths', nargs='+', type=pathlib.Path, metavar='PATH', help='runs, experiments'
    )
    parser.add_argument(
        '--out',
        type=pathlib.Path,
        metavar='DIR',
        default=pathlib.Path('report'),
        help='made if need be; a report that is there is written over (./report)',
    )
    parser.add_argument(
        '--images',
        type=_count,
        metavar='N',
        default=2,
        help='of each run, to show attention on; 0 shows none, and is quick (2)',
    )
    parser.add_argument(
        '--experiments',
        type=pathlib.Path,
        metavar='DIR',
        default=pathlib.Path('experiments'),
        help='where the sweep.py of results that lie elsewhere is (./experiments)',
    )
    args = options.parse_strict(parser, argv)
    options.quiet()
    runs = [path for path in args.paths if _is_run(path)]
    results = [path for path in args.paths if path not in runs]
    if (args.out / 'config.json').exists():
        raise UserError(f'{args.out} is the workdir of a run; choose another --out')

    import jax

    # A run that is training keeps its accelerator for itself.
    jax.config.update('jax_platforms', 'cpu')
    from vit_jax.report.comparison import comparison
    from vit_jax.report.experiments import experiment_parts
    from vit_jax.report.page import Part, join, plain, write
    from vit_jax.report.runs import read_runs

    folders = read_runs(runs)
    try:  # what is wrong with it is told now
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot write to {args.out}: {reason(error)}') from error
    experiments = experiment_parts(results, args.experiments)
    names = [*(folder.label for folder in folders), *experiments]
    title = some(names, 5)
    parts = [Part(f'# {plain(title)}'), *experiments.values()]
    if folders:
        parts.insert(1, comparison(folders, args.images, _say))
    for path in write(title, join(parts), args.out):
        print(path)


def _say(message: str) -> None:
    print(f'vit_jax: {message}', file=sys.stderr)


def _is_run(path: pathlib.Path) -> bool:
    """Whether a folder is the workdir of a run, not of an experiment.

    Raises:
      UserError: when it is neither.
    """
    if not path.exists():
        raise UserError(f'no such folder: {path}')
    if (path / 'config.json').is_file():
        return True
    if any((path / name).is_file() for name in ('results.jsonl', 'sweep.py')):
        return False
    below = sorted(file.parent.name for file in path.glob('*/config.json'))
    hint = f'; those of {some(below)} are in it: {path}/*' if below else ''
    raise UserError(
        f'{path} is neither the workdir of a run, with a config.json, nor an '
        f'experiment, with a sweep.py or a results.jsonl{hint}'
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'a whole number from 0, not {text!r}')
    return int(text)
