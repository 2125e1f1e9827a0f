"""Digits cut in four parts that lie apart: in their places, or in each other's.

Both classes hold the same parts, so that what tells them apart is the arrangement
alone. A gap keeps strokes from going on across a cut, and the whole lies anywhere on a
larger canvas. Its border still tells places apart: what touches it above is a part of
the upper row. So models that shall not know a part's place must not see the border.

Scrambled, the upper and the lower parts change places. Left and right must not: the
outer columns of a digit are blank, and ink there would give it away. What a part looks
like and which of its sides is turned outwards gives much away still: see README.
"""

import dataclasses
from typing import Any

import numpy as np

from vit_jax.data.datasets import Dataset, DataSource, load_dataset
from vit_jax.data.transforms import decode_image

CANVAS = 16  # pixels a side
GAP = 2  # between parts
PART = 4  # pixels a side, a quarter of a digit
REPEATS = {'train': 8, 'test': 2}  # arrangements of each digit, half of them right
RIGHT = (0, 1, 2, 3)
SCRAMBLED = (2, 3, 0, 1)


def arrange(
    image: np.ndarray, order: tuple[int, ...], row: int, col: int
) -> np.ndarray:
    """The parts of a digit on a canvas.

    Args:
      image: `[8, 8, 1]`.
      order: which part lies in each of the four places, row by row.
      row, col: where the whole begins, 0 to `CANVAS - 2 * PART - GAP`.

    Returns:
      `[16, 16, 1]`, of the image's dtype.
    """
    canvas = np.zeros((CANVAS, CANVAS, 1), image.dtype)
    for place, part in enumerate(order):
        (y, x), (py, px) = divmod(part, 2), divmod(place, 2)
        top, left = row + py * (PART + GAP), col + px * (PART + GAP)
        cut = image[y * PART : (y + 1) * PART, x * PART : (x + 1) * PART]
        canvas[top : top + PART, left : left + PART] = cut
    return canvas


@dataclasses.dataclass(frozen=True)
class Arranged:
    """Example i is a function of i: of digit i // repeats, right where i is even.

    Places are drawn anew for each split.
    """

    digits: DataSource
    split: str

    def __len__(self) -> int:
        return len(self.digits) * REPEATS[self.split]

    def __getitem__(self, index: int) -> dict[str, Any]:
        digit = self.digits[index // REPEATS[self.split]]
        rng = np.random.default_rng([[*REPEATS].index(self.split), index])
        label = index % 2
        order = SCRAMBLED if label else RIGHT
        row, col = rng.integers(CANVAS - 2 * PART - GAP + 1, size=2)
        pixels = decode_image(digit['image'], 1, digit['name'])
        image = arrange(pixels, order, int(row), int(col))
        return {'image': image, 'label': label, 'name': f'{digit["name"]} {order}'}


def make_halves(data_dir: str | None) -> Dataset:
    """For `config.dataset.name = 'experiments.parts.data:make_halves'`."""
    digits = load_dataset('digits', data_dir)

    def open_split(split: str) -> Arranged:
        return Arranged(digits.open(split), split)

    return dataclasses.replace(
        digits,
        name='parts of digits',
        splits={split: digits.splits[split] * n for split, n in REPEATS.items()},
        class_names=('right', 'scrambled'),
        image_shape=(CANVAS, CANVAS, 1),
        open=open_split,
    )
