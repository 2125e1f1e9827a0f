"""A trained model and image files: what `predict` and `attend` share."""

import argparse
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from vit_jax.commands import options
from vit_jax.errors import UserError
from vit_jax.typing import Array, Variables


class Trained(NamedTuple):
    """A model with its weights.

    Attributes:
      model, variables: for `model.apply`.
      normalize: uint8 images `[B, h, w, c]` to what the model takes.
      class_names: by class number.
    """

    model: nn.Module
    variables: Variables
    normalize: Callable[[Array], Array]
    class_names: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds IMAGE..., --weights and --convert_channels."""
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='JPEG, PNG or WebP')
    parser.add_argument('--weights', required=True, help='workdir of a run')
    parser.add_argument(
        '--convert_channels',
        action='store_true',
        help='make grey images RGB, or coloured ones grey, as the model needs',
    )


def load(args: argparse.Namespace) -> tuple[Trained, list[np.ndarray]]:
    """What the arguments name.

    Returns:
      The model, and the images as it was evaluated on them, uint8 `[h, w, c]` each.

    Raises:
      UserError: for images or weights that are not there, damaged, or do not fit.
    """
    for image in args.images:
        if not pathlib.Path(image).is_file():
            raise UserError(f'no such image: {image}')

    options.quiet()
    from vit_jax.checkpoint import load_metadata

    workdir = pathlib.Path(args.weights)
    step, metadata = load_metadata(workdir)
    about = metadata['preprocessing']
    pixels = [_read(image, about, args.convert_channels) for image in args.images]
    return _restore(workdir, step, metadata), pixels


def _read(path: str, preprocessing: dict[str, Any], convert: bool) -> np.ndarray:
    from vit_jax.data.transforms import center_crop, decode_image

    data = pathlib.Path(path).read_bytes()
    image = decode_image(data, preprocessing['channels'], path, convert)
    size = tuple(preprocessing['image_size'])
    return center_crop(image, size, preprocessing['crop_fraction'])


def _restore(workdir: pathlib.Path, step: int, metadata: dict[str, Any]) -> Trained:
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from vit_jax.build import make_model
    from vit_jax.checkpoint import restore_variables, shapes_on
    from vit_jax.tasks.classify import Settings, normalize

    about, preprocessing = metadata['model'], metadata['preprocessing']
    model = make_model(
        about['name'], about['num_classes'], about['dtype'], about['kwargs']
    )
    shape = (1, *preprocessing['image_size'], preprocessing['channels'])
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    variables = restore_variables(workdir, step, shapes_on(sharding, like))
    settings = Settings(tuple(preprocessing['mean']), tuple(preprocessing['std']))
    names = metadata['class_names']
    return Trained(model, variables, partial(normalize, settings=settings), names)
