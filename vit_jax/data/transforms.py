"""Per-example operations, on the host, in NumPy and Pillow.

Images are uint8 `[height, width, channels]`; random operations take a NumPy
`Generator` first, so an example's augmentation is a function of its position.
Normalisation is not here: it runs on the device (`normalize`), and images travel
as bytes.
"""

import dataclasses
import io
import math
from typing import Any

import numpy as np
from PIL import Image

from vit_jax.errors import UserError, times, unknown

CROPS = ('none', 'pad', 'resized')
INTERPOLATIONS = {
    'bicubic': Image.Resampling.BICUBIC,
    'bilinear': Image.Resampling.BILINEAR,
}

_FORMATS = ('JPEG', 'PNG', 'WEBP')

# Pillow's image mode for a number of channels.
_MODES = {1: 'L', 3: 'RGB'}
_GREY_MODES = ('1', 'L', 'LA', 'La', 'I', 'F', 'I;16', 'I;16B', 'I;16L')


def decode_image(
    data: bytes | np.ndarray, channels: int, name: str, convert: bool = True
) -> np.ndarray:
    """Decodes a JPEG, PNG or WebP file.

    Args:
      data: the file's bytes; an array of pixels is returned as it is.
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
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        found = 1 if image.mode in _GREY_MODES else 3
        if image.mode.startswith('I'):  # 16 bits, which `convert` would clip
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            pixels = np.asarray(Image.fromarray(grey).convert(_MODES[channels]))
        else:
            pixels = np.asarray(image.convert(_MODES[channels]))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).split(' <')[0]  # without the address of the buffer
        raise UserError(f'{name} cannot be decoded: {reason}') from error
    if found != channels and not convert:
        raise UserError(
            f'{name} has {found} channel(s), the model takes {channels}; convert the '
            f'image to {_MODES[channels]}, or pass --convert_channels'
        )
    return pixels[:, :, None] if channels == 1 else pixels


def resize_box(
    image: np.ndarray,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    interpolation: str = 'bicubic',
) -> np.ndarray:
    """Cuts a box out of an image and resizes it, with antialiasing.

    Args:
      image: uint8 `[h, w, c]`, c = 1 or 3.
      box: (top, left, height, width) in pixels, may be fractional.
      size: (height, width) of the result.
      interpolation: 'bicubic' or 'bilinear'.
    """
    top, left, height, width = box
    if (height, width) == size and top == int(top) and left == int(left):
        return image[int(top) :, int(left) :][: size[0], : size[1]]
    pixels = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    resized = pixels.resize(
        (size[1], size[0]),
        INTERPOLATIONS[interpolation],
        box=(left, top, left + width, top + height),
    )
    return np.asarray(resized).reshape(*size, image.shape[2])


def center_crop(
    image: np.ndarray,
    size: tuple[int, int],
    fraction: float = 1.0,
    interpolation: str = 'bicubic',
) -> np.ndarray:
    """Resizes the central part whose shape is that of `size`.

    Args:
      image: uint8 `[h, w, c]`.
      size: (height, width) of the result.
      fraction: side of the part, relative to the largest that fits. 0.875 is
        "resize to 256, crop 224".
      interpolation: 'bicubic' or 'bilinear'.
    """
    h, w = image.shape[:2]
    scale = fraction * min(h / size[0], w / size[1])
    # Rounding must not let the part stick out of the image.
    height, width = min(size[0] * scale, h), min(size[1] * scale, w)
    box = ((h - height) / 2, (w - width) / 2, height, width)
    return resize_box(image, box, size, interpolation)


def random_resized_crop(
    rng: np.random.Generator,
    image: np.ndarray,
    size: tuple[int, int],
    min_scale: float = 0.08,
    interpolation: str = 'bicubic',
) -> np.ndarray:
    """Resizes a random box: Inception's augmentation, arXiv 1409.4842, section 6.

    The area is uniform in [min_scale, 1] of the image's, the aspect ratio
    log-uniform in [3/4, 4/3]; after ten boxes that do not fit, the central crop.
    """
    h, w = image.shape[:2]
    for _ in range(10):
        area = rng.uniform(min_scale, 1.0) * h * w
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= w and 0 < height <= h:
            top = int(rng.integers(0, h - height + 1))
            left = int(rng.integers(0, w - width + 1))
            return resize_box(image, (top, left, height, width), size, interpolation)
    return center_crop(image, size, interpolation=interpolation)


def random_pad_crop(
    rng: np.random.Generator, image: np.ndarray, pad: int
) -> np.ndarray:
    """Shifts the image by up to `pad` pixels each way, zeros coming in."""
    h, w, channels = image.shape
    padded = np.zeros((h + 2 * pad, w + 2 * pad, channels), image.dtype)
    padded[pad : pad + h, pad : pad + w] = image  # np.pad is slow on small images
    top, left = rng.integers(0, 2 * pad + 1, size=2)
    return padded[top : top + h, left : left + w]


def random_flip(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Mirrors left and right with probability 1/2."""
    return image[:, ::-1] if rng.random() < 0.5 else image


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Decode, crop, flip: from a source's example to one of a training batch.

    Attributes:
      size: (height, width) of the result.
      channels: 1 or 3.
      crop: 'none' (central), 'pad' (shift by up to `pad`) or 'resized'.
      pad: pixels, for 'pad'.
      min_scale: smallest share of the area, for 'resized'.
      flip: whether to mirror half of the images.
      interpolation: 'bicubic' or 'bilinear', where images are resized.
    """

    size: tuple[int, int]
    channels: int
    crop: str = 'none'
    pad: int = 0
    min_scale: float = 0.08
    flip: bool = False
    interpolation: str = 'bicubic'

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise unknown('augment.crop', self.crop, CROPS)

    def __call__(
        self, example: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Any]:
        image = decode_image(example['image'], self.channels, example['name'])
        if self.crop == 'resized':
            image = random_resized_crop(
                rng, image, self.size, self.min_scale, self.interpolation
            )
        else:
            image = center_crop(image, self.size, interpolation=self.interpolation)
        if self.crop == 'pad':
            image = random_pad_crop(rng, image, self.pad)
        if self.flip:
            image = random_flip(rng, image)
        return _example(image, example['label'], 1.0, self)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Decode and crop the centre, for one example of an evaluation batch.

    Attributes:
      size: (height, width) of the result.
      channels: 1 or 3.
      crop_fraction, interpolation: see `center_crop`.
    """

    size: tuple[int, int]
    channels: int
    crop_fraction: float = 1.0
    interpolation: str = 'bicubic'

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        image = decode_image(example['image'], self.channels, example['name'])
        image = center_crop(image, self.size, self.crop_fraction, self.interpolation)
        return _example(image, example['label'], example['weight'], self)


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
