"""vit_jax benchmark"""

import math
from collections.abc import Callable, Sequence
from functools import partial

from vit_jax.commands import options
from vit_jax.errors import UserError

EPILOG = """\
gpsa: forward and backward pass of GPSA's core, each impl next to plain attention.
Ratios are to the fastest plain impl of the same run. Medians of interleaved rounds.

  vit_jax benchmark gpsa
  vit_jax benchmark gpsa --tokens=196,1024 --dtype=bfloat16
"""


def main(argv: Sequence[str]) -> None:
    parser = options.make_parser(
        'benchmark', 'Time and memory next to a baseline.', epilog=EPILOG
    )
    parser.add_argument('what', choices=['gpsa'])
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


def _benchmark_gpsa(tokens: int, batch_size: int, args) -> None:
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
    functions |= {f'gpsa {impl}': _gpsa(impl, grid) for impl in GPSA_IMPLS}
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


def _gpsa(impl: str, grid: tuple[int, int]) -> Callable:
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
