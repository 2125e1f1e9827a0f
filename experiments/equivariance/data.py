"""Digits in the middle of a larger canvas, so that a shift loses nothing of them."""

import dataclasses
from typing import Any

import numpy as np

from vit_jax.data.datasets import Dataset, DataSource, load_dataset
from vit_jax.data.transforms import decode_image

MARGIN = 4  # blank pixels on every side


@dataclasses.dataclass(frozen=True)
class Framed:
    """The digits of a split, each in a frame of zeros."""

    digits: DataSource

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        digit = self.digits[index]
        pixels = decode_image(digit['image'], 1, digit['name'])
        frame = (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)
        return {**digit, 'image': np.pad(pixels, frame)}


def make(data_dir: str | None) -> Dataset:
    """For `config.dataset.name = 'experiments.equivariance.data:make'`."""
    digits = load_dataset('digits', data_dir)
    height, width, channels = digits.image_shape
    return dataclasses.replace(
        digits,
        name='digits in a frame',
        image_shape=(height + 2 * MARGIN, width + 2 * MARGIN, channels),
        open=lambda split: Framed(digits.open(split)),
    )
