"""Pooling: one vector from many tokens."""

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.layers.attention import MultiHeadAttention
from vit_jax.layers.mlp import MlpBlock
from vit_jax.layers.norm import layer_norm
from vit_jax.typing import Array, Dtype, Initializer


class ClassToken(nn.Module):
    """Puts a learned token before the others.

    "An Image is Worth 16x16 Words", arXiv 2010.11929, section 3.1.

    Attributes:
      token_init: initializer of the token.
    """

    token_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Args: x, `[B, T, D]`. Returns `[B, 1 + T, D]`.

        >>> import jax
        >>> x = jnp.ones((3, 5, 8))
        >>> ClassToken().init_with_output(jax.random.key(0), x)[0].shape
        (3, 6, 8)
        """
        token = self.param(
            'cls', self.token_init, (1, 1, x.shape[-1]), jnp.float32
        ).astype(x.dtype)
        return jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)


class AttentionPool(nn.Module):
    """A learned query attends to all tokens, then an MLP with a residual.

    "Set Transformer", arXiv 1810.00825, as used by "Scaling Vision Transformers",
    arXiv 2106.04560 (its MAP head).

    Attributes:
      num_heads: heads of the attention.
      mlp_dim: hidden size of the MLP.
      layer_norm_eps: epsilon of the LayerNorm.
      activation: see `get_activation`.
      attention_impl: see `dot_product_attention`.
      dtype: dtype of the computation; parameters are float32.
    """

    num_heads: int
    mlp_dim: int
    layer_norm_eps: float = 1e-6
    activation: str = 'gelu'
    attention_impl: str = 'auto'
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x, `[B, T, D]`; train, whether dropout is on. Returns `[B, D]`.

        >>> import jax
        >>> pool, x = AttentionPool(num_heads=2, mlp_dim=16), jnp.ones((3, 5, 8))
        >>> pool.apply(pool.init(jax.random.key(0), x), x).shape
        (3, 8)
        """
        init = nn.initializers.xavier_uniform()
        probe = self.param('probe', init, (1, 1, x.shape[-1]), jnp.float32).astype(
            x.dtype
        )
        probe = jnp.tile(probe, (x.shape[0], 1, 1))
        attention = MultiHeadAttention(
            self.num_heads, impl=self.attention_impl, dtype=self.dtype, name='attention'
        )
        x = attention(probe, x, train=train)
        y = layer_norm(self.layer_norm_eps, dtype=self.dtype, name='norm')(x)
        mlp = MlpBlock(
            self.mlp_dim,
            activation=self.activation,
            dtype=self.dtype,
            name='mlp',
        )
        y = mlp(y, train=train)
        return (x + y)[:, 0]


def pool_tokens(x: Array, pool: str) -> Array:
    """The class token (the first) or the mean of the tokens.

    Args:
      x: `[B, T, D]`.
      pool: 'cls' or 'mean'.

    Returns:
      `[B, D]`, a mean in float32.
    """
    return x[:, 0] if pool == 'cls' else jnp.mean(x, axis=1, dtype=jnp.float32)
