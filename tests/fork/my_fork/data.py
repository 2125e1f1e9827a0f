"""A dataset of our own: stripes, upright or lying."""

import numpy as np

from vit_jax.data.datasets import Dataset


class Stripes:
    def __len__(self):
        return 24

    def __getitem__(self, index):
        image = np.zeros((6, 6, 1), np.uint8)
        image[index // 2 % 2 :: 2] = 255
        if index % 2:
            image = image.transpose(1, 0, 2)
        return {'image': image, 'label': index % 2, 'name': f'stripes[{index}]'}


def stripes(data_dir):
    return Dataset(
        name='stripes',
        location='generated',
        splits={'train': 24, 'test': 24},
        class_names=('lying', 'upright'),
        image_shape=(6, 6, 1),
        open=lambda split: Stripes(),
    )
