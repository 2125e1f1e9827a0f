"""Augmentation of whole batches, on the device, inside the compiled step.

Everything random is keyed per row of the global batch (`axes.example_keys`), and rows
are mixed within fixed pairs of neighbours, rows 2i and 2i + 1. So one device, a mesh
and `pmap` augment alike, and no pixel travels between devices. The order of a batch
is random, so a neighbour is as random a partner as any other.

Random erasing, mixup and cutmix take normalised float32 images; the crop and the flip
take bytes, for datasets that live on the device.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vit_jax.axes import example_keys
from vit_jax.errors import UserError, unknown
from vit_jax.typing import Array, PRNGKey

MIX_MODES = ('batch', 'pair', 'elem')


class Box(NamedTuple):
    """A rectangle of pixels: int32 scalars, or arrays `[B]`."""

    top: Array
    left: Array
    height: Array
    width: Array


def uniform_int(u: Array, count: Array | int) -> Array:
    """One of the integers 0 to count - 1, from u, uniform in [0, 1)."""
    # The product may round up to `count`.
    return jnp.minimum(jnp.floor(u * count).astype(jnp.int32), count - 1)


def box_mask(box: Box, height: int, width: int) -> Array:
    """Which pixels lie in the box: bool `[..., height, width]`, `...` as in the box.

    >>> box_mask(Box(*jnp.array([1, 0, 1, 2])), 2, 3).astype(int).tolist()
    [[0, 0, 0], [1, 1, 0]]
    """

    def inside(first: Array, length: Array, count: int) -> Array:
        offset = jnp.arange(count) - jnp.asarray(first)[..., None]
        return (offset >= 0) & (offset < jnp.asarray(length)[..., None])

    rows = inside(box.top, box.height, height)
    columns = inside(box.left, box.width, width)
    return rows[..., :, None] & columns[..., None, :]


# --- Crop and flip --------------------------------------------------------------


def pad_crop(images: Array, top: Array, left: Array, pad: int) -> Array:
    """Cuts each image out of itself with `pad` zeros on all sides.

    Args:
      images: `[B, h, w, c]`, of any type; the result has the same.
      top, left: `[B]` integers, from 0 to 2 * pad.
      pad: pixels.
    """
    _, h, w, channels = images.shape
    border = ((0, 0), (pad, pad), (pad, pad), (0, 0))

    def crop(padded: Array, top: Array, left: Array) -> Array:
        first = (top, left, jnp.zeros_like(top))
        return jax.lax.dynamic_slice(padded, first, (h, w, channels))

    return jax.vmap(crop)(jnp.pad(images, border), top, left)


def mirror(images: Array, mirrored: Array) -> Array:
    """Exchanges left and right of the images `[B, h, w, c]` that `mirrored` names."""
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


# --- Random erasing -------------------------------------------------------------


def erasing_size(
    area: Array, log_aspect: Array, size: tuple[int, int]
) -> tuple[Array, ...]:
    """The first of several rectangles that fits into the image.

    Args:
      area: `[attempts]`, shares of the image's area.
      log_aspect: `[attempts]`, log(height / width).
      size: (height, width) of the image.

    Returns:
      Height and width, both smaller than the image's; 0 where none fits.
    """
    h, w = size
    pixels, aspect = area * (h * w), jnp.exp(log_aspect)
    height = jnp.round(jnp.sqrt(pixels * aspect)).astype(jnp.int32)
    width = jnp.round(jnp.sqrt(pixels / aspect)).astype(jnp.int32)
    fits = (height < h) & (width < w)
    first = jnp.argmax(fits)
    return tuple(jnp.where(fits[first], side[first], 0) for side in (height, width))


def erase(images: Array, box: Box, noise: Array) -> Array:
    """Puts the pixels of `noise`, shaped like `images` `[B, h, w, c]`, in a box."""
    return jnp.where(box_mask(box, *images.shape[1:3])[..., None], noise, images)


def random_erasing(
    keys: Array,
    images: Array,
    probability: float,
    *,
    min_area: float = 0.02,
    max_area: float = 1 / 3,
    min_aspect: float = 0.3,
    attempts: int = 10,
) -> Array:
    """Replaces a random rectangle by standard normal noise, pixel by pixel.

    "Random Erasing Data Augmentation", arXiv 1708.04896, as DeiT trains with it: the
    noise is that of normalised images. Area and place are uniform, the aspect ratio
    log-uniform.

    Args:
      keys: `[B]`.
      images: `[B, h, w, c]` float, normalised.
      probability: that an image loses a rectangle.
      min_area, max_area: of the rectangle, as shares of the image's area.
      min_aspect: smallest height / width; the largest is its inverse.
      attempts: rectangles drawn until one fits; where none does, nothing is erased.

    Returns:
      Shaped like `images`.
    """
    h, w, channels = images.shape[1:]
    log_aspect = abs(math.log(min_aspect))

    def draw(key: PRNGKey) -> tuple[Box, Array]:
        scalars, noise = jax.random.split(key)
        u = jax.random.uniform(scalars, (3 + 2 * attempts,))  # one draw compiles faster
        areas, aspects = u[3:].reshape(2, attempts)
        height, width = erasing_size(
            min_area + (max_area - min_area) * areas,
            log_aspect * (2.0 * aspects - 1.0),
            (h, w),
        )
        height = jnp.where(u[0] < probability, height, 0)
        box = Box(
            uniform_int(u[1], h - height + 1),
            uniform_int(u[2], w - width + 1),
            height,
            width,
        )
        return box, jax.random.normal(noise, (h, w, channels), images.dtype)

    return erase(images, *jax.vmap(draw)(keys))


# --- Mixup and cutmix -----------------------------------------------------------


def symmetric_beta(u: Array, alpha: Array | float) -> Array:
    """A scalar of Beta(alpha, alpha), alpha > 0, in closed form.

    Devroye, "Random variate generation in one line of code", 1996. The rejection loop
    of `jax.random.beta` would let all devices wait for the last row's draw.

    Args:
      u: `[3]`, uniform in [0, 1).
      alpha: shape parameter.
    """
    ratio = (u[0] ** (-1.0 / alpha) - 1.0) * jnp.cos(2.0 * jnp.pi * u[1]) ** 2
    distance = 0.5 / jnp.sqrt(1.0 + 1.0 / ratio)  # from 1/2; ratio may be 0 or infinite
    return jnp.where(u[2] < 0.5, 0.5 - distance, 0.5 + distance)


def cutmix_box(lam: Array, centre: tuple[Array, Array], size: tuple[int, int]) -> Box:
    """The box that the partner fills, and that leaves about `lam` of the image.

    Its sides are sqrt(1 - lam) of the image's, rounded down to whole pixels; what
    sticks out of the image is cut off.

    Args:
      lam: scalar in [0, 1].
      centre: (row, column), int32.
      size: (height, width) of the image.
    """
    first, last = [], []
    for middle, count in zip(centre, size):
        side = jnp.floor(count * jnp.sqrt(1.0 - lam)).astype(jnp.int32)
        edge = middle - side // 2
        first.append(jnp.maximum(edge, 0))
        last.append(jnp.minimum(edge + side, count))
    return Box(*first, *(b - a for a, b in zip(first, last)))


def mix_pairs(
    images: Array, targets: Array, keep: Array, lam: Array
) -> tuple[Array, Array]:
    """Adds its partner, the other of rows 2i and 2i + 1, to each row.

    Args:
      images: `[B, h, w, c]`.
      targets: `[B, V]`.
      keep: `[B or 1, h, w]`, the share that a row keeps of each of its pixels.
      lam: `[B or 1]`, the share that it keeps of its target.
    """
    images = _blend(images, keep[..., None])
    return images, _blend(targets, lam[:, None])


def _blend(rows: Array, keep: Array) -> Array:
    partner = jnp.flip(rows.reshape(-1, 2, *rows.shape[1:]), 1).reshape(rows.shape)
    # Exact at 0 and 1. There is one product, which a compiler fuses with the sum in
    # one way only: of two, another one on another number of devices.
    return jnp.where(keep == 0.0, partner, rows + (1.0 - keep) * (partner - rows))


def mixup(images: Array, targets: Array, lam: Array) -> tuple[Array, Array]:
    """Blends neighbours, "mixup", arXiv 1710.09412: see `mix_pairs`.

    >>> images = jnp.array([[[[1.0]]], [[[5.0]]]])
    >>> mixed, targets = mixup(images, jnp.eye(2), jnp.array([0.75]))
    >>> mixed.ravel().tolist(), targets.tolist()
    ([2.0, 4.0], [[0.75, 0.25], [0.25, 0.75]])
    """
    keep = jnp.broadcast_to(lam[:, None, None], (len(lam), *images.shape[1:3]))
    return mix_pairs(images, targets, keep, lam)


def cutmix(images: Array, targets: Array, box: Box) -> tuple[Array, Array]:
    """Fills a box `[B or 1]` from the neighbour, "CutMix", arXiv 1905.04899.

    Targets mix by the area that is left: see `mix_pairs`.
    """
    keep = 1.0 - box_mask(box, *images.shape[1:3])
    return mix_pairs(images, targets, keep, jnp.mean(keep, axis=(1, 2)))


@dataclasses.dataclass(frozen=True)
class BatchAugment:
    """Random erasing, then mixup or cutmix, of a batch on the device.

    The default does nothing, and adds nothing to the compiled step.

    Attributes:
      erasing: probability that an image loses a rectangle.
      mixup, cutmix: alpha of their Beta(alpha, alpha), from which the share that a
        row keeps of itself is drawn; 0 for without.
      mix_mode: 'batch' draws one share, kind and box for all rows, 'pair' for each
        pair of rows, 'elem' for each row.
      mix_prob: probability that a batch, pair or row is mixed.
      switch_prob: probability that cutmix does it, where mixup is on too.
    """

    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_mode: str = 'batch'
    mix_prob: float = 1.0
    switch_prob: float = 0.5

    def __post_init__(self) -> None:
        if self.mix_mode not in MIX_MODES:
            raise unknown('augment.mix_mode', self.mix_mode, MIX_MODES)
        probabilities = {
            'erasing': self.erasing,
            'mix_prob': self.mix_prob,
            'mix_switch_prob': self.switch_prob,
        }
        for name, value in probabilities.items():
            if not 0.0 <= value <= 1.0:
                raise UserError(
                    f'augment.{name} is a probability in [0, 1], not {value}'
                )
        for name, value in {'mixup': self.mixup, 'cutmix': self.cutmix}.items():
            if not 0.0 <= value < float('inf'):
                raise UserError(
                    f'augment.{name} is the alpha of a Beta distribution, 0 (off) '
                    f'or more, not {value}'
                )

    @property
    def mixes(self) -> bool:
        """Whether rows are mixed at all, so that a batch needs whole pairs."""
        return self.mix_prob > 0.0 and max(self.mixup, self.cutmix) > 0.0

    def __call__(
        self, rng: PRNGKey, images: Array, targets: Array, weight: Array
    ) -> tuple[Array, Array]:
        """Augments the global batch, or one device's rows of it (`axes`).

        Args:
          rng: key of this step, used for nothing else.
          images: `[B, h, w, c]` float32, normalised.
          targets: `[B, V]` float32, rows that sum to one, already smoothed.
          weight: `[B]`; a row whose partner has weight 0 stays unmixed.

        Returns:
          Images and targets, shaped as they were.

        Raises:
          UserError: for an odd number of rows, when rows are mixed.
        """
        num_rows = images.shape[0]
        if self.mixes and num_rows % 2:
            near = ' or '.join(str(n) for n in (num_rows - 1, num_rows + 1) if n)
            raise UserError(
                f'mixup and cutmix mix pairs of rows: a batch, and under pmap each '
                f"device's part of it, needs an even number of rows, {near}, not "
                f'{num_rows}'
            )
        if self.erasing:
            keys = example_keys(jax.random.fold_in(rng, 0), num_rows)
            images = random_erasing(keys, images, self.erasing)
        if self.mixes:
            keep, lam = self._draw(jax.random.fold_in(rng, 1), images.shape[:3])
            # A row of weight 0 is no example: its partner stays as it is.
            both = jnp.all(weight.reshape(-1, 2) > 0, axis=1).repeat(2)
            keep = jnp.where(both[:, None, None], keep, 1.0)
            lam = jnp.where(both, lam, 1.0)
            images, targets = mix_pairs(images, targets, keep, lam)
        return images, targets

    def _draw(self, rng: PRNGKey, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """`keep` and `lam` of `mix_pairs` for images of shape (B, h, w)."""
        num_rows, *size = shape
        if self.mix_mode == 'batch':
            return jax.tree.map(lambda x: x[None], self._draw_one(rng, *size))
        draw = jax.vmap(lambda key: self._draw_one(key, *size))
        if self.mix_mode == 'elem':
            return draw(example_keys(rng, num_rows))
        keep, lam = draw(example_keys(rng, num_rows // 2))  # one key per pair
        return keep.repeat(2, axis=0), lam.repeat(2)

    def _draw_one(self, key: PRNGKey, h: int, w: int) -> tuple[Array, Array]:
        """Whether, how and how much to mix: `keep` `[h, w]` and `lam`, a scalar."""
        u = jax.random.uniform(key, (7,))  # one draw compiles faster
        switch_prob = self.switch_prob if self.mixup else 1.0
        use_cutmix = u[0] < (switch_prob if self.cutmix else 0.0)
        lam = symmetric_beta(u[1:4], jnp.where(use_cutmix, self.cutmix, self.mixup))
        centre = uniform_int(u[4], h), uniform_int(u[5], w)
        outside = 1.0 - box_mask(cutmix_box(lam, centre, (h, w)), h, w)
        keep = jnp.where(use_cutmix, outside, lam)
        lam = jnp.where(use_cutmix, jnp.mean(outside), lam)
        # The other rows keep all of themselves.
        mix = u[6] < self.mix_prob
        return jnp.where(mix, keep, 1.0), jnp.where(mix, lam, 1.0)
