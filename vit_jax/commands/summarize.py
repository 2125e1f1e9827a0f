"""vit_jax summarize"""

import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from vit_jax.commands import options
from vit_jax.errors import UserError

EPILOG = """\
MACs are multiply-adds of matrix products and convolutions (the papers' "FLOPs").
Activations are what differentiation keeps of one image's forward pass, in float32;
the compiler may keep less.

  vit_jax summarize --model=ConViT-S/16
  vit_jax summarize --model=ViT-B/8 --image_size=64,96 --json
  vit_jax summarize --zoo
"""

# What is summarised where the options do not say it.
DEFAULTS = {'model': None, 'image_size': '224', 'channels': 3, 'num_classes': 1000}
COLUMNS = [
    'model',
    'image',
    'classes',
    'parameters',
    'MACs',
    'top-1',
    'compared',
    'weights',
]


def main(argv: Sequence[str]) -> None:
    parser = options.make_parser(
        'summarize',
        'Parameters, MACs and activation memory per block; or the published weights.',
        epilog=EPILOG,
    )
    parser.add_argument('--model', help='name, or my_fork.nets:Net')
    parser.add_argument(
        '--zoo',
        action='store_true',
        help='the weights that others published, as a Markdown table: a minute',
    )
    parser.add_argument('--image_size', help='side, or height,width (default 224)')
    parser.add_argument('--channels', type=options.positive, help='default 3')
    parser.add_argument('--num_classes', type=options.positive, help='default 1000')
    parser.add_argument('--json', action='store_true', help='JSON instead of a table')
    args = options.parse_strict(parser, argv)

    if args.model is None and not args.zoo:
        parser.error('the following arguments are required: --model or --zoo')
    for option, default in DEFAULTS.items():
        if getattr(args, option) is None:
            setattr(args, option, default)
        elif args.zoo:
            raise UserError(f'--zoo takes no --{option}: each row has its own')
    size = _parse_size(args.image_size)
    options.quiet()
    if args.zoo:
        _print_zoo(args.json)
    else:
        _print_blocks(args.model, (*size, args.channels), args.num_classes, args.json)


def _print_blocks(
    name: str, shape: tuple[int, int, int], num_classes: int, as_json: bool
) -> None:
    from vit_jax.models import build_model
    from vit_jax.summary import summarize, total

    costs = summarize(build_model(name, num_classes), shape)
    rows = {**costs, 'total': total(costs)}
    if as_json:
        print(
            json.dumps({name: cost._asdict() for name, cost in rows.items()}, indent=2)
        )
        return
    print(f'{name} at {shape[0]}x{shape[1]}x{shape[2]}, one image')
    width = max(map(len, rows))
    print(f'{"block":{width}} {"parameters":>13} {"MACs":>9} {"activations":>12}')
    for block, cost in rows.items():
        print(
            f'{block:{width}} {cost.params:13,} {_si(cost.macs):>9} '
            f'{cost.activation_bytes / 2**20:8.2f} MiB'
        )


def _print_zoo(as_json: bool) -> None:
    from vit_jax.pretrained.zoo import SOURCES

    if as_json:
        print(json.dumps(list(_zoo()), indent=2))
        return
    print(_line(COLUMNS))
    print(_line(['---'] * len(COLUMNS)))
    for row in _zoo():
        cells = [
            row['model'],
            f'{row["image_size"]}²',
            f'{row["num_classes"]:,}' if row['num_classes'] else 'features',
            _si(row['params']),
            _si(row['macs']),
            f'{row["top1"]:g} ({row["source"]})' if row['source'] else '–',
            row['compared'] or 'no',
            '<br>'.join(f'`{address}`' for address in row['addresses']),
        ]
        print(_line(cells), flush=True)
    sources = '; '.join(f'{name}: {where}' for name, where in SOURCES.items())
    print(f"\nTop-1: per cent of ImageNet's validation set, as measured by {sources}.")
    print(
        'Compared: the implementation whose logits, or features, are the same on the '
        'same random weights.'
    )


def _line(cells: Sequence[str]) -> str:
    return f'| {" | ".join(cells)} |'


def _zoo() -> Iterator[dict[str, Any]]:
    """A row of published weights after the other, with what its model costs."""
    from vit_jax.models import build_model
    from vit_jax.pretrained.zoo import COMPARED, ZOO
    from vit_jax.summary import count

    @functools.cache
    def cost(name: str, num_classes: int | None, side: int, **kwargs: Any):
        return count(build_model(name, num_classes, **kwargs), (side, side, 3))

    for row in ZOO:
        params, macs = cost(row.model, row.num_classes, row.image_size, **row.kwargs)
        yield {
            'model': row.model,
            'image_size': row.image_size,
            'num_classes': row.num_classes,
            'params': params,
            'macs': macs,
            'top1': row.top1,
            'source': row.source,
            'compared': COMPARED.get(row.model),
            'addresses': list(row.addresses),
        }


def _parse_size(text: str) -> tuple[int, int]:
    sides = text.split(',')
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(f'--image_size is 224 or 224,320 (height,width), not {text!r}')
    return int(sides[0]), int(sides[-1])


def _si(number: float) -> str:
    for unit in ('', 'k', 'M', 'G'):
        if number < 1000:
            return f'{number:.4g}{unit}'
        number /= 1000
    return f'{number:.4g}T'
