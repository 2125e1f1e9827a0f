"""A model of our own."""

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.layers.norm import batch_norm


class Pixels(nn.Module):
    """A linear classifier of pixels, with running statistics of its inputs."""

    num_classes: int
    width: int = 12
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, image, *, train=False):
        x = image.reshape(image.shape[0], -1)
        x = nn.Dense(self.width, dtype=self.dtype)(x)
        x = batch_norm(use_running_average=not train, momentum=0.5, name='norm')(x)
        return nn.Dense(self.num_classes)(nn.relu(x))
