"""The command line: `vit_jax <command>`, one line a command."""

import importlib
import os
import sys
from collections.abc import Sequence

from vit_jax import cluster
from vit_jax.errors import Stopped, UserError, reason, unknown

COMMANDS = {
    'train': 'train a config in a workdir, or go on where it stopped',
    'evaluate': 'exact metrics of a trained model on a split',
    'predict': 'classes and probabilities of images',
    'translate': 'lines of text in another language',
    'attend': 'where a model attends in images or sentences, as pictures',
    'convert': 'weights from one format to another, bit for bit',
    'export': 'a trained model as a folder that runs on its own',
    'summarize': "a model's parameters, multiply-adds and activation memory",
    'prepare': 'a dataset, such as ImageNet from its tars, as training reads it',
    'check_data': 'what a config will read, with one decoded batch',
    'reproduce': "a paper's table: runs its cells, compares with published values",
    'report': 'runs and experiments as one HTML file: curves, tables, maps',
    'launch': 'a command in several processes, here or as a job of Slurm',
    'compile': 'the train step for TPUs that are not here: what it needs of them',
    'benchmark': 'how fast GPSA is next to plain attention, or a config trains',
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code.

    Bad input ends with one line on stderr and code 1, misuse of options with 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ('-h', '--help', 'help'):
        print(_help())
        return 0 if argv else 2
    # A fork's modules are found from where the user is, as with `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        if argv[0] not in COMMANDS:
            raise unknown('command', argv[0], COMMANDS)
        if sys.stdout is None:  # what would be printed is not lost without a word
            raise UserError('stdout is closed; send it to a file, or to /dev/null')
        command = importlib.import_module(f'vit_jax.commands.{argv[0]}')
        code = command.main(argv[1:]) or 0
        sys.stdout.flush()
        return code
    except Stopped as stopped:  # as asked: no error
        print(f'vit_jax: {stopped}', file=sys.stderr, flush=True)
        if stopped.waiting:
            os._exit(0)  # Python would wait for threads that read
        return 0
    except UserError as error:
        print(f'vit_jax: error: {error}', file=sys.stderr)
        cluster.leave(1)
        return 1
    except BrokenPipeError:  # whoever reads has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        cluster.leave(1)
        return 1
    except OSError as error:  # a full disk, a file that may not be read
        print(f'vit_jax: error: {error}', file=sys.stderr)
        cluster.leave(1)
        return 1
    except RuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        # JAX's error for a device that has no room left.
        print(
            f'vit_jax: error: out of memory: {reason(error)}; a smaller batch, or a '
            'narrower beam, needs less',
            file=sys.stderr,
        )
        cluster.leave(1)
        return 1
    except KeyboardInterrupt:
        print('\nvit_jax: interrupted', file=sys.stderr)
        cluster.leave(130)
        return 130


def _help() -> str:
    lines = [f'  {name:12} {text}' for name, text in COMMANDS.items()]
    return '\n'.join(
        [
            'usage: vit_jax <command> [options]',
            '',
            'From convolution to attention, in JAX and Flax.',
            '',
            *lines,
            '',
            'vit_jax <command> --help tells the options of a command.',
        ]
    )


if __name__ == '__main__':
    sys.exit(main())
