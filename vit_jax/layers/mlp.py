"""The MLP of a Transformer block: it transforms each token by itself."""

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.errors import unknown
from vit_jax.layers.stochastic import Dropout
from vit_jax.typing import Array, Dtype, Initializer

GELUS = ('exact', 'tanh')


def gelu(x: Array, variant: str = 'exact') -> Array:
    """x Phi(x), "Gaussian Error Linear Units", arXiv 1606.08415.

    Args:
      x: any shape.
      variant: 'exact' (erf, as PyTorch's models) or 'tanh' (its approximation, as
        JAX's default).
    """
    if variant not in GELUS:
        raise unknown('GELU variant', variant, GELUS)
    return nn.gelu(x, approximate=variant == 'tanh')


class MlpBlock(nn.Module):
    """Two linear maps with a GELU between.

    Attributes:
      mlp_dim: F, the hidden size.
      dropout_rate: dropout after each linear map.
      gelu_variant: 'exact' or 'tanh'.
      kernel_init: initializer of both kernels.
      dtype: dtype of the computation; parameters are float32.
    """

    mlp_dim: int
    dropout_rate: float = 0.0
    gelu_variant: str = 'exact'
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x, `[..., D]`; train, whether dropout is on. Returns `[..., D]`."""
        width = x.shape[-1]
        dense = {'kernel_init': self.kernel_init, 'dtype': self.dtype}
        x = nn.Dense(self.mlp_dim, name='fc1', **dense)(x)
        x = gelu(x, self.gelu_variant)
        x = Dropout(self.dropout_rate, name='dropout1')(x, train=train)
        x = nn.Dense(width, name='fc2', **dense)(x)
        return Dropout(self.dropout_rate, name='dropout2')(x, train=train)
