"""The MLP of a Transformer block: it transforms each token by itself."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.errors import unknown
from vit_jax.layers.stochastic import Dropout
from vit_jax.typing import Array, Dtype, Initializer

# x Phi(x), "Gaussian Error Linear Units", arXiv 1606.08415: by the error function, as
# PyTorch's models, or by the approximation that is JAX's default.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    'gelu': partial(nn.gelu, approximate=False),
    'gelu_tanh': partial(nn.gelu, approximate=True),
    'relu': nn.relu,
}


def get_activation(name: str) -> Callable[[Array], Array]:
    """The activation of that name.

    Args:
      name: 'gelu' (exact), 'gelu_tanh' (approximate) or 'relu'.

    Raises:
      UserError: for another name.
    """
    if name not in ACTIVATIONS:
        raise unknown('activation', name, ACTIVATIONS)
    return ACTIVATIONS[name]


class MlpBlock(nn.Module):
    """Two linear maps with an activation between.

    Attributes:
      mlp_dim: F, the hidden size.
      dropout_rate: dropout after each linear map.
      activation: see `get_activation`.
      hidden_dropout_rate: dropout after the first map, of the hidden units; None for
        `dropout_rate`.
      kernel_init: initializer of both kernels.
      dtype: dtype of the computation; parameters are float32.
    """

    mlp_dim: int
    dropout_rate: float = 0.0
    activation: str = 'gelu'
    hidden_dropout_rate: float | None = None
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x, `[..., D]`; train, whether dropout is on. Returns `[..., D]`.

        >>> import jax
        >>> block, x = MlpBlock(mlp_dim=16), jnp.ones((3, 5, 8))
        >>> block.apply(block.init(jax.random.key(0), x), x).shape
        (3, 5, 8)
        """
        width, hidden_rate = x.shape[-1], self.hidden_dropout_rate
        hidden_rate = self.dropout_rate if hidden_rate is None else hidden_rate
        dense = {'kernel_init': self.kernel_init, 'dtype': self.dtype}
        x = nn.Dense(self.mlp_dim, name='fc1', **dense)(x)
        x = get_activation(self.activation)(x)
        x = Dropout(hidden_rate, name='dropout1')(x, train=train)
        x = nn.Dense(width, name='fc2', **dense)(x)
        return Dropout(self.dropout_rate, name='dropout2')(x, train=train)
