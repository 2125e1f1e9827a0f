"""vit_jax translate"""

import argparse
import contextlib
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from vit_jax.commands import options
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
        type=_not_negative,
        metavar='A',
        help="of beam search; the larger, the longer (the run's)",
    )
    args = options.parse_strict(parser, argv)
    if args.file != '-' and not pathlib.Path(args.file).is_file():
        raise UserError(f'no such file: {args.file}')
    options.quiet()
    translate = _load(args)
    count, start = 0, time.perf_counter()
    with _open(args.file) as file:
        lines = read_lines(file, 'stdin' if args.file == '-' else args.file)
        while chunk := list(itertools.islice(lines, CHUNK)):
            for line in translate(chunk, count + 1):
                print(line)
            sys.stdout.flush()
            count += len(chunk)
    seconds = time.perf_counter() - start
    print(
        f'{count:,} lines in {seconds:.1f} s, {count / seconds:,.1f} a second',
        file=sys.stderr,
    )


def _load(args: argparse.Namespace):
    """(lines, number of the first) -> their translations."""
    import jax
    import jax.numpy as jnp

    from vit_jax.data.buckets import make_buckets
    from vit_jax.data.vocabulary import load_tokenizer
    from vit_jax.modules import make_stored_model
    from vit_jax.parallel import make_parallel
    from vit_jax.pretrained import load_variables
    from vit_jax.pretrained.source import open_source
    from vit_jax.translation import Decoding, Translator

    source = open_source(args.weights)
    metadata = source.metadata or {}
    if 'text' not in metadata or 'model' not in metadata:
        raise UserError(
            f'{args.weights} does not say that it is of a model of sentences; take the '
            'workdir of a run of one, such as configs/multi30k_transformer.py'
        )
    about, text = metadata['model'], metadata['text']
    folder = pathlib.Path(args.weights)
    if not folder.is_dir():  # a file, or WORKDIR@best
        before = args.weights.rpartition('@')[0]
        folder = pathlib.Path(before) if os.path.isdir(before) else folder.parent
    tokenizer = load_tokenizer(folder)
    parallel = make_parallel('jit')
    model = make_stored_model(about, args.weights)
    length, rows = text['buckets'][-1], len(parallel.devices)
    example = jax.ShapeDtypeStruct((1, length), jnp.int32)
    variables, _ = load_variables(
        source, model, (example, example), sharding=parallel.leaf_sharding
    )
    buckets = make_buckets(
        text['buckets'], max(text['tokens_per_batch'], rows * length), rows
    )
    run = metadata.get('config', {}).get('text', {})
    how = Decoding(
        args.beam or run.get('beam', 1),
        run.get('length_penalty', 0.6)
        if args.length_penalty is None
        else args.length_penalty,
        text['extra_length'],
    )
    translator = Translator(model, how, parallel)
    return lambda lines, first: translator.translate(
        variables, lines, tokenizer, buckets, first
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
            yield line.rstrip(b'\r\n').decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f'{name}:{number} is not UTF-8; convert the file first, by '
                '`iconv -t UTF-8`'
            ) from error


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0.0 <= number < float('inf'):
        raise ValueError
    return number
