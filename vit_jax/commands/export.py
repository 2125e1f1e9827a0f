"""vit_jax export"""

import pathlib
import sys
from collections.abc import Sequence

from vit_jax.commands import options, trained

EPILOG = """\
DST becomes a folder of three files:
  model.safetensors   the weights
  metadata.json       model, classes, preprocessing
  program.bin         uint8 images of any number -> logits, for CPU, GPU and TPU
`predict --weights=DST` runs it without the config and without the model's code;
`convert`, `evaluate` and config.init.weights take it as any other weights.

  vit_jax export /tmp/digits /tmp/digits_exported
  vit_jax export hf:timm/convit_tiny.fb_in1k /tmp/convit_tiny
"""


def main(argv: Sequence[str]) -> None:
    parser = options.make_parser(
        'export', 'A trained model as a folder that runs on its own.', epilog=EPILOG
    )
    parser.add_argument(
        'weights', metavar='WEIGHTS', help='workdir, weight file, or an address'
    )
    parser.add_argument('dst', metavar='DST')
    trained.add_like(parser)
    parser.add_argument('--force', action='store_true', help='replace such a folder')
    args = options.parse_strict(parser, argv)

    options.quiet()
    from vit_jax.export import export
    from vit_jax.pretrained.convert import check_free

    check_free(pathlib.Path(args.dst), args.force)  # before anything is downloaded
    report = export(args.weights, args.dst, trained.read_metadata(args), args.force)
    print(report.summary(), file=sys.stderr)
    print(f'wrote {args.dst}', file=sys.stderr)
