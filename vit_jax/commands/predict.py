"""vit_jax predict"""

import argparse
import json
from collections.abc import Callable, Sequence

import numpy as np

from vit_jax.commands import options, trained
from vit_jax.typing import Array, Variables

EPILOG = """\
Preprocessing and class names are those stored with the weights. An exported folder
runs without the code of the model.

  vit_jax predict --weights=/tmp/digits seven.png
  vit_jax predict --weights=hf:timm/convit_tiny.fb_in1k cat.jpg --json
"""

Classifier = Callable[[np.ndarray], np.ndarray]

TOP = 5
BATCH_SIZE = 64


def main(argv: Sequence[str]) -> None:
    parser = options.make_parser(
        'predict', 'The likeliest classes of images, with probabilities.', epilog=EPILOG
    )
    trained.add_arguments(parser)
    parser.add_argument('--json', action='store_true', help='a JSON object per image')
    args = options.parse_strict(parser, argv)

    classify, names, pixels = _load(args)
    for start in range(0, len(pixels), BATCH_SIZE):
        probabilities = classify(np.stack(pixels[start : start + BATCH_SIZE]))
        for image, row in zip(args.images[start:], probabilities):
            best = np.argsort(-row, kind='stable')[:TOP]
            _print(image, [(names[i], float(row[i])) for i in best], args.json)


def _load(
    args: argparse.Namespace,
) -> tuple[Classifier, list[str], list[np.ndarray]]:
    """uint8 images `[B, h, w, c]` -> probabilities `[B, V]`; classes; the images."""
    trained.check_images(args)
    options.quiet()
    import jax

    from vit_jax.export import is_exported, load_exported

    if is_exported(args.weights) and not args.like:  # it runs on its own
        exported = load_exported(args.weights)
        names = trained.read_class_names(args.weights, exported.metadata)
        pixels = trained.read_images(args, exported.metadata)
        variables, program = exported.variables, exported.program
    else:
        found, pixels = trained.load(args)
        names, variables = found.class_names, found.variables

        def program(variables: Variables, images: Array) -> Array:
            images = found.normalize(images)
            return found.model.apply(variables, images)  # type: ignore[return-value]

    classify = jax.jit(lambda *inputs: jax.nn.softmax(program(*inputs)))
    return lambda images: np.asarray(classify(variables, images)), names, pixels


def _print(image: str, best: list[tuple[str, float]], as_json: bool) -> None:
    if as_json:
        classes = [{'class': name, 'probability': p} for name, p in best]
        print(json.dumps({'image': image, 'classes': classes}))
    else:
        print(f'{image}  ' + '  '.join(f'{name} {100 * p:.2f}%' for name, p in best))
