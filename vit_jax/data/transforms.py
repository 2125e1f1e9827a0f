"""Per-example operations, on the host, in NumPy and Pillow.

Images are uint8 `[height, width, channels]`; random operations are told what has been
drawn, or take a NumPy `Generator` first, so an example's augmentation is a function of
its position.
Normalisation is not here: it runs on the device (`normalize`), and images travel
as bytes.
"""

import dataclasses
import io
import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from vit_jax.data.order import shift_of
from vit_jax.errors import UserError, times, unknown

log = logging.getLogger(__name__)

CROPS = ('none', 'pad', 'resized')
INTERPOLATIONS = {
    'bicubic': Image.Resampling.BICUBIC,
    'bilinear': Image.Resampling.BILINEAR,
}

_FORMATS = ('JPEG', 'PNG', 'WEBP')

# Pillow's image mode for a number of channels.
_MODES = {1: 'L', 3: 'RGB'}
_GREY_MODES = ('1', 'L', 'LA', 'La', 'I', 'F', 'I;16', 'I;16B', 'I;16L')


# Decoded, as Pillow has it: crops then copy no pixels that they do not need.
Decoded = np.ndarray | Image.Image


def decode_image(
    data: bytes | np.ndarray | UserError,
    channels: int,
    name: str,
    convert: bool = True,
) -> np.ndarray:
    """Decodes a JPEG, PNG or WebP file.

    Args:
      data: the file's bytes; an array of pixels is returned as it is, and the error of
        a file that could not be read raised.
      channels: 1 (grey) or 3 (RGB).
      name: what to call the image in an error.
      convert: whether a grey image may become RGB, and a coloured one grey.

    Returns:
      uint8 `[height, width, channels]`.

    Raises:
      UserError: when the bytes are no image, or have other channels.
    """
    if isinstance(data, np.ndarray):
        return data
    return _pixels(_open(data, channels, name, convert))


def _open(
    data: bytes | UserError, channels: int, name: str, convert: bool = True
) -> Image.Image:
    """`decode_image`, to an image of Pillow's mode 'L' or 'RGB'."""
    if isinstance(data, UserError):  # of `read_example`
        raise data
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        found = 1 if image.mode in _GREY_MODES else 3
        if image.mode.startswith('I'):  # 16 bits, which `convert` would clip
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert(_MODES[channels])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).split(' <')[0]  # without the address of the buffer
        raise UserError(f'{name} cannot be decoded: {reason}') from error
    if found != channels and not convert:
        raise UserError(
            f'{name} has {found} channel(s), the model takes {channels}; convert the '
            f'image to {_MODES[channels]}, or pass --convert_channels'
        )
    return image


def _pixels(image: Image.Image) -> np.ndarray:
    """uint8 `[h, w, c]`."""
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _height_width(image: Decoded) -> tuple[int, int]:
    if isinstance(image, Image.Image):
        return image.height, image.width
    return image.shape[0], image.shape[1]


def resize_box(
    image: Decoded,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    interpolation: str = 'bicubic',
) -> np.ndarray:
    """Cuts a box out of an image and resizes it, with antialiasing.

    Args:
      image: uint8 `[h, w, c]`, c = 1 or 3, or Pillow's image.
      box: (top, left, height, width) in pixels, may be fractional.
      size: (height, width) of the result.
      interpolation: 'bicubic' or 'bilinear'.

    Returns:
      uint8 `[*size, c]`.
    """
    top, left, height, width = box
    if (height, width) == size and top == int(top) and left == int(left):
        pixels = _pixels(image) if isinstance(image, Image.Image) else image
        return pixels[int(top) :, int(left) :][: size[0], : size[1]]
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    resized = image.resize(
        (size[1], size[0]),
        INTERPOLATIONS[interpolation],
        box=(left, top, left + width, top + height),
    )
    return _pixels(resized)


def center_crop(
    image: Decoded,
    size: tuple[int, int],
    fraction: float = 1.0,
    interpolation: str = 'bicubic',
) -> np.ndarray:
    """Resizes the central part whose shape is that of `size`.

    Args:
      image: uint8 `[h, w, c]`, or Pillow's image.
      size: (height, width) of the result.
      fraction: side of the part, relative to the largest that fits. 0.875 is
        "resize to 256, crop 224".
      interpolation: 'bicubic' or 'bilinear'.
    """
    h, w = _height_width(image)
    scale = fraction * min(h / size[0], w / size[1])
    # Rounding must not let the part stick out of the image.
    height, width = min(size[0] * scale, h), min(size[1] * scale, w)
    box = ((h - height) / 2, (w - width) / 2, height, width)
    return resize_box(image, box, size, interpolation)


def random_resized_crop(
    rng: np.random.Generator,
    image: Decoded,
    size: tuple[int, int],
    min_scale: float = 0.08,
    interpolation: str = 'bicubic',
) -> np.ndarray:
    """Resizes a random box: Inception's augmentation, arXiv 1409.4842, section 6.

    The area is uniform in [min_scale, 1] of the image's, the aspect ratio
    log-uniform in [3/4, 4/3]; after ten boxes that do not fit, the central crop.
    """
    h, w = _height_width(image)
    for _ in range(10):
        area = rng.uniform(min_scale, 1.0) * h * w
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= w and 0 < height <= h:
            top = int(rng.integers(0, h - height + 1))
            left = int(rng.integers(0, w - width + 1))
            return resize_box(image, (top, left, height, width), size, interpolation)
    return center_crop(image, size, interpolation=interpolation)


def pad_crop(image: np.ndarray, top: int, left: int, pad: int) -> np.ndarray:
    """Cuts the image out of itself with `pad` zeros on all sides, from (top, left)."""
    h, w, channels = image.shape
    padded = np.zeros((h + 2 * pad, w + 2 * pad, channels), image.dtype)
    padded[pad : pad + h, pad : pad + w] = image  # np.pad is slow on small images
    return padded[top : top + h, left : left + w]


def mirror(image: np.ndarray) -> np.ndarray:
    """The image with left and right exchanged."""
    flipped = np.empty_like(image)
    for channel in range(image.shape[2]):  # five times as fast as all of them at once
        flipped[:, :, channel] = image[:, ::-1, channel]
    return flipped


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Decode, crop, flip, RandAugment: from a source's example to one of a batch.

    Shift and mirror are drawn from the example's 'draw', the words of its position
    (`order.draw_words`), as on the device; the rest from the generator.

    Attributes:
      size: (height, width) of the result.
      channels: 1 or 3.
      crop: 'none' (central), 'pad' (shift by up to `pad`) or 'resized'.
      pad: pixels, for 'pad'.
      min_scale: smallest share of the area, for 'resized'.
      flip: whether to mirror half of the images.
      interpolation: 'bicubic' or 'bilinear', where images are resized.
      randaugment: (rng, image) -> image of the same shape, or None.
      skip_corrupt: whether an image that cannot be read or decoded becomes a row of
        zeros, of label 0 and weight 0, told in the log; else it is an error.
    """

    size: tuple[int, int]
    channels: int
    crop: str = 'none'
    pad: int = 0
    min_scale: float = 0.08
    flip: bool = False
    interpolation: str = 'bicubic'
    randaugment: Callable[[np.random.Generator, np.ndarray], np.ndarray] | None = None
    skip_corrupt: bool = False
    skipped: '_Skipped' = dataclasses.field(
        default_factory=lambda: _Skipped(), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise unknown('augment.crop', self.crop, CROPS)

    def __call__(
        self, example: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Any]:
        image = _decode(example, self)
        if image is None:
            return _skipped_example(self)
        if self.crop == 'resized':
            image = random_resized_crop(
                rng, image, self.size, self.min_scale, self.interpolation
            )
        else:
            image = center_crop(image, self.size, interpolation=self.interpolation)
        if self.crop == 'pad' or self.flip:
            top, left, mirrored = shift_of(example['draw'], self.pad)
            if self.crop == 'pad':
                image = pad_crop(image, top, left, self.pad)
            if self.flip and mirrored:
                image = mirror(image)
        if self.randaugment is not None:
            image = self.randaugment(rng, image)
        return _example(image, example['label'], 1.0, self)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Decode and crop the centre, for one example of an evaluation batch.

    Attributes:
      size: (height, width) of the result.
      channels: 1 or 3.
      crop_fraction, interpolation: see `center_crop`.
      skip_corrupt: see `TrainTransform`.
    """

    size: tuple[int, int]
    channels: int
    crop_fraction: float = 1.0
    interpolation: str = 'bicubic'
    skip_corrupt: bool = False
    skipped: '_Skipped' = dataclasses.field(
        default_factory=lambda: _Skipped(), init=False, repr=False, compare=False
    )

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        image = _decode(example, self)
        if image is None:
            return _skipped_example(self)
        image = center_crop(image, self.size, self.crop_fraction, self.interpolation)
        return _example(image, example['label'], example['weight'], self)


class _Skipped:
    """Tells of each image that is skipped once, and of so many that one has seen it."""

    limit = 20

    def __init__(self) -> None:
        self._names: set[str] = set()

    def tell(self, name: str, error: UserError) -> None:
        if name in self._names or len(self._names) == self.limit:
            return
        self._names.add(name)
        last = len(self._names) == self.limit
        more = '; more of them will not be told' if last else ''
        log.warning('%s; its row has weight 0%s', error, more)


def _decode(
    example: dict[str, Any], transform: TrainTransform | EvalTransform
) -> Decoded | None:
    """The image of an example; None for one that is to be skipped."""
    data = example['image']
    if isinstance(data, np.ndarray):
        return data
    try:
        return _open(data, transform.channels, example['name'])
    except UserError as error:
        if not transform.skip_corrupt:
            raise
        transform.skipped.tell(example['name'], error)
        return None


def _skipped_example(transform: TrainTransform | EvalTransform) -> dict[str, Any]:
    image = np.zeros((*transform.size, transform.channels), np.uint8)
    return _example(image, 0, 0.0, transform)


def _example(
    image: np.ndarray,
    label: int,
    weight: float,
    transform: TrainTransform | EvalTransform,
) -> dict[str, Any]:
    if image.shape != (*transform.size, transform.channels):
        expected = times((*transform.size, transform.channels))
        raise UserError(f'an image is {times(image.shape)}, expected {expected}')
    return {
        'image': np.ascontiguousarray(image),
        'label': np.int32(label),
        'weight': np.float32(weight),
    }
