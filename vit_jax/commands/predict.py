"""vit_jax predict"""

import json
from collections.abc import Callable, Sequence

import numpy as np

from vit_jax.commands import options, trained
from vit_jax.typing import Array

EPILOG = """\
Preprocessing and class names are those stored with the weights.

  vit_jax predict --weights=/tmp/digits seven.png
"""

TOP = 5
BATCH_SIZE = 64


def main(argv: Sequence[str]) -> None:
    parser = options.make_parser(
        'predict', 'The likeliest classes of images, with probabilities.', epilog=EPILOG
    )
    trained.add_arguments(parser)
    parser.add_argument('--json', action='store_true', help='a JSON object per image')
    args = options.parse_strict(parser, argv)

    found, pixels = trained.load(args)
    classify, names = _make_classifier(found), found.class_names
    for start in range(0, len(pixels), BATCH_SIZE):
        probabilities = classify(np.stack(pixels[start : start + BATCH_SIZE]))
        for image, row in zip(args.images[start:], probabilities):
            best = np.argsort(-row, kind='stable')[:TOP]
            _print(image, [(names[i], float(row[i])) for i in best], args.json)


def _make_classifier(found: trained.Trained) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 images `[B, h, w, c]` -> probabilities `[B, V]`."""
    import jax

    @jax.jit
    def classify(variables, images):
        images = found.normalize(images)
        logits: Array = found.model.apply(variables, images)  # type: ignore
        return jax.nn.softmax(logits)

    return lambda images: np.asarray(classify(found.variables, images))


def _print(image: str, best: list[tuple[str, float]], as_json: bool) -> None:
    if as_json:
        classes = [{'class': name, 'probability': p} for name, p in best]
        print(json.dumps({'image': image, 'classes': classes}))
    else:
        print(f'{image}  ' + '  '.join(f'{name} {100 * p:.2f}%' for name, p in best))
