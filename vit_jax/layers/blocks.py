"""The Transformer's encoder block, for any attention."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.layers.mlp import MlpBlock
from vit_jax.layers.stochastic import Dropout, DropPath
from vit_jax.typing import Array, Dtype, Initializer


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Attention mixes tokens, the MLP transforms each of them ("An Image is Worth
    16x16 Words", arXiv 2010.11929, equations 2 and 3).

    Attributes:
      attention: makes the attention module from `name=`, which is called as
        `module(x, train=train)` and keeps the shape `[B, T, D]`.
      mlp_dim: F, hidden size of the MLP.
      dropout_rate: dropout after the attention and in the MLP.
      drop_path_rate: stochastic depth of both branches.
      layer_norm_eps: epsilon of the LayerNorms, which compute in float32.
      gelu_variant: 'exact' or 'tanh'.
      kernel_init: initializer of the MLP's kernels.
      dtype: dtype of the computation; parameters are float32.
    """

    attention: Callable[..., nn.Module]
    mlp_dim: int
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    layer_norm_eps: float = 1e-6
    gelu_variant: str = 'exact'
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x, `[B, T, D]`; train, whether dropout is on. Returns `[B, T, D]`."""
        norm = {'epsilon': self.layer_norm_eps, 'dtype': self.dtype}

        y = nn.LayerNorm(name='norm1', **norm)(x)
        y = self.attention(name='attention')(y, train=train)
        y = Dropout(self.dropout_rate, name='dropout')(y, train=train)
        x = x + DropPath(self.drop_path_rate, name='drop_path1')(y, train=train)

        y = nn.LayerNorm(name='norm2', **norm)(x)
        y = MlpBlock(
            self.mlp_dim,
            self.dropout_rate,
            self.gelu_variant,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name='mlp',
        )(y, train=train)
        return x + DropPath(self.drop_path_rate, name='drop_path2')(y, train=train)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth of each block: from 0 at the first to `rate` at the last.

    >>> drop_path_rates(0.5, 3)
    [0.0, 0.25, 0.5]
    """
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
