"""vit_jax convert"""

import argparse
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vit_jax.commands import options, trained
from vit_jax.errors import UserError, some, times
from vit_jax.typing import Shape

if TYPE_CHECKING:  # --help is quick
    import flax.linen as nn

    from vit_jax.pretrained.source import Source

EPILOG = """\
SRC is what --weights of other commands takes: a workdir, an exported folder, a file of
any format, an address. What DST ends in says what is written:
  .npz                    Google's names and layouts (ViT, hybrids, BiT)
  .safetensors, .pth      those of timm (ViT, ConViT, hybrids, BiT) and torchvision
                          (ResNet); safetensors keeps classes and preprocessing too
  nothing                 a folder of this project, for any model

The model is what SRC says it is; else that of --like, the published weights of which it
is a copy; else --model. Every number stays as it is: positions are not resized, half
precision becomes float32, which holds every value of it. float64 is rounded to float32,
with a warning where that changes numbers.

  vit_jax convert /tmp/digits digits.safetensors
  vit_jax convert hf:timm/convit_tiny.fb_in1k /tmp/convit_tiny
  vit_jax convert mine.npz mine.pth --model=ViT-B/16
"""


def main(argv: Sequence[str]) -> None:
    parser = options.make_parser(
        'convert', 'Weights from one format to another, exactly.', epilog=EPILOG
    )
    parser.add_argument('src', metavar='SRC')
    parser.add_argument('dst', metavar='DST')
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        '--like',
        metavar='WEIGHTS',
        help='published weights that SRC is a copy of, or the workdir it is from',
    )
    which.add_argument('--model', help='name of the model, where SRC does not tell')
    parser.add_argument(
        '--grid',
        metavar='ROWSxCOLUMNS',
        help="of SRC's positions, where it does not tell and they are of no square",
    )
    parser.add_argument(
        '--image_size',
        metavar='HEIGHTxWIDTH',
        help='of the images, where the variables depend on it beyond the positions',
    )
    parser.add_argument(
        '--channels', type=options.positive, help='of the images (default 3)'
    )
    parser.add_argument('--force', action='store_true', help='overwrite DST')
    args = options.parse_strict(parser, argv)
    given, image_size = (_parse_size(args, name) for name in ('grid', 'image_size'))

    options.quiet()
    from vit_jax.modules import make_model, make_stored_model
    from vit_jax.pretrained import convert, load_variables
    from vit_jax.pretrained.source import open_source

    dst = pathlib.Path(args.dst)
    if dst.suffix and dst.suffix not in convert.NAMINGS:
        raise UserError(
            f'DST {dst} ends in {dst.suffix!r}; let it end in one of '
            f'{", ".join(convert.NAMINGS)}, or in nothing for a folder'
        )
    convert.check_free(dst, args.force)
    source = open_source(args.src)
    metadata = _read_metadata(args, source)
    if 'text' in metadata:
        raise UserError(
            f'{args.src} is of a model of sentences, which is not converted; '
            '`vit_jax translate` runs it'
        )
    about, preprocessing = metadata['model'], metadata.get('preprocessing', {})
    grid = _choose_grid(args, source, about, given)
    channels = args.channels or preprocessing.get('channels', 3)
    if args.model:
        model = make_model(args.model, about['num_classes'], about['dtype'], {})
    else:
        model = make_stored_model(about, args.src)
    if dst.suffix:
        _check_fields(model)
    size = image_size or _find_size(source, model, preprocessing, channels, grid)
    variables, report = load_variables(
        source, model, size, channels=channels, grid=grid
    )
    for path, sizes in report.resized.items():
        raise UserError(
            f'{path} would be resized, {sizes}, and `convert` changes no number: leave '
            '--image_size out'
        )

    metadata = convert.with_grid(metadata, variables)
    metadata.pop('program', None)  # an exported one stays behind
    if dst.suffix:
        renamed = convert.to_published(variables, dst.suffix)
        convert.write_file(dst, renamed, metadata)
        notes = [*renamed.notes, *_note_fields(model, dst.suffix)]
    else:
        arrays, notes = convert.to_arrays(variables), []
        renamed = convert.Renamed("this project's own names", arrays, notes)
        convert.write_folder(dst, arrays, metadata, force=args.force)
    wrote = f'wrote {dst}: {len(renamed.arrays)} arrays ({renamed.format})'
    lines = (report.summary(), *_note_rounding(source), *notes, wrote)
    print(*lines, sep='\n', file=sys.stderr)


def _parse_size(args: argparse.Namespace, name: str) -> tuple[int, int] | None:
    text = getattr(args, name)
    if text is None:
        return None
    match = re.fullmatch(r'([1-9]\d*)(?:[x,]([1-9]\d*))?', text)
    if match is None:
        raise UserError(f'--{name} is 14 or 14x20 (height x width), not {text!r}')
    return int(match[1]), int(match[2] or match[1])


def _read_metadata(args: argparse.Namespace, source: 'Source') -> dict[str, Any]:
    """What is known of the weights; at least of which model they are."""
    from vit_jax.pretrained.convert import count_classes
    from vit_jax.pretrained.metadata import is_complete

    if args.model:
        name, num_classes = args.model, count_classes(source)
        about = {'name': name, 'num_classes': num_classes, 'dtype': 'float32'}
        return {'model': {**about, 'kwargs': {}}}
    if args.like:
        return trained.read_like(args.like, 'model')
    metadata = source.metadata
    if metadata is not None and is_complete(metadata, 'model'):
        return metadata
    raise UserError(
        f'{args.src} does not say which model it is of; name it by --model=NAME, or '
        'by --like published weights that it is a copy of, or the workdir it is from'
    )


def _choose_grid(
    args: argparse.Namespace,
    source: 'Source',
    about: Mapping[str, Any],
    given: tuple[int, int] | None,
) -> Shape | None:
    """The grid of the positions in SRC: as it says itself, --grid, or --like."""
    from vit_jax.pretrained.plan import GRID

    if source.native and GRID in source.file.arrays:
        told = source.file.arrays[GRID].shape[:-1]
    else:
        told = tuple((source.metadata or {}).get('model', {}).get('grid', ()))
    if told and given and told != given:
        raise UserError(
            f'--grid={args.grid}, but {args.src} says that the grid of its positions '
            f'is {times(told)}; leave --grid out'
        )
    return told or given or tuple(about.get('grid', ())) or None


def _find_size(
    source: 'Source',
    model: 'nn.Module',
    preprocessing: dict[str, Any],
    channels: int,
    grid: Shape | None,
) -> tuple[int, int]:
    """Height and width of the images whose patches are the positions in the file."""
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import flatten_dict

    from vit_jax.layers.patch import resolve_patch
    from vit_jax.pretrained.plan import GRID, make_plan

    patch = resolve_patch(getattr(model, 'patch_size', 1), 2)
    height, width = preprocessing.get('image_size', (224 // p * p for p in patch))
    image = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    leaves = flatten_dict(shapes, sep='/')
    plan = make_plan(source, leaves, grid=grid)
    if GRID not in plan.resized:
        return height, width
    rows, cols = plan.resized[GRID][0]
    return rows * patch[0], cols * patch[1]


def _check_fields(model: 'nn.Module') -> None:
    """Raises UserError for a model that the readers of other formats do not have."""
    posemb = getattr(model, 'posemb', 'learned')
    if posemb != 'learned':
        raise UserError(
            f"posemb={posemb!r} has no weights, and timm and Google's code would miss "
            'positions in the file; keep it as a folder: let DST end in nothing'
        )
    if getattr(model, 'distilled', False) and getattr(model, 'num_registers', 0):
        raise UserError(
            'timm has no model with both a distillation token and registers; keep it '
            'as a folder: let DST end in nothing'
        )


def _note_fields(model: 'nn.Module', suffix: str) -> Iterator[str]:
    """Fields of the model that its reader must be told, for names do not."""
    if not hasattr(model, 'activation'):
        return
    google = suffix == '.npz'
    usual = {
        'activation': 'gelu_tanh' if google else 'gelu',
        'layer_norm_eps': 1e-6,
        'pool': 'cls',
        # Only Google's shapes show the heads.
        'num_heads': model.num_heads if google else None,
        'num_local_layers': None,
    }
    fields = {name: getattr(model, name) for name in usual if hasattr(model, name)}
    told = [
        f'{name}={value!r}{_in_timm(name, value, fields)}'
        for name, value in fields.items()
        if value != usual[name]
    ]
    if told:
        yield f'the names do not tell {", ".join(told)}: its reader must know'
    if getattr(model, 'representation_size', None):
        yield (
            f'pre_logits (representation_size={model.representation_size}) is read by '
            "Google's code and by older versions of timm, not by its newer ones"
        )
    if getattr(model, 'stem', None) == 'resnet':
        eps = {'standardize_eps': 1e-5, **(model.stem_kwargs or {})}['standardize_eps']
        if google and eps != 1e-5:
            yield (
                f'weights are standardised by their deviation + {eps} here, in '
                "Google's code by + 1e-05"
            )
        elif not google and eps:
            yield (
                f'weights are standardised by their deviation + {eps} here, in timm by '
                'sqrt(variance + 1e-8): its outputs differ a little'
            )


def _in_timm(name: str, value: Any, fields: Mapping[str, Any]) -> str:
    """How timm says it, where it does not say the same."""
    if name == 'num_local_layers':
        return f' (timm: local_up_to_layer={value})'
    if (name, value) == ('pool', 'mean') and 'num_local_layers' not in fields:
        return " (timm: global_pool='avg', class_token=False, fc_norm=False)"
    return ''


def _note_rounding(source: 'Source') -> Iterator[str]:
    """Numbers that float32 does not hold; of the shorter dtypes it holds all."""
    import numpy as np

    changed: dict[str, int] = {}
    for name, array in source.file.arrays.items():
        if array.dtype == np.float64:
            x = array.read()
            with np.errstate(over='ignore'):
                count = np.sum((x.astype(np.float32) != x) & ~np.isnan(x))
            if count:
                changed[name] = int(count)
    if changed:
        yield (
            f'warning: {sum(changed.values()):,} numbers of float64 were rounded to '
            f'float32, in {some(list(changed))}'
        )
