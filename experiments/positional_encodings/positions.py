"""Positions of ViT's own ablation that `PositionEmbedding` does not have.

"An Image is Worth 16x16 Words", arXiv 2010.11929, appendix D.4: beside no positions and
learned ones of each patch, a learned one of each row and of each column, and relative
ones inside the attention.
"""

import math

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.layers.attention import (
    apply_weights,
    attention_weights,
    dot_product_attention,
    merge_heads,
    needs_weights,
    project_heads,
    resolve_head_dim,
)
from vit_jax.layers.relative import relative_logits
from vit_jax.layers.stochastic import Dropout
from vit_jax.typing import Array, Dtype, Grid, Initializer


class LearnedAxes(nn.Module):
    """Learned positions of rows in one half of the features, of columns in the other.

    For `model.kwargs.posemb` of ViT. Tokens before the grid's have rows of their own.
    """

    embedding_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: Array, grid: Grid) -> Array:
        """Args: x, `[B, P + R C, D]`; the grid, (R, C). Returns the same shape.

        >>> import jax
        >>> x = jnp.zeros((2, 1 + 15, 8))
        >>> _, variables = LearnedAxes().init_with_output(jax.random.key(0), x, (3, 5))
        >>> {name: leaf.shape for name, leaf in variables['params'].items()}
        {'rows': (3, 4), 'columns': (5, 4), 'prefix': (1, 8)}
        """
        rows, columns = grid
        num_tokens, width = x.shape[1:]

        def table(name: str, length: int, features: int) -> Array:
            shape = length, features
            return self.param(name, self.embedding_init, shape, jnp.float32)

        by_row = table('rows', rows, width // 2)
        by_column = table('columns', columns, width - width // 2)
        cells = [jnp.repeat(by_row, columns, axis=0), jnp.tile(by_column, (rows, 1))]
        prefix = table('prefix', num_tokens - math.prod(grid), width)
        learned = jnp.concatenate([prefix, jnp.concatenate(cells, axis=1)])
        return x + learned.astype(x.dtype)


class RelativeAttention(nn.Module):
    """Attention that asks for offsets too: softmax_j(q_i (k_j + r_(j - i)) / sqrt(H)).

    For `model.kwargs.attention` of ViT; the attributes are those that ViT sets. Offsets
    are of tokens in a row, the class token first: the paper's have one dimension. All
    heads share the table r, each layer has its own.
    """

    num_heads: int
    qkv_bias: bool = True
    dropout_rate: float = 0.0
    impl: str = 'auto'
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x, `[B, T, D]`; train, whether dropout is on. Returns `[B, T, D]`."""
        length, width = x.shape[1:]
        size = resolve_head_dim(width, self.num_heads, None)
        maps = {'kernel_init': self.kernel_init, 'dtype': self.dtype}
        query, key, value = (
            project_heads(
                self.num_heads, size, use_bias=self.qkv_bias, name=name, **maps
            )(x)
            for name in ('query', 'key', 'value')
        )
        init = nn.initializers.normal(size**-0.5)
        offsets = self.param('offsets', init, (2 * length - 1, size), jnp.float32)
        same_row = jnp.zeros((1, size))
        logits = relative_logits(query, same_row, offsets, (1, length))
        bias = size**-0.5 * logits
        if needs_weights(self, self.dropout_rate, train):
            weights = attention_weights(query, key, bias=bias)
            self.sow('intermediates', 'attention_weights', weights)
            weights = Dropout(self.dropout_rate, name='dropout')(weights, train=train)
            out = apply_weights(weights, value)
        else:
            out = dot_product_attention(query, key, value, bias=bias, impl=self.impl)
        return merge_heads(width, name='out', **maps)(out)
