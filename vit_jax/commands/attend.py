"""vit_jax attend"""

import argparse
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vit_jax.commands import attend_text, options, trained
from vit_jax.commands.layer_files import choose, file_name, save
from vit_jax.errors import UserError
from vit_jax.typing import Array

if TYPE_CHECKING:  # --help is quick
    from vit_jax.maps import AttentionMaps, LayerMaps, Query, View

EPILOG = """\
Of images, in DIR a folder per image holds
  image.png          the image as the model sees it
  <layer>.png        where each head attends, on one colour scale, and their mean
  rollout.png        attention through all layers (arXiv 2005.00928); patch models
  pool.png           where the query of pool='map' attends
and beside these folders lie
  non_locality.png   how far each layer looks (arXiv 2103.10697), mean of the images,
                     in cells of its grid: a line per grid
  gates.txt          the share of position in each head of the GPSA layers

Shown is what the class token attends to; in a layer without one, what the centre
patch does (framed). --query=ROW,COLUMN shows what that patch attends to in every
layer, from 0,0 at the top left; --query=mean the mean over all patches. A module
that is called again is a layer again, such as block00#2.

Of a sentence, DIR holds
  <layer>.png          where each head attends, token to token, and their mean:
                       encoder, decoder (grey: tokens that come later) and cross
  cross_attention.png  from target to source in each layer, mean of the heads
A row of the target is where the model says that token. With --target the model is
given that translation; else it is its own.

  vit_jax attend --weights=/tmp/digits seven.png --out=/tmp/maps
  vit_jax attend --weights=/tmp/digits seven.png --out=/tmp/maps --layers=block03
  vit_jax attend --weights=/tmp/multi30k --source='A dog runs.' --out=/tmp/maps
"""


def main(argv: Sequence[str]) -> None:
    parser = options.make_parser(
        'attend',
        'Where a model attends in images or sentences, as pictures.',
        epilog=EPILOG,
    )
    trained.add_arguments(parser, nargs='*')
    parser.add_argument('--source', metavar='SENTENCE', help='instead of images')
    parser.add_argument(
        '--target', metavar='SENTENCE', help="its translation (the model's own, greedy)"
    )
    parser.add_argument('--out', required=True, metavar='DIR', help='made if need be')
    parser.add_argument('--layers', help='such as block00,rollout; default all')
    parser.add_argument('--query', help="ROW,COLUMN of a patch, or 'mean'")
    args = options.parse_strict(parser, argv)
    query = _parse_query(args.query)
    _check(args)
    if args.source is not None:
        attend_text.draw(args)
    else:
        _draw_images(args, query)


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for options of images with sentences, and the like."""
    if args.source is None:
        if args.target is not None:
            raise UserError('--target is a translation of --source; give that too')
        if not args.images:
            raise UserError(
                'attend needs images; or --source=SENTENCE, of a model of sentences'
            )
        return
    if args.images:
        raise UserError(
            f'attend draws images or --source, not both; leave {args.images[0]} out'
        )
    for name in ('query', 'like', 'convert_channels'):
        if getattr(args, name):
            raise UserError(f'--{name} is for images; leave it out beside --source')


def _draw_images(args: argparse.Namespace, query: 'Query') -> None:
    found, images = trained.load(args)
    import jax

    from vit_jax.maps import attention_maps

    @jax.jit
    def run(variables, images):
        return attention_maps(found.model, variables, found.normalize(images))

    # Registers stand before the patches too: not every first token is a class token.
    class_token = getattr(found.model, 'pool', 'cls') == 'cls'
    out, distances = pathlib.Path(args.out), []
    for folder, pixels in zip(_folders(args.images), images):
        # One image at a time: the maps of a large model fill the memory.
        maps = jax.device_get(run(found.variables, pixels[None]))
        views = _views(maps, args.layers, query, class_token)
        predicted = found.class_names[int(np.argmax(maps.logits))]
        _write_image(out / folder, pixels, views, f'predicted: {predicted}')
        distances.append([layer.non_locality[0] for layer in maps.layers])
    _write_layers(out, maps.layers, [np.mean(each, axis=0) for each in zip(*distances)])


def _parse_query(text: str | None) -> 'Query':
    if text is None or text == 'mean':
        return text
    if not re.fullmatch(r'\d+,\d+', text):
        raise UserError(f"--query is ROW,COLUMN such as 1,2, or 'mean', not {text!r}")
    row, column = map(int, text.split(','))
    return row, column


def _folders(images: Sequence[str]) -> list[str]:
    """A name for each image's folder: that of the file, numbered where it recurs."""
    names: list[str] = []
    for image in images:
        name, number = pathlib.Path(image).stem, 1
        while name in names:
            number += 1
            name = f'{pathlib.Path(image).stem}_{number}'
        names.append(name)
    return names


def _views(
    maps: 'AttentionMaps', chosen: str | None, query: 'Query', class_token: bool
) -> 'dict[str, View]':
    """What there is to draw of one image, by name."""
    from vit_jax.maps import view

    found = maps.by_name
    names = choose(found, chosen)
    return {name: view(found[name], query, class_token) for name in names}


def _write_image(
    folder: pathlib.Path, pixels: np.ndarray, views: 'dict[str, View]', predicted: str
) -> None:
    """The pictures of one image."""
    from vit_jax.pictures import draw_image, draw_sheet

    save(folder / 'image.png', draw_image(pixels))
    for name, view in views.items():
        title = f'{folder.name}, {name}: where {view.query} attends\n{predicted}'
        heat = np.asarray(view.maps)
        figure = draw_sheet(pixels, heat, title, view.cell, view.grid)
        save(folder / f'{file_name(name)}.png', figure)


def _write_layers(
    out: pathlib.Path, layers: Sequence['LayerMaps'], distances: list[np.ndarray]
) -> None:
    """What is told of layers, not of images."""
    from vit_jax.pictures import draw_non_locality

    names = [layer.name for layer in layers]
    grids = [layer.grid for layer in layers]
    save(out / 'non_locality.png', draw_non_locality(names, distances, grids))
    gates = {layer.name: layer.gates for layer in layers if layer.gates is not None}
    if gates:
        save(out / 'gates.txt', format_gates(gates))


def format_gates(gates: dict[str, Array]) -> str:
    """A row per layer: each head's gate, and their mean."""
    width = max(map(len, gates))
    heads = max(map(len, gates.values()))
    lines = [f'{"layer":{width}}   mean' + ''.join(f'{n:7}' for n in range(heads))]
    for name, values in gates.items():
        numbers = [np.mean(values), *values]
        lines.append(f'{name:{width}}' + ''.join(f'{x:7.3f}' for x in numbers))
    return '\n'.join(lines) + '\n'
