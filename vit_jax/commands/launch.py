"""vit_jax launch"""

import argparse
import os
import pathlib
import re
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax import cluster
from vit_jax.commands import options
from vit_jax.errors import UserError, reason
from vit_jax.processes import run_local

EPILOG = """\
Options before the command are launch's, those after it the command's. On a CPU,
--devices_per_process makes virtual devices; GPUs are shared out evenly.
docs/clusters.md tells of Slurm, Open MPI and TPU pods.

  vit_jax launch --processes=2 --devices_per_process=4 train \\
      --config=configs/digits_convit.py --workdir=/tmp/digits
  vit_jax launch --slurm --nodes=2 --tasks_per_node=4 --slurm_partition=gpu \\
      --slurm_gpus_per_node=4 --slurm_time=600 train \\
      --config=configs/imagenet_convit.py --workdir=/shared/convit
"""

SLURM_MINUTES = 24 * 60


def main(argv: Sequence[str]) -> int:
    parser = options.make_parser(
        'launch',
        'Runs a command in several processes, which share their devices.',
        usage='vit_jax launch [options] COMMAND [options of the command]',
        epilog=EPILOG,
    )
    parser.add_argument('--processes', type=options.positive, help='on this host')
    parser.add_argument(
        '--devices_per_process', type=options.positive, help='default: all there are'
    )
    parser.add_argument(
        '--verbose',
        action='store_true',
        help='print what the other processes say once one has died',
    )
    parser.add_argument(
        '--slurm',
        nargs='?',
        const='slurm',
        choices=['slurm', 'local'],
        help='submit a job; =local: try that without Slurm, on this host',
    )
    parser.add_argument('--nodes', type=options.positive, help='of the job, default 1')
    parser.add_argument(
        '--tasks_per_node', type=options.positive, help='processes a node, default 1'
    )
    parser.add_argument(
        '--log_dir', help="for the job's output, seen by all nodes; default slurm_logs"
    )
    parser.add_argument(
        '--slurm_...',
        metavar='VALUE',
        help='any option of sbatch, such as --slurm_partition=gpu; --slurm_time in '
        f'minutes, default {SLURM_MINUTES}',
    )
    own, command = split(argv, parser)
    more = [word for word in own if word.startswith('--slurm_')]
    args = options.parse_strict(parser, [word for word in own if word not in more])
    if not command or command[0] == 'launch':
        raise UserError(
            'name the command to launch, such as `vit_jax launch --processes=2 train '
            '--config=FILE --workdir=DIR`'
        )
    _check_fit(args, more)
    if args.slurm:
        return submit(command, args, _slurm_options(more))
    return run_local(
        command, args.processes, args.devices_per_process, verbose=args.verbose
    )


def split(
    argv: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[list[str], list[str]]:
    """The words before the command, and those from it on."""
    alone = {
        name
        for action in parser._actions
        if action.nargs in (0, '?')
        for name in action.option_strings
    }
    i = 0
    while i < len(argv) and argv[i].startswith('-'):
        word = argv[i]
        whole = '=' in word or word in alone or word.startswith('--slurm_')
        i += 1 if whole else 2
    return list(argv[:i]), list(argv[i:])


def _check_fit(args: argparse.Namespace, more: Sequence[str]) -> None:
    """Raises UserError for options that do not go together."""
    if bool(args.slurm) == bool(args.processes):
        raise UserError('give one of --processes=N, for this host, and --slurm')
    of_slurm = {
        '--nodes': args.nodes,
        '--tasks_per_node': args.tasks_per_node,
        '--log_dir': args.log_dir,
        **dict.fromkeys(more, True),
    }
    of_hosts = {
        '--devices_per_process': args.devices_per_process,
        '--verbose': args.verbose,
    }
    for name, value in (of_hosts if args.slurm else of_slurm).items():
        if value:
            other = '--processes' if args.slurm else '--slurm'
            raise UserError(f'{name.partition("=")[0]} is for {other}')


class Task:
    """What each task of a job runs; submitit stores it, and runs it anew when the job
    was preempted or its time was over.

    Args:
      command: words of the command line, without `vit_jax`.
      coordinator: 'HOST:PORT' of process 0, where there is no Slurm to tell it.
    """

    def __init__(self, command: Sequence[str], coordinator: str | None):
        self._command = list(command)
        self._coordinator = coordinator

    def __call__(self) -> None:
        import submitit

        if self._coordinator:
            task = submitit.JobEnvironment()
            os.environ.update(
                cluster.environment(self._coordinator, task.num_tasks, task.global_rank)
            )
        # Submitit passes over SIGTERM, before the run listens to it and after the first
        # one: it is to end the task then.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Before a job's time is over, or when it is preempted, submitit would queue it
        # again at once. The run saves before that, as SIGTERM makes it.
        name = 'SIG' + os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')
        requeue = signal.getsignal(getattr(signal, name))
        caught: list[int] = []

        def save(number: int, frame: Any) -> None:
            caught.append(number)
            if len(caught) > 1:  # it saves already
                return
            alone = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            if callable(requeue) and alone and not cluster.is_joined():
                requeue(number, frame)  # nothing to save yet
            os.kill(os.getpid(), signal.SIGTERM)

        signal.signal(getattr(signal, name), save)
        sys.argv = ['vit_jax', *self._command]
        try:
            runpy.run_module('vit_jax.main', run_name='__main__', alter_sys=False)
        except SystemExit as error:
            if error.code:
                raise
        if caught and callable(requeue):
            requeue(caught[0], None)

    def checkpoint(self) -> Any:
        """What to run when the job is queued again: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(
    command: Sequence[str], args: argparse.Namespace, more: Mapping[str, Any]
) -> int:
    """Submits a job, and says where it is; returns an exit code.

    Args:
      command: words of the command line, without `vit_jax`.
      args: of `main`.
      more: options of sbatch, 'slurm_partition' and so on.

    Raises:
      UserError: when submitit or Slurm is not there, or does not take it.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise UserError(
            "--slurm needs submitit: pip install 'vit_jax[slurm]'"
        ) from error
    local = args.slurm == 'local'
    nodes, tasks = args.nodes or 1, args.tasks_per_node or 1
    if local and nodes > 1:
        raise UserError(f'--slurm=local has one node, not {nodes}')
    minutes = more.get('slurm_time', SLURM_MINUTES)
    if not isinstance(minutes, int):
        raise UserError(f'--slurm_time is in minutes, not {minutes!r}')
    log_dir = pathlib.Path(args.log_dir or 'slurm_logs')
    try:
        executor = submitit.AutoExecutor(folder=log_dir, cluster=args.slurm)
        executor.update_parameters(
            name=f'vit_jax_{command[0]}',
            nodes=nodes,
            tasks_per_node=tasks,
            timeout_min=minutes,
            **more,
        )
        job = executor.submit(
            Task(command, f'127.0.0.1:{cluster.free_port()}' if local else None)
        )
    except Exception as error:  # submitit raises whatever its parts raise
        why = reason(error).partition('. Valid arguments')[0]
        hint = '' if local else '; --slurm=local tries it without Slurm'
        raise UserError(f'the job was not taken: {why}{hint}') from error
    print(
        f'job {job.job_id}: {nodes} node(s) x {tasks} task(s), {minutes} minutes\n'
        f'output: {job.paths.stderr}, and {job.paths.stdout.name} beside it\n'
        f'to stop it: {"kill" if local else "scancel"} {job.job_id}'
    )
    return 0


def _slurm_options(words: Sequence[str]) -> dict[str, Any]:
    """'--slurm_mem=8GB' as {'slurm_mem': '8GB'}; numbers as such."""
    pairs = [word.removeprefix('--').partition('=') for word in words]
    for name, equals, _ in pairs:
        if not equals:
            raise UserError(f'--{name} needs a value, --{name}=VALUE')
    return {k: int(v) if re.fullmatch(r'\d+', v) else v for k, _, v in pairs}
