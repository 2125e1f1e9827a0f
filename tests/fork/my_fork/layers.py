"""Attention of our own: for a Transformer, and for a ResNet."""

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.layers.attention import MultiHeadAttention


class LinearAttention(nn.Module):
    """Attention with a kernel instead of the softmax, arXiv 2006.16236."""

    num_heads: int
    qkv_bias: bool
    dropout_rate: float
    impl: str
    kernel_init: nn.initializers.Initializer
    dtype: object

    @nn.compact
    def __call__(self, x, *, train=False):
        head_dim = x.shape[-1] // self.num_heads
        q, k, v = (
            nn.DenseGeneral((self.num_heads, head_dim), dtype=self.dtype, name=name)(x)
            for name in ('query', 'key', 'value')
        )
        q, k = nn.elu(q) + 1, nn.elu(k) + 1
        memory = jnp.einsum('BSNH,BSND->BNHD', k, v)
        total = jnp.einsum('BTNH,BNH->BTN', q, k.sum(axis=1))
        out = jnp.einsum('BTNH,BNHD->BTND', q, memory) / total[..., None]
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name='out')(out)


class RowAttention(nn.Module):
    """Attention within each row of a feature map, in the place of a convolution."""

    features: int
    strides: int = 1
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, *, train=False):
        """Args: x, `[B, R, C, D]`. Returns `[B, R / s, C / s, features]`."""
        batch, rows, cols, _ = x.shape
        x = nn.Dense(self.features, dtype=self.dtype, name='project')(x)
        tokens = x.reshape(batch * rows, cols, self.features)
        attention = MultiHeadAttention(2, dtype=self.dtype, name='attention')
        x = attention(tokens, train=train).reshape(x.shape)
        return x[:, :: self.strides, :: self.strides]
