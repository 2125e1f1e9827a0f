"""vit_jax summarize"""

import json
from collections.abc import Sequence

from vit_jax.commands import options
from vit_jax.errors import UserError

EPILOG = """\
MACs are multiply-adds of matrix products and convolutions (the papers' "FLOPs").
Activations are what differentiation keeps of one image's forward pass, in float32;
the compiler may keep less.

  vit_jax summarize --model=ConViT-S/16
  vit_jax summarize --model=ViT-B/8 --image_size=64,96 --json
"""


def main(argv: Sequence[str]) -> None:
    parser = options.make_parser(
        'summarize', 'Parameters, MACs and activation memory per block.', epilog=EPILOG
    )
    parser.add_argument('--model', required=True, help='name, or my_fork.nets:Net')
    parser.add_argument(
        '--image_size', default='224', help='side, or height,width (default 224)'
    )
    parser.add_argument(
        '--channels', type=options.positive, default=3, help='default 3'
    )
    parser.add_argument(
        '--num_classes', type=options.positive, default=1000, help='default 1000'
    )
    parser.add_argument('--json', action='store_true', help='JSON instead of a table')
    args = options.parse_strict(parser, argv)
    size = _parse_size(args.image_size)

    options.quiet()
    from vit_jax.models import build_model
    from vit_jax.summary import summarize, total

    model = build_model(args.model, args.num_classes)
    costs = summarize(model, (*size, args.channels))
    rows = {**costs, 'total': total(costs)}
    if args.json:
        print(
            json.dumps({name: cost._asdict() for name, cost in rows.items()}, indent=2)
        )
        return
    print(f'{args.model} at {size[0]}x{size[1]}x{args.channels}, one image')
    width = max(map(len, rows))
    print(f'{"block":{width}} {"parameters":>13} {"MACs":>9} {"activations":>12}')
    for name, cost in rows.items():
        print(
            f'{name:{width}} {cost.params:13,} {_si(cost.macs):>9} '
            f'{cost.activation_bytes / 2**20:8.2f} MiB'
        )


def _parse_size(text: str) -> tuple[int, int]:
    sides = text.split(',')
    if len(sides) > 2 or not all(side.isdigit() and int(side) for side in sides):
        raise UserError(f'--image_size is 224 or 224,320 (height,width), not {text!r}')
    return int(sides[0]), int(sides[-1])


def _si(number: float) -> str:
    for unit in ('', 'k', 'M', 'G'):
        if number < 1000:
            return f'{number:.4g}{unit}'
        number /= 1000
    return f'{number:.4g}T'
