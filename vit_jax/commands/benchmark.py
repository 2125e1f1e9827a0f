"""vit_jax benchmark"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from vit_jax import cluster
from vit_jax.commands import options
from vit_jax.errors import UserError

if TYPE_CHECKING:  # JAX is imported when it is needed
    from vit_jax.benchmark import Pace, Training

EPILOG = """\
gpsa: forward and backward pass of GPSA's core, each impl next to plain attention.
train: the train step of a config, with one made-up batch that lies on the devices, and
with the config's own data.

  vit_jax benchmark gpsa --help
  vit_jax benchmark gpsa
  vit_jax benchmark train --help
  vit_jax benchmark train --config=configs/digits_convit.py
"""
GPSA_EPILOG = """\
Ratios are to the fastest plain impl of the same run. Medians of interleaved rounds.

  vit_jax benchmark gpsa
  vit_jax benchmark gpsa --tokens=196,1024 --dtype=bfloat16
"""
TRAIN_EPILOG = f"""\
{options.CONFIG_HELP}
The dataset need not be prepared unless --data is given. Nothing is kept.

  vit_jax benchmark train --config=configs/digits_convit.py --data
  vit_jax benchmark train --config=configs/imagenet_convit.py --steps=50 --json
"""


def main(argv: Sequence[str]) -> None:
    whats = {'gpsa': _gpsa, 'train': _train}
    if argv and argv[0] in whats:
        whats[argv[0]](argv[1:])
        return
    parser = options.make_parser(
        'benchmark', 'How fast things are on this machine.', epilog=EPILOG
    )
    parser.add_argument('what', choices=list(whats))
    options.parse_strict(parser, argv)
    raise UserError(f'name what to measure first: {" or ".join(whats)}')


# --- The train step of a config -----------------------------------------------


def _train(argv: Sequence[str]) -> None:
    parser = options.make_parser(
        'benchmark train',
        'Step time, images per second, waiting for data, memory of a config.',
        epilog=TRAIN_EPILOG,
    )
    options.add_config(parser)
    parser.add_argument(
        '--steps', type=options.positive, default=20, help='that are timed, default 20'
    )
    parser.add_argument(
        '--data', action='store_true', help="measure with the config's own data too"
    )
    parser.add_argument('--json', action='store_true', help='JSON instead of a table')
    args, overrides = options.parse(parser, argv)
    config = options.read_config(args.config, overrides)

    options.quiet()
    cluster.join()  # several processes, where the environment or the cluster says so
    from vit_jax.benchmark import measure_training
    from vit_jax.build import build

    run = build(config, named=options.keys(overrides) or None)
    about = {
        'model': config.model.name,
        'dtype': config.dtype,
        'device_kind': run.parallel.devices[0].device_kind,
        'devices': len(run.parallel.devices),
        'batch_size': run.batch_size,
        'steps': args.steps,
    }
    measured = measure_training(run, args.steps, args.data)
    if args.json:
        options.print_once(
            json.dumps(about | _to_json(measured, run.units.losses), indent=2)
        )
        return
    title = f'{config.model.name}, {config.dtype}'
    table = '\n'.join(_describe(measured, run.units.losses))
    options.print_once(
        f'{title}, {run.parallel.describe(run.batch_size, run.units.rows)}\n{table}'
    )


def _to_json(measured: 'Training', unit: str) -> dict:
    def named(pace: 'Pace | None') -> dict | None:
        if pace is None:
            return None
        pairs = pace._asdict().items()
        return {
            name.replace('per_second', f'{unit}_per_second', 1): x for name, x in pairs
        }

    paces = {'batch': named(measured.batch), 'data': named(measured.data)}
    return measured._asdict() | paces


def _describe(measured: 'Training', unit: str) -> Iterator[str]:
    yield f'compiled in {measured.compile_seconds:.1f} s'
    yield f'memory of a device: {measured.memory_bytes / 2**30:.3f} GiB'
    yield (
        f'{"":16} {"ms/step":>9} {"quartiles":>19} {f"{unit}/s":>9} {"a device":>9} '
        f'{"data wait":>9} {"of peak":>9}'
    )
    yield _row('one batch', measured.batch)
    if measured.data is not None:
        yield _row('its data', measured.data)


def _row(name: str, pace: 'Pace') -> str:
    low, high = (f'{1000 * seconds:.2f}' for seconds in pace.quartiles)
    peak = '' if pace.flops_utilisation is None else f'{pace.flops_utilisation:.1%}'
    return (
        f'{name:16} {1000 * pace.step_seconds:9.2f} {f"{low} to {high}":>19} '
        f'{pace.per_second:9,.0f} {pace.per_second_per_device:9,.0f} '
        f'{pace.data_wait:9.0%} {peak or "not known":>9}'
    )


# --- GPSA ---------------------------------------------------------------------


def _gpsa(argv: Sequence[str]) -> None:
    parser = options.make_parser(
        'benchmark gpsa', 'Time and memory next to plain attention.', epilog=GPSA_EPILOG
    )
    parser.add_argument(
        '--tokens', default='196,1024,4096', help='token counts, default 196,1024,4096'
    )
    parser.add_argument('--heads', type=options.positive, default=4, help='default 4')
    parser.add_argument(
        '--head_dim', type=options.positive, default=48, help='default 48'
    )
    parser.add_argument(
        '--batch_size',
        type=options.positive,
        help='images; default: 8192 tokens in all',
    )
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
    parser.add_argument(
        '--rounds', type=options.positive, default=20, help='default 20'
    )
    args = options.parse_strict(parser, argv)
    counts = args.tokens.split(',')
    if not all(n.isdecimal() and int(n) for n in counts):
        raise UserError(f'--tokens is a list such as 196,1024, not {args.tokens!r}')

    options.quiet()
    import jax

    print(f'GPSA, forward + backward, {args.dtype}, {jax.devices()[0].device_kind}')
    for tokens in map(int, counts):
        batch_size = args.batch_size or max(8192 // tokens, 1)
        _benchmark_gpsa(tokens, batch_size, args)


def _benchmark_gpsa(tokens: int, batch_size: int, args: argparse.Namespace) -> None:
    import jax

    from vit_jax.benchmark import compare
    from vit_jax.layers.psa import GPSA_IMPLS

    grid = _grid(tokens)
    shape = (batch_size, tokens, args.heads, args.head_dim)
    keys = jax.random.split(jax.random.key(0), 6)
    q, k, v, g = (jax.random.normal(key, shape, args.dtype) for key in keys[:4])
    kernel = jax.random.normal(keys[4], (3, args.heads))
    bias, gating = jax.random.normal(keys[5], (2, args.heads))

    plain = ['xla', 'dense', 'chunked']
    plain += ['cudnn'] * (jax.default_backend() == 'gpu' and args.dtype == 'bfloat16')
    functions = {f'plain {impl}': _plain(impl) for impl in plain}
    functions |= {f'gpsa {impl}': _gpsa_impl(impl, grid) for impl in GPSA_IMPLS}
    measured = compare(functions, (g, q, k, v, kernel, bias, gating), args.rounds)

    best = min(measured[f'plain {impl}'].seconds for impl in plain)
    print(
        f'\n{tokens} tokens ({grid[0]}x{grid[1]}), batch {batch_size}, {args.heads} '
        f'heads of {args.head_dim}\n{"":14} {"ms":>9} {"ratio":>6} {"temporary":>12}'
    )
    for name, (seconds, temp_bytes) in measured.items():
        print(
            f'{name:14} {1000 * seconds:9.2f} {seconds / best:6.2f} '
            f'{temp_bytes / 2**20:8.1f} MiB'
        )


def _plain(impl: str) -> Callable:
    from vit_jax.layers.attention import dot_product_attention

    return _with_gradients(
        lambda q, k, v, *_: dot_product_attention(q, k, v, impl=impl)
    )


def _gpsa_impl(impl: str, grid: tuple[int, int]) -> Callable:
    from vit_jax.layers.psa import gated_positional_attention

    return _with_gradients(partial(gated_positional_attention, grid=grid, impl=impl))


def _with_gradients(function: Callable) -> Callable:
    """(gradient of the output, *args) -> output, gradients of the arguments."""
    import jax

    def run(g, *args):
        out, backward = jax.vjp(function, *args)
        return out, backward(g)

    return run


def _grid(tokens: int) -> tuple[int, int]:
    """The most square (rows, columns) of so many tokens."""
    rows = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    return rows, tokens // rows
