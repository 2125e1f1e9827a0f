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


def add_arguments(parser: argparse.ArgumentParser, nargs: str = '+') -> None:
    """Adds IMAGE..., as many as `nargs`, --convert_channels, and --weights."""
    parser.add_argument(
        'images', nargs=nargs, metavar='IMAGE', help='JPEG, PNG or WebP'
    )
    add_weights(parser)
    parser.add_argument(
        '--convert_channels',
        action='store_true',
        help='make grey images RGB, or coloured ones grey, as the model needs',
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Adds --weights and --like."""
    parser.add_argument(
        '--weights',
        required=True,
        help='workdir of a run, exported folder, weight file, or an address such as '
        'hf:timm/convit_tiny.fb_in1k',
    )
    add_like(parser)


def add_like(parser: argparse.ArgumentParser) -> None:
    """Adds --like."""
    parser.add_argument(
        '--like',
        metavar='WEIGHTS',
        help='where model, classes and preprocessing of the file are known: published '
        'weights that it is a copy of, or the workdir it comes from',
    )


def load(args: argparse.Namespace) -> tuple[Trained, list[np.ndarray]]:
    """What the arguments name.

    Returns:
      The model, and the images as it was evaluated on them, uint8 `[h, w, c]` each.

    Raises:
      UserError: for images or weights that are not there, damaged, or do not fit.
    """
    check_images(args)
    options.quiet()
    metadata = read_metadata(args)
    pixels = read_images(args, metadata)
    return _restore(args.weights, metadata), pixels


def check_images(args: argparse.Namespace) -> None:
    """Raises UserError for an image that is not there, before anything takes time."""
    for image in args.images:
        if not pathlib.Path(image).is_file():
            raise UserError(f'no such image: {image}')


def read_metadata(args: argparse.Namespace) -> dict[str, Any]:
    """What the weights say of themselves.

    Raises:
      UserError: when they say nothing, and --like does not either.
    """
    from vit_jax.pretrained.metadata import is_complete
    from vit_jax.pretrained.source import open_source

    if args.like:
        return read_like(args.like, 'model', 'preprocessing')
    metadata = open_source(args.weights).metadata
    if metadata is not None and 'text' in metadata:
        raise UserError(
            f'{args.weights} is of a model of sentences; `vit_jax translate` runs it, '
            '`vit_jax attend --source=SENTENCE` shows where it attends'
        )
    if metadata is None or not is_complete(metadata, 'model', 'preprocessing'):
        raise UserError(
            f'{args.weights} does not say which model it is of; name the published '
            'weights that it is a copy of (`vit_jax summarize --zoo` lists them), or '
            'the workdir it comes from, by --like'
        )
    return metadata


def read_like(like: str, *sections: str) -> dict[str, Any]:
    """What the weights of --like say of themselves; nothing is downloaded for that.

    Args:
      like: an address of published weights, or what --weights takes.
      sections: of the metadata, without which they are of no use.

    Raises:
      UserError: when they say too little.
    """
    from vit_jax.pretrained.fetch import is_address
    from vit_jax.pretrained.metadata import is_complete
    from vit_jax.pretrained.published import find_published
    from vit_jax.pretrained.source import open_source

    metadata = find_published(like)
    if metadata is None and is_address(like):
        raise UserError(
            f'--like={like} is no address of published weights; '
            '`vit_jax summarize --zoo` lists them'
        )
    metadata = metadata or open_source(like).metadata
    if metadata is None or not is_complete(metadata, *sections):
        raise UserError(
            f'--like={like} does not say which model it is of; take an address that '
            '`vit_jax summarize --zoo` lists, or a workdir'
        )
    return metadata


def read_images(args: argparse.Namespace, metadata: dict[str, Any]) -> list[np.ndarray]:
    """The images, decoded and cropped as the weights want them."""
    from vit_jax.data.transforms import center_crop, decode_image
    from vit_jax.pretrained.damage import reading

    about = metadata['preprocessing']
    size = tuple(about['image_size'])

    def read(path: str) -> np.ndarray:
        with reading(path):
            data = pathlib.Path(path).read_bytes()
        image = decode_image(data, about['channels'], path, args.convert_channels)
        return center_crop(image, size, about['crop_fraction'], about['interpolation'])

    return [read(path) for path in args.images]


def read_class_names(weights: str, metadata: dict[str, Any]) -> list[str]:
    """Names by class number.

    Raises:
      UserError: when the weights have no classifier.
    """
    from vit_jax.models.variants import is_generative_model
    from vit_jax.pretrained.metadata import default_class_names

    if is_generative_model(metadata['model']['name']):
        raise UserError(
            f'{weights} is of a model that makes images and knows no classes'
        )
    if metadata['model']['num_classes'] is None:
        raise UserError(
            f'{weights} has no classifier, only features; fine-tune it first: '
            f'--config.init.weights={weights} --config.init.new_head=True'
        )
    names = metadata.get('class_names')
    return names or default_class_names(metadata['model']['num_classes'])


def _restore(weights: str, metadata: dict[str, Any]) -> Trained:
    from vit_jax.export import load_model
    from vit_jax.tasks.classify import normalize

    names = read_class_names(weights, metadata)
    model, variables, _ = load_model(weights, metadata)
    about = metadata['preprocessing']
    mean, std = tuple(about['mean']), tuple(about['std'])
    return Trained(model, variables, partial(normalize, mean=mean, std=std), names)
