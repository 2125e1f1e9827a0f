"""vit_jax reproduce"""

import argparse
import os
import pathlib
import re
import shlex
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

from vit_jax.commands import options
from vit_jax.errors import Stopped, UserError, reason, unknown
from vit_jax.experiment import (
    Cell,
    Experiment,
    Line,
    cell_folder,
    find_line,
    load_experiment,
    read_result,
    run_cell,
)
from vit_jax.jobs import Job, available_cpus, run_jobs, shares
from vit_jax.processes import count_gpus, how_it_ended
from vit_jax.reproduce import gather, of_no_cell, update_results
from vit_jax.results import status, table, table_row, values_of

EPILOG = """\
A cell that has run does not run again, and one that was interrupted goes on: the same
command always finishes what is left. Who deletes a cell's folder in the workdir, and
its line where --results keeps one, has it run again.

  vit_jax reproduce --list
  vit_jax reproduce convit_table3 --list
  vit_jax reproduce convit_table3 --costs --workdir=/data/runs --data_dir=/data/tfds
  vit_jax reproduce convit_table3/digits --workdir=/tmp/runs --jobs=2
  vit_jax reproduce convit_table2/ConViT-S/10% --workdir=/data/runs \\
      --data_dir=/data/tfds

As an array of Slurm jobs, each with its part of the cells:

  sbatch --array=0-8 --wrap='vit_jax reproduce convit_table2 --workdir=/shared/runs \\
      --part=$SLURM_ARRAY_TASK_ID/9'
"""


def main(argv: Sequence[str]) -> int:
    parser = options.make_parser(
        'reproduce',
        'Runs the cells of a table, and writes it with the published values beside.',
        epilog=EPILOG,
    )
    parser.add_argument(
        'name', nargs='?', metavar='EXPERIMENT[/CELL]', help='a folder in experiments/'
    )
    told = parser.add_mutually_exclusive_group()
    told.add_argument(
        '--list', action='store_true', help='what there is, and what has run'
    )
    told.add_argument(
        '--costs',
        action='store_true',
        help='what has not run, its commands and their cost: seconds a cell',
    )
    parser.add_argument('--workdir', type=pathlib.Path, help='for all runs')
    parser.add_argument('--data_dir', help='where datasets lie: dataset.data_dir')
    parser.add_argument('--seed', type=int, help='this one alone')
    parser.add_argument(
        '--jobs',
        type=options.positive,
        default=1,
        help='cells at a time, each on its share of the GPUs, or CPU cores',
    )
    parser.add_argument(
        '--part', type=_part, metavar='I/N', help='every Nth cell, from the Ith; from 0'
    )
    parser.add_argument(
        '--results',
        type=pathlib.Path,
        metavar='DIR',
        help='for results.jsonl, table.md and pictures; what is there has run already '
        '(EXPERIMENT in the workdir)',
    )
    parser.add_argument(
        '--experiments',
        type=pathlib.Path,
        metavar='DIR',
        default=pathlib.Path('experiments'),
        help='the folder of experiments (./experiments)',
    )
    args = options.parse_strict(parser, argv)
    options.quiet()
    if args.part and (args.list or args.costs):
        raise UserError('--part is of what runs; --list and --costs tell of all cells')
    if args.name is None:
        if not args.list:
            raise UserError('name an experiment; --list tells which there are')
        print(_list_experiments(args.experiments), end='')
        return 0
    name, _, below = args.name.partition('/')
    experiment = _load(args.experiments, name)
    cells = experiment.cells(below)
    if args.seed is not None:
        cells = [cell for cell in cells if cell.seed == args.seed]
        if not cells:
            raise UserError(f'{args.name} has no seed {args.seed}')
    if args.list or args.costs:
        folder = args.results or args.experiments / name
        lines = gather(experiment, folder, args.workdir and args.workdir / name)
        if args.list:
            print(_list_cells(cells, lines), end='')
        else:
            left = [cell for cell in cells if find_line(cell, lines) is None]
            _print_costs(args, experiment, left)
        return 0
    if args.workdir is None:
        raise UserError('name a folder for the runs, such as --workdir=/tmp/runs')
    if args.part:
        part, of = args.part
        cells = cells[part::of]
    return _run(args, experiment, cells)


def _run(
    args: argparse.Namespace, experiment: Experiment, cells: Sequence[Cell]
) -> int:
    """Runs what has not run; a cell that cannot stops no other."""
    workdir = args.workdir / experiment.name
    results = args.results or workdir
    try:  # what is wrong with them is told now, not after the first cell
        workdir.mkdir(parents=True, exist_ok=True)
        update_results(experiment, results, workdir, draw=False)
    except OSError as wrong:
        folder = wrong.filename or results
        raise UserError(f'cannot write to {folder}: {reason(wrong)}') from wrong
    done = gather(experiment, results, workdir)
    left = [cell for cell in cells if find_line(cell, done) is None]
    print(f'{len(left)} of {len(cells)} cells are to run', file=sys.stderr)
    failures = []
    run = _run_one_by_one if args.jobs == 1 else _run_side_by_side
    with closing(run(args, experiment, left)) as ran:
        for cell, error in ran:
            told = f'{experiment.name}/{cell.name}, seed {cell.seed}: {error or "done"}'
            if error:
                failures.append(error)
            if len(left) > 1 or not error:  # one error is told below
                print(told, file=sys.stderr)
            update_results(experiment, results, workdir, draw=False)
    # Above what was wrong, in a file too: `_run_side_by_side` reads the last line.
    print(update_results(experiment, results, workdir), end='', flush=True)
    print(f'{results} holds results.jsonl and table.md', file=sys.stderr)
    if others := of_no_cell(experiment, results):
        told = f'{len(others)} lines of results.jsonl are of no cell of the sweep'
        print(f'{told}; delete them, if it is as it should be', file=sys.stderr)
    if failures:
        several = f'{len(failures)} of {len(left)} cells did not run, as told above'
        raise UserError(failures[0] if len(left) == 1 else several)
    return 0


Ran = Generator[tuple[Cell, str | None], None, None]  # and what was wrong


def _run_one_by_one(
    args: argparse.Namespace, experiment: Experiment, cells: Sequence[Cell]
) -> Ran:
    for cell in cells:
        error = None
        try:
            run_cell(experiment, cell, args.workdir / experiment.name, args.data_dir)
        except Stopped:
            raise
        except UserError as wrong:
            error = str(wrong)
        except Exception as failure:  # such as out of memory, which is one cell's
            log = _log(args, experiment, cell)
            with log.open('a') as file:
                traceback.print_exception(failure, file=file)
            error = f'{type(failure).__name__}: {reason(failure)} (see {log})'
        yield cell, error  # the failure is gone, and what its frames had in memory


def _run_side_by_side(
    args: argparse.Namespace, experiment: Experiment, cells: Sequence[Cell]
) -> Ran:
    """Each cell in a process of its own, for JAX takes all the devices that it sees."""
    common = [f'--workdir={args.workdir}', f'--experiments={args.experiments}']
    common += [f'--data_dir={args.data_dir}'] if args.data_dir else []
    jobs = []
    for cell in cells:
        name = f'{experiment.name}/{cell.name}'
        command = [sys.executable, '-m', 'vit_jax.main', 'reproduce', name]
        log = _log(args, experiment, cell)
        jobs.append(Job([*command, f'--seed={cell.seed}', *common], log))
    dealt = shares(args.jobs, available_cpus(), count_gpus(os.environ))
    # As by Ctrl-C: those that run are asked to end, and save.
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        with closing(run_jobs(jobs, dealt)) as ended:
            for number, code in ended:
                cell, log = cells[number], jobs[number].log
                error = None
                if code or not read_result(cell, args.workdir / experiment.name):
                    *_, last = log.read_text(errors='replace').splitlines() or ['']
                    last = last.removeprefix('vit_jax: error: ')
                    last = last.removesuffix(f' (see {log})')
                    how = f'{how_it_ended(code)}; ' if code else ''  # asked to stop
                    error = f'{last} ({how}see {log})'
                yield cell, error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: Any) -> None:
    if number == signal.SIGHUP:  # a terminal that is closed says so twice
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _log(args: argparse.Namespace, experiment: Experiment, cell: Cell) -> pathlib.Path:
    """What a cell says that has a process of its own, and the traceback of one."""
    return cell_folder(cell, args.workdir / experiment.name) / 'log.txt'


def _load(base: pathlib.Path, name: str) -> Experiment:
    known = _names(base)
    if name not in known:
        raise unknown(f'experiment in {base}/', name, known)
    return load_experiment(base / name)


def _names(base: pathlib.Path) -> list[str]:
    """The folders of experiments."""
    if not base.is_dir():
        raise UserError(
            f'no such folder: {base}; run this where the project is, or name the '
            'folder by --experiments'
        )
    return sorted(file.parent.name for file in base.glob('*/sweep.py'))


def _list_experiments(base: pathlib.Path) -> str:
    """With the minutes that their cells took, wherever they ran."""
    rows = []
    for name in _names(base):
        experiment = load_experiment(base / name)
        ran, cells = gather(experiment, base / name), experiment.cells()
        minutes = sum(line.get('seconds', 0) for line in ran) / 60
        state = f'{len(ran)} of {len(cells)}'
        rows.append([name, state, f'{minutes:,.0f}', experiment.title])
    return table(['experiment', 'have run', 'minutes', 'what'], rows)


def _list_cells(cells: Sequence[Cell], lines: Sequence[Line]) -> str:
    """Of the lines that the experiment's folder, or the workdir, holds."""
    rows = []
    for name in dict.fromkeys(cell.name for cell in cells):
        same = [cell for cell in cells if cell.name == name]
        ran = [cell for cell in same if find_line(cell, lines)]
        expected = same[0].expected
        published = f'{expected.value:g} ({expected.source})' if expected else ''
        state = f'{len(ran)} of {len(same)} seeds'
        if expected:
            state += f', {status(values_of(lines, name, *expected.path), expected)}'
        rows.append([name, state, published])
    return table(['cell', 'have run', 'published'], rows)


def _print_costs(
    args: argparse.Namespace, experiment: Experiment, left: Sequence[Cell]
) -> None:
    """A row for the seeds of a cell, as soon as it is counted; one for all cells."""
    from vit_jax.costs import ASSUMPTION, GPU, cell_flops, describe

    seeds = Counter(cell.name for cell in left)
    if not seeds:
        print(f'every cell of {args.name} has run')
        return
    first = {cell.name: cell for cell in reversed(left)}
    cells = [first[name] for name in seeds]
    header = ['not run', 'seeds', 'FLOP', f'one {GPU.name}, at least', 'command']
    print(table(header, []), end='')
    total: int | None = 0
    for cell, flops in zip(cells, cell_flops(experiment, cells, args.data_dir)):
        count, name = seeds[cell.name], f'{experiment.name}/{cell.name}'
        flops = None if flops is None else count * flops
        total = None if flops is None or total is None else total + flops
        row = [cell.name, str(count), *describe(flops), _command(args, name)]
        print(table_row(row), end='', flush=True)
    row = ['all', str(len(left)), *describe(total), _command(args, args.name)]
    print(table_row(row))
    print(ASSUMPTION, end='')


def _command(args: argparse.Namespace, name: str) -> str:
    """What runs that, where the user says that runs and data lie; as Markdown."""
    words = [name, f'--workdir={args.workdir or "/tmp/runs"}']
    words += [f'--data_dir={args.data_dir}'] if args.data_dir else []
    words += [f'--seed={args.seed}'] if args.seed is not None else []
    return f'`{shlex.join(["vit_jax", "reproduce", *words])}`'


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r'(\d+)/(\d+)', text)
    part, of = map(int, found.groups()) if found else (0, 0)
    if part >= of:
        raise argparse.ArgumentTypeError(f'I/N with I below N, not {text!r}')
    return part, of
