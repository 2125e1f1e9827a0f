"""A multi-layer perceptron of the pixels: the baseline that knows no arrangement."""

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.errors import UserError, times
from vit_jax.layers.mlp import get_activation
from vit_jax.layers.stochastic import Dropout
from vit_jax.typing import Array, Dtype


class MLP(nn.Module):
    """All pixels in one vector, hidden layers, a classifier.

    Attributes:
      num_classes: V; None returns the last hidden layer.
      widths: size of each hidden layer.
      activation: after each hidden layer, see `get_activation`.
      dropout_rate: dropout after each hidden layer.
      dtype: dtype of the computation; parameters are float32.
    """

    num_classes: int | None
    widths: tuple[int, ...] = (512, 512)
    activation: str = 'gelu'
    dropout_rate: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        """Classifies images of one size, which it knows as a number of pixels only.

        Args:
          image: `[B, *size, channels]`.
          train: whether dropout is on (rng 'dropout').

        Returns:
          Logits `[B, V]`, float32.

        Raises:
          UserError: for an image of another number of pixels than the parameters'.

        >>> import jax
        >>> model = MLP(num_classes=7, widths=(16,))
        >>> image = jnp.ones((3, 4, 10, 1))
        >>> variables = model.init(jax.random.key(0), image)
        >>> model.apply(variables, image).shape
        (3, 7)
        """
        x = image.reshape(image.shape[0], -1)
        self._check_size(image.shape[1:], x.shape[-1])
        activation = get_activation(self.activation)
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, dtype=self.dtype, name=f'fc{i}')(x)
            x = Dropout(self.dropout_rate, name=f'dropout{i}')(
                activation(x), train=train
            )
        x = x.astype(jnp.float32)
        if self.num_classes is None:
            return x
        return nn.Dense(self.num_classes, name='head')(x)

    def _check_size(self, size: tuple[int, ...], number: int) -> None:
        first = 'fc0' if self.widths else 'head'
        if not self.has_variable('params', first):
            return
        expected: int = self.get_variable('params', first)['kernel'].shape[0]
        if expected != number:
            raise UserError(
                f'the model takes images of {expected} numbers; got {times(size)} = '
                f'{number}'
            )
