"""vit_jax translate"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO

from vit_jax.commands import options, trained_text
from vit_jax.errors import UserError

EPILOG = """\
Lines in, lines out, in their order; an empty line stays empty. Averages of checkpoints
are weights too: --weights=WORKDIR@last:5.

  vit_jax translate --weights=/tmp/multi30k test.en > test.de
  echo 'A dog runs.' | vit_jax translate --weights=/tmp/multi30k@last:5 --beam=5
"""
CHUNK = 1024  # lines that are translated together, sorted by their length


def main(argv: Sequence[str]) -> None:
    parser = options.make_parser(
        'translate', 'Translates lines of text.', epilog=EPILOG
    )
    parser.add_argument(
        'file', nargs='?', default='-', metavar='FILE', help='UTF-8; - or none: stdin'
    )
    parser.add_argument(
        '--weights', required=True, help='workdir of a run, or weights beside its files'
    )
    parser.add_argument(
        '--beam', type=options.positive, help="hypotheses kept; 1: greedy (the run's)"
    )
    parser.add_argument(
        '--length_penalty',
        type=_penalty,
        metavar='A',
        help="of beam search; the larger, the longer (the run's)",
    )
    args = options.parse_strict(parser, argv)
    _check_file(args.file)
    options.quiet()
    sys.stdout.reconfigure(encoding='utf-8')  # type: ignore[union-attr]
    translate = _load(args)
    count, start = 0, time.perf_counter()
    with _open(args.file) as file:
        lines = read_lines(file, 'stdin' if args.file == '-' else args.file)
        for chunk in cut(lines):
            for line in translate(chunk, count + 1):
                print(line)
            sys.stdout.flush()
            count += len(chunk)
    seconds = time.perf_counter() - start
    print(
        f'{count:,} lines in {seconds:.1f} s, {count / seconds:,.1f} a second',
        file=sys.stderr,
    )


def _check_file(path: str) -> None:
    """Raises UserError, before anything is loaded, for what cannot be read as lines."""
    if path == '-':
        if sys.stdin is None:
            raise UserError('stdin is closed; name a FILE')
    elif os.path.isdir(path):
        raise UserError(f'{path} is a folder; name a file')
    elif not os.path.exists(path):
        raise UserError(f'no such file: {path}')
    elif path.endswith('.gz'):
        raise UserError(f'{path} is compressed; `zcat {path} | vit_jax translate ...`')


def _load(args: argparse.Namespace) -> Callable[[list[str], int], list[str]]:
    """(lines, number of the first) -> their translations."""
    found = trained_text.load(args.weights)
    buckets = found.buckets
    beam, penalty = args.beam or found.settings.get('beam', 1), args.length_penalty
    if penalty is None:
        penalty = found.settings.get('length_penalty', 0.6)
    elif beam == 1:
        raise UserError('--length_penalty is of beam search; give --beam too')
    translator = found.make_translator(beam, penalty)
    return lambda lines, first: translator.translate(
        found.variables, lines, found.tokenizer, buckets, first
    )


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    if path == '-':
        yield sys.stdin.buffer
    else:
        with open(path, 'rb') as file:
            yield file


def read_lines(file: BinaryIO, name: str) -> Iterator[str]:
    """Lines without their ends.

    Raises:
      UserError: for bytes that are not UTF-8; names the line.
    """
    for number, line in enumerate(file, start=1):
        try:
            # A byte order mark begins a file, if any.
            encoding = 'utf-8-sig' if number == 1 else 'utf-8'
            yield line.rstrip(b'\r\n').decode(encoding)
        except UnicodeDecodeError as error:
            raise UserError(
                f'{name}:{number} is not UTF-8; convert the file first, by '
                '`iconv -t UTF-8`'
            ) from error


def cut(lines: Iterable[str]) -> Iterator[list[str]]:
    """Chunks of lines; those before one that cannot be read come before its error."""
    chunk: list[str] = []
    try:
        for line in lines:
            chunk.append(line)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
    except UserError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def _penalty(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= 10.0:
        raise argparse.ArgumentTypeError(f'a number from 0 to 10, not {text!r}')
    return number
