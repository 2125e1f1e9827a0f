"""The digits that ship with scikit-learn, as a TFDS dataset."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 handwritten digits of 8x8 grey pixels; every fifth is the test split.

    "Optical Recognition of Handwritten Digits", UCI, through
    `sklearn.datasets.load_digits`. Needs no network and no TensorFlow.
    """

    VERSION = tfds.core.Version('1.0.0')

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                'image': tfds.features.Image(shape=(8, 8, 1), encoding_format='png'),
                'label': tfds.features.ClassLabel(num_classes=10),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {
            'train': self._generate_examples(test=False),
            'test': self._generate_examples(test=True),
        }

    def _generate_examples(self, test: bool):
        from sklearn.datasets import load_digits  # 1 s, needed once

        digits = load_digits()
        for i, (image, label) in enumerate(zip(digits.images, digits.target)):
            if (i % 5 == 4) == test:
                pixels = np.round(image * (255 / 16)).astype(np.uint8)
                png = io.BytesIO()
                Image.fromarray(pixels).save(png, 'PNG')
                png.seek(0)
                yield i, {'image': png, 'label': int(label)}
