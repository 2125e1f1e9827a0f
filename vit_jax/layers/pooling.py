"""Tokens beside those of the image, and pooling: one vector from many tokens."""

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.layers.attention import MultiHeadAttention
from vit_jax.layers.mlp import MlpBlock
from vit_jax.layers.norm import layer_norm
from vit_jax.typing import Array, Dtype, Initializer


class ClassToken(nn.Module):
    """Puts a learned token before the others, or two.

    "An Image is Worth 16x16 Words", arXiv 2010.11929, section 3.1; the second is the
    distillation token of DeiT, arXiv 2012.12877, section 4.

    Attributes:
      token_init: initializer of the tokens.
      distilled: whether a distillation token follows the class token.
    """

    token_init: Initializer = nn.initializers.zeros
    distilled: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Args: x, `[B, T, D]`. Returns `[B, 1 + T, D]`; distilled `[B, 2 + T, D]`.

        >>> import jax
        >>> x = jnp.ones((3, 5, 8))
        >>> ClassToken().init_with_output(jax.random.key(0), x)[0].shape
        (3, 6, 8)
        """
        names = ('cls', 'dist') if self.distilled else ('cls',)
        shape = (1, 1, x.shape[-1])
        tokens = [
            self.param(name, self.token_init, shape, jnp.float32) for name in names
        ]
        return jnp.concatenate([*(_repeat(token, x) for token in tokens), x], axis=1)


class Registers(nn.Module):
    """Puts learned tokens between the class token and those of the image.

    Room to note what is no part of the image: "Vision Transformers Need Registers",
    arXiv 2309.16588, section 2.2.

    Attributes:
      num_tokens: K.
      token_init: initializer of the tokens. Without positions, tokens that start
        equal stay equal: it must draw them.
    """

    num_tokens: int
    token_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: Array, num_prefix: int) -> Array:
        """Args: x, `[B, P + T, D]`; num_prefix, P. Returns `[B, P + K + T, D]`.

        >>> import jax
        >>> x = jnp.ones((3, 1 + 5, 8))
        >>> Registers(4).init_with_output(jax.random.key(0), x, num_prefix=1)[0].shape
        (3, 10, 8)
        """
        shape = (1, self.num_tokens, x.shape[-1])
        tokens = _repeat(self.param('tokens', self.token_init, shape, jnp.float32), x)
        return jnp.concatenate([x[:, :num_prefix], tokens, x[:, num_prefix:]], axis=1)


def _repeat(tokens: Array, x: Array) -> Array:
    """`[1, K, D]` for each example of x, in its dtype."""
    return jnp.tile(tokens.astype(x.dtype), (x.shape[0], 1, 1))


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
        probe = self.param('probe', init, (1, 1, x.shape[-1]), jnp.float32)
        probe = _repeat(probe, x)
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
