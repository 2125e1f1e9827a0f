"""Images from latents: a model that makes them, and how close they are to real ones."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.data.watch import Watch
from vit_jax.features import (
    check_features,
    collect_rows,
    compile_rows,
    headless,
    image_features,
)
from vit_jax.frechet import Moments, frechet_distance, moments
from vit_jax.frozen import Frozen
from vit_jax.parallel import Parallel
from vit_jax.typing import Array, Batch, Variables


def draw_latents(keys: Array, latent_dim: int) -> Array:
    """Normal latents `[B, latent_dim]` float32, one for each of `[B]` keys."""
    return jax.vmap(lambda key: jax.random.normal(key, (latent_dim,)))(keys)


def to_pixels(images: Array) -> Array:
    """Images in [-1, 1] as uint8.

    >>> to_pixels(jnp.array([-1.0, 0.0, 1.0])).tolist()
    [0, 128, 255]
    """
    return jnp.round(jnp.clip((images + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Makes images; the i-th is a pure function of variables, seed and i.

    Attributes:
      model: with the method `generate` and the field `latent_dim` of `SAGAN`.
      parallel: where it runs; rows of a batch are split over the devices.
      batch_size: rows of a batch, over all devices.
      seed: of the latents.
    """

    model: nn.Module
    parallel: Parallel
    batch_size: int
    seed: int = 0

    def latents(self, index: Array) -> Array:
        """Latents `[B, Z]` of the images of these numbers `[B]`."""
        rng = jax.random.key(self.seed)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, index)
        return draw_latents(keys, self.model.latent_dim)  # type: ignore[attr-defined]

    def pixels(self, variables: Variables, index: Array) -> Array:
        """Images `[B, h, w, c]` uint8 of these numbers `[B]`."""
        images: Any = self.model.apply(
            variables, self.latents(index), train=False, method='generate'
        )
        return to_pixels(images)

    def batches(self, count: int) -> Iterator[Batch]:
        """Numbers from 0, this process's rows of each batch; the last may go on."""
        rows = self.batch_size // jax.process_count()
        first = rows * jax.process_index()
        for start in range(first, first + count, self.batch_size):
            yield {'index': np.arange(start, start + rows, dtype=np.int32)}

    @functools.cached_property
    def _program(self) -> Callable:
        return compile_rows(
            lambda variables, batch: (self.pixels(variables, batch['index']),),
            self.parallel,
        )

    def __call__(self, variables: Variables, count: int) -> np.ndarray:
        """The first images, `[count, h, w, c]` uint8."""
        batches = self.batches(count)
        (pixels,) = collect_rows(self._program, variables, batches, self.parallel)
        return pixels[:count]


@dataclasses.dataclass(frozen=True)
class FrechetScore:
    """The Frechet distance of generated images from those that are trained on.

    In the features of a classifier of the same data, the mean of its last map: see
    `frechet_distance`.

    Attributes:
      sampler: makes the images.
      classifier: whose features count.
      num_samples: how many are made.
      train_images: () -> host batches of the images that are trained on, not augmented.
    """

    sampler: Sampler
    classifier: Frozen
    num_samples: int
    train_images: Callable[[], Watch]

    names = ('frechet',)

    @property
    def signature(self) -> str:
        """What the distance is of, without which it says nothing."""
        return (
            f'frechet: {self.num_samples:,} samples against the images trained on, in '
            f'the features of {self.classifier.path}'
        )

    def __call__(
        self, variables: Variables, means: dict[str, float]
    ) -> dict[str, float]:
        """The metrics; `means` are not needed."""
        del means
        features = self.sample_features(variables, self.num_samples)
        return {'frechet': self.distance(features)}

    def distance(self, features: np.ndarray) -> float:
        """The Frechet distance of features `[N, D]` from the training images'."""
        return frechet_distance(*moments(features), *self._train_moments)

    def sample_features(self, variables: Variables, count: int) -> np.ndarray:
        """Features `[count, D]` of generated images, which are as coarse as real ones.

        Args:
          variables: of the generator's model.
          count: how many; of the same numbers the same.

        Raises:
          UserError: for features that are not finite, or not a vector each.
        """
        (features,) = collect_rows(
            self._sample_program,
            (variables, self._variables),
            self.sampler.batches(count),
            self.sampler.parallel,
        )
        check_features(self._model, features, 'generated')
        return features[:count]

    def image_features(self, data: Watch) -> np.ndarray:
        """Features `[N, D]` of real images.

        Args:
          data: host batches of images and weights; closed at the end.

        Raises:
          UserError: for features that are not finite, or not a vector each.
        """
        with closing(data):
            features, weight = collect_rows(
                self._image_program, self._variables, data, self.sampler.parallel
            )
        features = features[weight > 0]
        check_features(self._model, features, 'real')
        return features

    @functools.cached_property
    def _train_moments(self) -> Moments:
        return moments(self.image_features(self.train_images()))

    @functools.cached_property
    def _variables(self) -> Variables:
        return self.classifier.load(self.sampler.parallel.leaf_sharding)

    @functools.cached_property
    def _model(self) -> nn.Module:
        return headless(self.classifier.model)

    def _features(self, variables: Variables, pixels: Array) -> Array:
        seen = self.classifier.mean, self.classifier.std
        return image_features(variables, pixels, self._model, *seen)

    @functools.cached_property
    def _sample_program(self) -> Callable:
        def step(both: Any, batch: Batch) -> tuple[Array]:
            variables, judge = both
            pixels = self.sampler.pixels(variables, batch['index'])
            return (self._features(judge, pixels),)

        return compile_rows(step, self.sampler.parallel)

    @functools.cached_property
    def _image_program(self) -> Callable:
        return compile_rows(
            lambda variables, batch: (
                self._features(variables, batch['image']),
                batch['weight'],
            ),
            self.sampler.parallel,
        )
