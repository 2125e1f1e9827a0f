"""Features of images: a model without its classifier, row by row on all devices."""

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.axes import gather_rows
from vit_jax.errors import UserError
from vit_jax.parallel import Parallel
from vit_jax.tasks.classify import normalize
from vit_jax.typing import Array, Batch, Variables


def headless(model: nn.Module) -> nn.Module:
    """The model without its classifier: it returns the pooled features `[B, D]`.

    Raises:
      UserError: for a model of a fork that has no such form.
    """
    if not hasattr(model, 'num_classes'):
        raise UserError(
            f'{type(model).__name__} has no field num_classes, by which its classifier '
            'could be left out'
        )
    return model.clone(num_classes=None)


def image_features(
    variables: Variables,
    pixels: Array,
    model: nn.Module,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Array:
    """Features of images.

    Args:
      variables: of the model; those of the classifier are not used.
      pixels: `[B, h, w, c]` uint8.
      model: see `headless`.
      mean, std: of the pixels that it was trained with, in [0, 1].

    Returns:
      What the model gives, `[B, D]` of most, float32.
    """
    images = normalize(pixels, mean, std)
    features: Array = model.apply(variables, images, train=False)  # type: ignore
    return features.astype(jnp.float32)


def compile_rows(
    step: Callable[[Any, Batch], tuple[Array, ...]], parallel: Parallel
) -> Callable:
    """Compiles (variables, batch) -> arrays of its rows, for `collect_rows`.

    Args:
      step: from the rows in sight (`axes`) to arrays of as many rows.
      parallel: how it runs on the devices.
    """
    return parallel.eval_step(
        lambda variables, batch: gather_rows(step(variables, batch))
    )


def collect_rows(
    program: Callable,
    variables: Any,
    batches: Iterable[Batch],
    parallel: Parallel,
) -> list[np.ndarray]:
    """The arrays of all batches, one behind the other, on every host.

    Args:
      program: from `compile_rows`.
      variables: its first argument.
      batches: host batches, this process's rows.
      parallel: as for `compile_rows`.
    """
    found: list[tuple[np.ndarray, ...]] = []
    coming: list[tuple[Array, ...]] = []  # on their way to the host
    for batch in parallel.prefetch(batches):
        coming.append(program(variables, batch))
        if len(coming) > 2:
            found.append(jax.device_get(coming.pop(0)))
    found += jax.device_get(coming)
    return [np.concatenate(arrays) for arrays in zip(*found)]


def check_features(model: nn.Module, features: np.ndarray, examples: str) -> None:
    """Raises UserError unless features are finite, and one vector for an image.

    Args:
      model: that gave them.
      features: `[N, ...]`.
      examples: what they are of, such as the name of a split.
    """
    if features.ndim != 2:
        raise UserError(
            f'{type(model).__name__} gives features [B, D] = {features.shape}; one '
            'vector for an image is needed'
        )
    bad = np.count_nonzero(~np.isfinite(features).all(axis=1))
    if bad:
        raise UserError(
            f'the features of {bad:,} of {len(features):,} {examples} examples are not '
            'finite: the weights hold NaN, or are too large for config.dtype'
        )
