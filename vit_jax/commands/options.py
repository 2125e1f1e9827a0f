"""Options that commands share."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence

from ml_collections import ConfigDict

from vit_jax.config import load_config, override
from vit_jax.errors import UserError

CONFIG_HELP = """\
Config keys are set as --config.key=value, such as --config.optim.learning_rate=3e-4;
vit_jax/config.py lists every key with its unit and meaning.
"""


def make_parser(command: str, description: str, **kwargs) -> argparse.ArgumentParser:
    """A parser whose options cannot be abbreviated."""
    return argparse.ArgumentParser(
        prog=f'vit_jax {command}',
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **kwargs,
    )


def add_config(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds --config=FILE[:variant]."""
    parser.add_argument(
        '--config',
        metavar='FILE[:VARIANT]',
        required=required,
        help='recipe, such as configs/digits_convit.py or its :smoke variant',
    )


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Parses options; returns those of the form --config.key=value apart.

    Raises:
      UserError: for an option that the command does not have.
    """
    words = list(argv)
    options = words[: words.index('--')] if '--' in words else words
    for word in options:  # before argparse says what is missing
        if word.startswith('--') and not word.startswith('--config.'):
            _check_option(parser, word)
    args, rest = parser.parse_known_args(words)
    overrides = []
    rest = list(reversed(rest))
    while rest:
        word = rest.pop()
        if not word.startswith('--config.'):
            raise UserError(f'{parser.prog} does not take {word!r}')
        if '=' not in word and rest:
            word = f'{word}={rest.pop()}'
        overrides.append(word)
    return args, overrides


def _check_option(parser: argparse.ArgumentParser, word: str) -> None:
    name = word.partition('=')[0]
    known = [o for action in parser._actions for o in action.option_strings]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f'; did you mean {near[0]}?' if near else ''
        raise UserError(f'{parser.prog} does not take {word!r}{hint}')


def parse_strict(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> argparse.Namespace:
    """Parses options of a command that takes no config keys."""
    args, overrides = parse(parser, argv)
    if overrides:
        raise UserError(f'{parser.prog} does not take {overrides[0]!r}')
    return args


def read_config(path: str, overrides: Sequence[str]) -> ConfigDict:
    """The config of a recipe, with overrides."""
    return override(load_config(path), overrides)


def positive(text: str) -> int:
    """The type of an option that is a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'a whole number above 0, not {text!r}')
    return int(text)


def keys(overrides: Sequence[str]) -> list[str]:
    """The keys that overrides name."""
    return [o.removeprefix('--config.').partition('=')[0] for o in overrides]


def print_once(text: str) -> None:
    """Prints a result; of several processes, the first does."""
    import jax

    if jax.process_index() == 0:
        print(text)


def hide_late_readers(unraisable: 'sys.UnraisableHookArgs') -> None:
    """Keeps still what a damaged checkpoint's other readers say after the first.

    Orbax closes its event loop at the first error; the readers that end later have
    nowhere to report to, and each prints a traceback.
    """
    if str(unraisable.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(unraisable)


def quiet() -> None:
    """Keeps libraries from writing progress and notices between our lines."""
    import logging

    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    logging.getLogger('absl').setLevel(logging.ERROR)
    logging.basicConfig(format='vit_jax: %(message)s', level=logging.WARNING)
    if sys.unraisablehook is sys.__unraisablehook__:  # not that of a debugger
        sys.unraisablehook = hide_late_readers
