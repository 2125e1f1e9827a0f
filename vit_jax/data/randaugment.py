"""RandAugment, per example, on the host, in Pillow.

"RandAugment: Practical automated data augmentation with a reduced search space",
arXiv 1909.13719: a few operations, drawn from a list, all of one magnitude. A spec
names one of its two forms in use and its numbers:

    rand-m9-mstd0.5-inc1  of timm, which DeiT and ConViT train with
    plain-n2-m9           of the paper, with the ranges of torchvision

Operations and ranges follow what timm 1.0 and torchvision 0.28 do to pixels (golden
files hold them to it); the random numbers are NumPy's.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vit_jax.data.transforms import INTERPOLATIONS
from vit_jax.errors import UserError, times, unknown

IMAGENET_MEAN = (0.485, 0.456, 0.406)

# --- Operations -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Canvas:
    """How pixels are moved.

    Attributes:
      resample: Pillow's filter; without one (NEAREST), shifts are whole pixels.
      fill: colour of what comes in, one number per channel.
    """

    resample: Image.Resampling
    fill: tuple[int, ...]


def _affine(image: Image.Image, matrix: tuple[float, ...], canvas: Canvas):
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        resample=canvas.resample,
        fillcolor=canvas.fill,
    )


def _pixels(share: float, side: int, canvas: Canvas) -> float:
    nearest = canvas.resample == Image.Resampling.NEAREST
    return math.trunc(share * side) if nearest else share * side


def _shear_x(image, amount, canvas):
    return _affine(image, (1, amount, 0, 0, 1, 0), canvas)


def _shear_y(image, amount, canvas):
    return _affine(image, (1, 0, 0, amount, 1, 0), canvas)


def _translate_x(image, amount, canvas):
    shift = _pixels(amount, image.width, canvas)
    return _affine(image, (1, 0, shift, 0, 1, 0), canvas)


def _translate_y(image, amount, canvas):
    shift = _pixels(amount, image.height, canvas)
    return _affine(image, (1, 0, 0, 0, 1, shift), canvas)


def _rotate(image, amount, canvas):
    return image.rotate(amount, resample=canvas.resample, fillcolor=canvas.fill)


def _by_value(image: Image.Image, function: Callable[[np.ndarray], np.ndarray]):
    """Replaces each value of each channel."""
    table = function(np.arange(256)).astype(np.uint8)
    return image.point(table.tolist() * len(image.getbands()))


def _posterize(image, amount, canvas):
    return _by_value(image, lambda value: value & (0xFF00 >> int(amount)))


def _solarize(image, amount, canvas):
    return _by_value(image, lambda value: np.where(value < amount, value, 255 - value))


def _solarize_add(image, amount, canvas):
    """Adds to the dark half of the values."""
    return _by_value(
        image,
        lambda value: np.where(value < 128, np.minimum(value + amount, 255), value),
    )


def _enhance(kind) -> Callable:
    return lambda image, amount, canvas: kind(image).enhance(amount)


# name -> function of (image, amount, canvas).
OPERATIONS: Mapping[str, Callable] = {
    'Identity': lambda image, amount, canvas: image,
    'AutoContrast': lambda image, amount, canvas: ImageOps.autocontrast(image),
    'Equalize': lambda image, amount, canvas: ImageOps.equalize(image),
    'Invert': lambda image, amount, canvas: ImageOps.invert(image),
    'Rotate': _rotate,  # degrees
    'Posterize': _posterize,  # bits that are left
    'Solarize': _solarize,  # values from here are inverted
    'SolarizeAdd': _solarize_add,
    'Color': _enhance(ImageEnhance.Color),  # factors: 1 leaves the image as it is
    'Contrast': _enhance(ImageEnhance.Contrast),
    'Brightness': _enhance(ImageEnhance.Brightness),
    'Sharpness': _enhance(ImageEnhance.Sharpness),
    'ShearX': _shear_x,  # pixels per pixel
    'ShearY': _shear_y,
    'TranslateX': _translate_x,  # shares of width and height
    'TranslateY': _translate_y,
}


# --- Magnitudes -----------------------------------------------------------------


def _none(level: float, sign: int) -> float:
    return 0.0


def _signed(largest: float) -> Callable[[float, int], float]:
    return lambda level, sign: sign * level * largest


_ENHANCE = ('Color', 'Contrast', 'Brightness', 'Sharpness')

# name -> function of (level, sign): the amount at a level in [0, 1], 1 for magnitude 10
# of timm and 30 of torchvision. The sign, 1 or -1, is drawn for each image.
_TIMM: Mapping[str, Callable[[float, int], float]] = {
    'AutoContrast': _none,
    'Equalize': _none,
    'Invert': _none,
    'Rotate': _signed(30.0),
    'Posterize': lambda level, sign: int(level * 4),
    'Solarize': lambda level, sign: min(256, int(level * 256)),
    'SolarizeAdd': lambda level, sign: min(128, int(level * 110)),
    **dict.fromkeys(_ENHANCE, lambda level, sign: 0.1 + level * 1.8),
    'ShearX': _signed(0.3),
    'ShearY': _signed(0.3),
    'TranslateX': _signed(0.45),
    'TranslateY': _signed(0.45),
}
# The same, stronger as the magnitude grows, where the above grows weaker at first.
_TIMM_INCREASING: Mapping[str, Callable[[float, int], float]] = {
    **_TIMM,
    'Posterize': lambda level, sign: max(0, 4 - int(level * 4)),
    'Solarize': lambda level, sign: 256 - min(256, int(level * 256)),
    **dict.fromkeys(_ENHANCE, lambda level, sign: max(0.1, 1.0 + sign * level * 0.9)),
}
_PLAIN: Mapping[str, Callable[[float, int], float]] = {
    'Identity': _none,
    'ShearX': _signed(0.3),
    'ShearY': _signed(0.3),
    'TranslateX': _signed(-150 / 331),
    'TranslateY': _signed(-150 / 331),
    'Rotate': _signed(30.0),
    **dict.fromkeys(_ENHANCE, lambda level, sign: 1.0 + sign * level * 0.9),
    'Posterize': lambda level, sign: 8 - round(level * 4),
    'Solarize': lambda level, sign: 255.0 * (1.0 - level),
    'AutoContrast': _none,
    'Equalize': _none,
}
AMOUNTS = {'timm': _TIMM, 'timm_increasing': _TIMM_INCREASING, 'plain': _PLAIN}


# --- The policy -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Draws operations and applies them, to one image after the other.

    Attributes:
      amounts: a key of `AMOUNTS`: which operations there are, and how strong.
      num_ops: how many are drawn, with replacement.
      magnitude: their strength.
      full_magnitude: the magnitude of level 1.
      max_magnitude: noise does not lead beyond it.
      noise: standard deviation of the magnitude; infinite: uniform in
        [0, magnitude].
      probability: that an operation which was drawn is applied.
      resample: Pillow's filter.
      mean: of the dataset's pixels, in [0, 1], one per channel or one for all: the
        colour that comes in from outside.
    """

    amounts: str
    num_ops: int
    magnitude: float
    full_magnitude: float
    max_magnitude: float
    noise: float
    probability: float
    resample: Image.Resampling
    mean: tuple[float, ...]

    def __call__(self, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
        """Args: rng; image, uint8 `[h, w, c]`, c = 1 or 3. Returns the same shape."""
        channels = image.shape[2]
        if channels not in (1, 3):
            raise UserError(
                f'RandAugment needs images of 1 or 3 channels, not {times(image.shape)}'
            )
        fill = tuple(min(255, round(255 * value)) for value in self.mean)
        if len(fill) != channels:
            fill = (round(sum(fill) / len(fill)),) * channels
        canvas = Canvas(self.resample, fill)
        amounts = AMOUNTS[self.amounts]
        names = tuple(amounts)
        pixels = Image.fromarray(image[:, :, 0] if channels == 1 else image)
        for _ in range(self.num_ops):
            name = names[rng.integers(len(names))]
            if rng.random() >= self.probability:
                continue
            level = self._draw_magnitude(rng) / self.full_magnitude
            amount = amounts[name](level, 1 if rng.random() < 0.5 else -1)
            pixels = OPERATIONS[name](pixels, amount, canvas)
        return np.asarray(pixels).reshape(image.shape)

    def _draw_magnitude(self, rng: np.random.Generator) -> float:
        if math.isinf(self.noise):
            magnitude = rng.uniform(0.0, self.magnitude)
        else:
            magnitude = rng.normal(self.magnitude, self.noise)
        return min(max(magnitude, 0.0), self.max_magnitude)


# variant -> what a part of a spec stands for when it is left out.
_DEFAULTS: Mapping[str, Mapping[str, float]] = {
    'rand': {'m': 10, 'n': 2, 'p': 0.5, 'mstd': 0, 'mmax': 10, 'inc': 0},
    'plain': {'m': 9, 'n': 2},
}
_EXAMPLES = {'rand': 'rand-m9-mstd0.5-inc1', 'plain': 'plain-n2-m9'}
_FULL_MAGNITUDE = {'rand': 10, 'plain': 30}


def parse_randaugment(
    spec: str,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    interpolation: str = 'bicubic',
) -> RandAugment:
    """The operation that a spec describes: (rng, image) -> image, see `RandAugment`.

    Parts follow the variant in any order:

        m     magnitude: 'rand' 10, 'plain' 9 (of 30) when left out
        n     operations an image: 2
        p     probability of each: 0.5; 'plain' always applies them
        mstd  standard deviation of the magnitude: 0; above 100: uniform in [0, m]
        mmax  largest magnitude: 10. More is cut off, as in timm
        inc   1 for operations that grow stronger with the magnitude: 0

    Args:
      spec: as 'rand-m9-mstd0.5-inc1', or 'plain-n2-m9', which knows m and n only.
      mean: of the dataset's pixels in [0, 1], one per channel or one for all: fills
        what comes in from outside. 'plain' fills with black.
      interpolation: 'bicubic' or 'bilinear'. 'plain' takes the nearest pixel.

    Raises:
      UserError: for a spec that cannot be read.

    >>> augment = parse_randaugment('rand-m9-mstd0.5-inc1')
    >>> augment(np.random.default_rng(0), np.zeros((5, 7, 3), np.uint8)).shape
    (5, 7, 3)
    """
    variant, *parts = spec.split('-')
    if variant not in _DEFAULTS:
        raise unknown('variant of augment.randaugment', variant, _DEFAULTS)
    values = {**_DEFAULTS[variant], **_parse_parts(spec, variant, parts)}
    plain = variant == 'plain'
    amounts = 'timm_increasing' if values.get('inc') else 'timm'
    noise = values.get('mstd', 0)
    if interpolation not in INTERPOLATIONS:
        raise unknown('interpolation', interpolation, INTERPOLATIONS)
    return RandAugment(
        amounts='plain' if plain else amounts,
        num_ops=int(values['n']),
        magnitude=values['m'],
        full_magnitude=_FULL_MAGNITUDE[variant],
        max_magnitude=values.get('mmax', _FULL_MAGNITUDE[variant]),
        noise=math.inf if noise > 100 else noise,
        probability=values.get('p', 1),
        resample=Image.Resampling.NEAREST if plain else INTERPOLATIONS[interpolation],
        mean=(0.0,) if plain else tuple(mean),
    )


def _parse_parts(spec: str, variant: str, parts: list[str]) -> dict[str, float]:
    known = _DEFAULTS[variant]
    largest = {'plain': {'m': 30}, 'rand': {'p': 1, 'inc': 1}}[variant]
    values: dict[str, float] = {}
    for part in parts:
        match = re.fullmatch(r'([a-z]+?)(\d+(?:\.\d+)?|inf)', part)
        name = match[1] if match else ''
        if match is None or name not in known or (match[2] == 'inf' and name != 'mstd'):
            raise UserError(
                f'augment.randaugment {spec!r}: {part!r} is none of '
                f'{", ".join(known)} with a number, as in {_EXAMPLES[variant]!r}'
            )
        if name in values:
            raise UserError(f'augment.randaugment {spec!r} gives {name} twice')
        value = float(match[2])
        if name in ('n', 'inc') and not value.is_integer():
            raise UserError(
                f'augment.randaugment {spec!r}: {name} is a whole number, not {value}'
            )
        if value > largest.get(name, math.inf):
            raise UserError(
                f'augment.randaugment {spec!r}: {name} is at most {largest[name]}'
            )
        if name in ('n', 'mmax') and value == 0:
            raise UserError(f'augment.randaugment {spec!r}: {name} is above 0')
        values[name] = value
    return values
