"""Trained models that a run looks at but does not train: a teacher, a judge."""

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.image_data import ImageData
from vit_jax.modules import make_stored_model
from vit_jax.pretrained import load_variables
from vit_jax.pretrained.classes import check_classes
from vit_jax.pretrained.load import Placement
from vit_jax.pretrained.metadata import is_complete
from vit_jax.pretrained.published import find_published
from vit_jax.pretrained.source import open_source
from vit_jax.typing import Shape, Variables


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A classifier that is not trained here, without its variables.

    Attributes:
      role: what it is to the run, such as 'teacher'.
      path: of the weights, see `load_variables`.
      model: the Flax module.
      image_shape: (height, width, channels) of the run's images.
      mean, std: of the pixels that it was trained with, in [0, 1].
      grid: of the positions in the weights, where it is known.
    """

    role: str
    path: str
    model: nn.Module
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    grid: Shape | None = None

    @property
    def shapes(self) -> Any:
        """Shapes and dtypes of its variables."""
        image = jnp.zeros((1, *self.image_shape))
        return jax.eval_shape(
            lambda: self.model.init({'params': jax.random.key(0)}, image, train=False)
        )

    def load(self, sharding: Placement = None) -> Variables:
        """Its variables, learned positions resized to the run's images.

        Args:
          sharding: see `load_variables`.

        Raises:
          UserError: for weights that cannot be read, or do not fit its model.
        """
        variables, report = load_variables(
            self.path,
            self.model,
            self.image_shape[:2],
            channels=self.image_shape[2],
            grid=self.grid,
            sharding=sharding,
        )
        print(f'{self.role}: {report.summary()}', file=sys.stderr)
        return variables


def find_frozen(role: str, path: str, images: ImageData) -> Frozen:
    """The classifier behind a path; none of its arrays is read.

    Args:
      role: see `Frozen`.
      path: of the weights.
      images: what it is to see.

    Raises:
      UserError: for one that is not there, does not say what it is, or knows other
        classes or images.
    """
    # What is known of published weights is known before they are fetched.
    metadata = find_published(path)
    if metadata is None:
        source = open_source(path)
        metadata = source.metadata
        if source.step is not None and os.path.exists(path):  # not 'workdir@step'
            path = f'{path}@{source.step}'  # it stays, its run may go on
    if metadata is None or not is_complete(metadata, 'model', 'preprocessing'):
        raise UserError(
            f'the {role} {path} does not say which model it is of; take a workdir, an '
            'exported folder or an address that `vit_jax summarize --zoo` lists, or '
            'convert it with --like'
        )
    about, seen = metadata['model'], metadata['preprocessing']
    check_fits(f'the {role} {path}', metadata, images)
    frozen = Frozen(
        role=role,
        path=path,
        model=make_stored_model(about, path),
        image_shape=images.image_shape,
        mean=tuple(seen['mean']),
        std=tuple(seen['std']),
        grid=tuple(about['grid']) if 'grid' in about else None,
    )
    try:
        _ = frozen.shapes
    except UserError as error:  # patches that do not divide the images
        raise UserError(f'the {role} {path} does not fit here: {error}') from error
    return frozen


def check_fits(name: str, metadata: Mapping[str, Any], images: ImageData) -> None:
    """Raises UserError for a classifier of other classes or other images.

    Args:
      name: of the classifier, in errors.
      metadata: what its weights say of themselves.
      images: what it is to see.
    """
    num_classes = metadata['model']['num_classes']
    names, channels = images.dataset.class_names, images.image_shape[2]
    if num_classes is None:
        raise UserError(f'{name} has no classifier, only features; fine-tune it first')
    if num_classes != len(names):
        raise UserError(
            f'{name} knows {num_classes} classes, the data has {len(names)}'
        )
    check_classes(name, metadata, names)
    if metadata['preprocessing']['channels'] != channels:
        raise UserError(
            f'{name} sees images of {metadata["preprocessing"]["channels"]} '
            f'channel(s), those of the data have {channels}'
        )
