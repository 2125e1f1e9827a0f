"""From encoded tokens to logits."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.errors import UserError, unknown
from vit_jax.layers.norm import layer_norm
from vit_jax.layers.pooling import AttentionPool, pool_tokens
from vit_jax.typing import Array, Dtype, Initializer

POOLS = ('cls', 'mean', 'map')


class Head(nn.Module):
    """Norm, pooling, an optional hidden layer (pre-logits), and the classifier.

    "An Image is Worth 16x16 Words", arXiv 2010.11929, section 3.1. Distilled, the class
    token and the distillation token have a classifier each, and the logits are the mean
    of both (DeiT, arXiv 2012.12877, section 4). To teach the second one by another
    model is a matter of a task; without, both learn from the label, through their mean.

    Attributes:
      num_classes: V; None returns the pooled features, distilled the mean of both
        tokens'.
      pool: 'cls' (the first token), 'mean' or 'map' (attention pooling).
      num_heads: heads of the 'map' pooling.
      mlp_dim: hidden size of the 'map' pooling.
      representation_size: size of the tanh layer before the classifier; None for
        no such layer.
      distilled: whether the token after the class token is a distillation token.
      layer_norm_eps: epsilon of the LayerNorms.
      activation, attention_impl: of the 'map' pooling.
      head_init: initializer of the classifier's kernel.
      dtype: dtype of the computation; the classifier computes in float32.
    """

    num_classes: int | None
    pool: str
    num_heads: int
    mlp_dim: int
    representation_size: int | None = None
    distilled: bool = False
    layer_norm_eps: float = 1e-6
    activation: str = 'gelu'
    attention_impl: str = 'auto'
    head_init: Initializer = nn.initializers.zeros
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Classifies encoded tokens.

        Args:
          x: `[B, T, D]`; for 'cls' the class token comes first, distilled the
            distillation token second.
          train: whether dropout is on.

        Returns:
          `[B, V]` float32; distilled, the mean of both classifiers, whose own logits
          are sown as 'both_logits' in the collection 'distillation' (to ask for
          'intermediates' would make every attention form its weights).

        Raises:
          UserError: for an unknown `pool`, or one that is not 'cls' when distilled.

        >>> import jax
        >>> head = Head(num_classes=7, pool='map', num_heads=2, mlp_dim=16)
        >>> x = jnp.ones((3, 5, 8))
        >>> head.apply(head.init(jax.random.key(0), x), x).shape
        (3, 7)
        """
        if self.pool not in POOLS:
            raise unknown('pool', self.pool, POOLS)
        if self.distilled and self.pool != 'cls':
            raise UserError(
                'distilled=True reads the class token and the distillation token: it '
                f"needs pool='cls', not {self.pool!r}"
            )
        x = layer_norm(self.layer_norm_eps, dtype=self.dtype, name='norm')(x)
        if self.pool == 'map':
            pool = AttentionPool(
                self.num_heads,
                self.mlp_dim,
                self.layer_norm_eps,
                self.activation,
                self.attention_impl,
                dtype=self.dtype,
                name='pool',
            )
            x = pool(x, train=train)
        elif self.distilled:
            x = x[:, :2]  # both tokens, [B, 2, D]
        else:
            x = pool_tokens(x, self.pool)
        if self.representation_size is not None:
            x = nn.Dense(self.representation_size, dtype=self.dtype, name='pre_logits')(
                x
            )
            x = jnp.tanh(x)
        x = x.astype(jnp.float32)
        if self.num_classes is None:
            return jnp.mean(x, axis=1) if self.distilled else x
        classifier = partial(nn.Dense, self.num_classes, kernel_init=self.head_init)
        if not self.distilled:
            return classifier(name='logits')(x)
        by_cls = classifier(name='logits')(x[:, 0])
        by_dist = classifier(name='dist_logits')(x[:, 1])
        if not self.is_initializing():  # else they would be variables of the model
            self.sow('distillation', 'both_logits', (by_cls, by_dist))
        return (by_cls + by_dist) / 2
