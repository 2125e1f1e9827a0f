"""The whole training split in the accelerators' memory: no host work between steps.

The images are decoded once (`load`). A step finds its batch by itself: which examples
(`Order`), cut and mirrored by the words of their positions (`MakeBatch`), both as on
the host. So several steps run in one dispatch (`scan_steps`), and the batches are those
of the host pipeline, bit for bit.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.data.augment import mirror, pad_crop
from vit_jax.data.datasets import DataSource
from vit_jax.data.input_pipeline import read_example
from vit_jax.data.order import Order, draw_words, shift_of
from vit_jax.data.progress import Progress
from vit_jax.data.transforms import TrainTransform
from vit_jax.data.watch import LOADER
from vit_jax.errors import UserError
from vit_jax.typing import Array, Batch, Metrics

_CHUNK = 256  # examples that a thread decodes at a time


def check_supported(crop: str, randaugment: str | None) -> None:
    """Raises UserError for augmentation that runs on the host only.

    Args:
      crop: `augment.crop`.
      randaugment: `augment.randaugment`.
    """
    for key, used in (
        ("augment.crop='resized'", crop == 'resized'),
        ('augment.randaugment', randaugment is not None),
    ):
        if used:
            raise UserError(
                f'{key} works on encoded images, on the host: set dataset.placement='
                "'host', or leave it out ('none' and 'pad' are the crops on the device)"
            )


def load(
    source: DataSource, transform: TrainTransform, memory: int | None = None
) -> dict[str, np.ndarray]:
    """Decodes every example once, and crops it to its centre.

    Args:
      source: the training examples.
      transform: of training; its random parts are left out.
      memory: bytes that there are for it, on each device.

    Returns:
      image `[n, h, w, c]` uint8, label `[n]` int32, weight `[n]` float32: 0 for what
      `transform` skips.

    Raises:
      UserError: when it does not fit, and for what cannot be read or decoded.
    """
    count, shape = len(source), (*transform.size, transform.channels)
    needed = count * (int(np.prod(shape)) + 8)
    if memory is not None and needed > memory:
        raise UserError(
            f'the {count:,} training examples take {needed / 2**30:.2f} GiB on every '
            f'device, and {memory / 2**30:.2f} GiB are free for them; set '
            "dataset.placement='host'"
        )
    decode = dataclasses.replace(transform, crop='none', flip=False, randaugment=None)
    unused = np.random.default_rng(0)
    data: dict[str, np.ndarray] = {
        'image': np.empty((count, *shape), np.uint8),
        'label': np.empty(count, np.int32),
        'weight': np.empty(count, np.float32),
    }

    def fill(start: int) -> None:
        end = min(start + _CHUNK, count)
        for i in range(start, end):
            example = decode(read_example(source, i), unused)
            for key, values in data.items():
                values[i] = example[key]
        progress.advance(end - start)

    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), LOADER)
    with Progress('decoding', count, unit='example') as progress:
        futures = [pool.submit(fill, start) for start in range(0, count, _CHUNK)]
        try:
            for future in futures:
                future.result()
        finally:  # a thread that hangs is not waited for
            pool.shutdown(wait=False, cancel_futures=True)
    return data


@dataclasses.dataclass(frozen=True)
class MakeBatch:
    """From the resident examples to the batch of a step, inside the compiled step.

    Attributes:
      order: of the examples, with the size of the (global) batch.
      pad: the shift of `augment.crop='pad'`, in pixels; 0 for 'none'.
      flip: whether to mirror half of the images.
    """

    order: Order
    pad: int = 0
    flip: bool = False

    def first(self, start: int, count: int) -> dict[str, np.ndarray]:
        """What tells the next batches apart, on the host: small, and sent to the step.

        Args:
          start: examples seen before.
          count: batches.

        Returns:
          Arrays of uint32 whose first axis is `count`.

        Raises:
          UserError: see `Order.first_of`.
        """
        positions = start + self.order.batch_size * np.arange(count)
        words = np.stack([positions >> 32, positions & (2**32 - 1)], axis=-1)
        return {
            **self.order.first_of(positions),
            'position': words.astype(np.uint32),
        }

    def index(self, first: Mapping[str, Array]) -> Array:
        """Which examples a batch holds: int32 `[B]`, or `[steps, B]` of several."""
        one_each = {key: first[key][..., None] for key in ('epoch', 'place')}
        return self.order.examples_of(one_each, self._rows())

    def __call__(self, data: Mapping[str, Array], first: Mapping[str, Array]) -> Batch:
        """The batch: pure.

        Args:
          data: see `load`, on the device.
          first: of one batch: an element of what `first` returns; with 'index' where
            that has been computed already.

        Returns:
          image `[B, h, w, c]` uint8, label `[B]` int32, weight `[B]` float32.
        """
        index = first['index'] if 'index' in first else self.index(first)
        batch = {
            key: jnp.take(values, index, axis=0, mode='clip')
            for key, values in data.items()
        }
        if self.pad or self.flip:
            words = draw_words(self._positions(first['position']), self.order.seed)
            top, left, mirrored = shift_of(words, self.pad)
            if self.pad:
                batch['image'] = pad_crop(batch['image'], top, left, self.pad)
            if self.flip:
                batch['image'] = mirror(batch['image'], mirrored)
        return batch

    def _rows(self) -> Array:
        return jnp.arange(self.order.batch_size, dtype=jnp.uint32)

    def _positions(self, first: Array) -> tuple[Array, Array]:
        """Low and high words, `[B]`, of the positions of a batch's rows."""
        rows = self._rows()
        low = first[1] + rows
        return low, first[0] + (low < rows)  # the carry


def scan_steps(
    train_step: Callable[[Any, Batch], tuple[Any, Metrics]],
    make_batch: MakeBatch,
    sharding: jax.sharding.Sharding | None = None,
) -> Callable[[Any, Mapping[str, Any]], tuple[Any, Metrics]]:
    """Several training steps as one, to be compiled.

    Args:
      train_step: (state, batch) -> (state, metrics).
      make_batch: which batches.
      sharding: of the rows of a batch, under `jit` over a mesh.

    Returns:
      (state, feed) -> (state, metrics of each step, stacked). The feed is
      {'data': see `load`, 'first': see `MakeBatch.first`, one per step}; the data is
      an argument, no part of the program.
    """

    def steps(state: Any, feed: Mapping[str, Any]) -> tuple[Any, Metrics]:
        def step(state: Any, first: Mapping[str, Array]) -> tuple[Any, Metrics]:
            batch = make_batch(feed['data'], first)
            if sharding is not None:
                batch = jax.lax.with_sharding_constraint(batch, sharding)
            return train_step(state, batch)

        # All steps' at once: the loop of `permute` would hold up each of them.
        index = make_batch.index(feed['first'])
        first = {**feed['first'], 'index': index}
        if len(index) > 1:
            return jax.lax.scan(step, state, first)
        state, metrics = step(state, jax.tree.map(lambda x: x[0], first))
        return state, jax.tree.map(lambda x: x[None], metrics)

    return steps
