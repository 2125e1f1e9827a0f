"""vit_jax predict"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vit_jax.commands import options
from vit_jax.errors import UserError

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
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='JPEG, PNG or WebP')
    parser.add_argument('--weights', required=True, help='workdir of a run')
    parser.add_argument('--json', action='store_true', help='a JSON object per image')
    parser.add_argument(
        '--convert_channels',
        action='store_true',
        help='make grey images RGB, or coloured ones grey, as the model needs',
    )
    args = options.parse_strict(parser, argv)
    for image in args.images:
        if not pathlib.Path(image).is_file():
            raise UserError(f'no such image: {image}')

    options.quiet()
    from vit_jax.checkpoint import load_metadata

    workdir = pathlib.Path(args.weights)
    step, metadata = load_metadata(workdir)
    pixels = [
        _read(image, metadata['preprocessing'], args.convert_channels)
        for image in args.images
    ]
    classify = _load_classifier(workdir, step, metadata)
    names = metadata['class_names']
    for start in range(0, len(pixels), BATCH_SIZE):
        probabilities = classify(np.stack(pixels[start : start + BATCH_SIZE]))
        for image, row in zip(args.images[start:], probabilities):
            best = np.argsort(-row, kind='stable')[:TOP]
            _print(image, [(names[i], float(row[i])) for i in best], args.json)


def _read(path: str, preprocessing: dict[str, Any], convert: bool) -> np.ndarray:
    from vit_jax.data.transforms import center_crop, decode_image

    data = pathlib.Path(path).read_bytes()
    image = decode_image(data, preprocessing['channels'], path, convert)
    size = tuple(preprocessing['image_size'])
    return center_crop(image, size, preprocessing['crop_fraction'])


def _load_classifier(
    workdir: pathlib.Path, step: int, metadata: dict[str, Any]
) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 images `[B, h, w, c]` -> probabilities `[B, V]`."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from vit_jax.build import make_model
    from vit_jax.checkpoint import restore_variables, shapes_on
    from vit_jax.tasks.classify import Settings, normalize
    from vit_jax.typing import Array

    about, preprocessing = metadata['model'], metadata['preprocessing']
    model = make_model(
        about['name'], about['num_classes'], about['dtype'], about['kwargs']
    )
    shape = (1, *preprocessing['image_size'], preprocessing['channels'])
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    variables = restore_variables(workdir, step, shapes_on(sharding, like))
    settings = Settings(tuple(preprocessing['mean']), tuple(preprocessing['std']))

    @jax.jit
    def classify(variables, images):
        logits: Array = model.apply(variables, normalize(images, settings))  # type: ignore
        return jax.nn.softmax(logits)

    return lambda images: np.asarray(classify(variables, images))


def _print(image: str, best: list[tuple[str, float]], as_json: bool) -> None:
    if as_json:
        classes = [{'class': name, 'probability': p} for name, p in best]
        print(json.dumps({'image': image, 'classes': classes}))
    else:
        print(f'{image}  ' + '  '.join(f'{name} {100 * p:.2f}%' for name, p in best))
