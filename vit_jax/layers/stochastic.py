"""Dropout and stochastic depth, keyed per example.

Flax's own `nn.Dropout` draws one mask for the rows it sees, so its result depends
on how many devices share the batch. Here each row has a key of its own
(`axes.example_keys`): one device, a mesh and `pmap` draw the same masks.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.axes import example_keys
from vit_jax.errors import UserError
from vit_jax.typing import Array


class Dropout(nn.Module):
    """Sets entries to zero with probability `rate`, scales the others up.

    "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014.

    Attributes:
      rate: probability of zero, in [0, 1).
      shared_axes: axes, the batch excluded, along which the mask is the same.
    """

    rate: float
    shared_axes: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x, `[B, ...]`; the rows are examples. Returns the same shape.

        >>> rngs = {'dropout': jax.random.key(0)}
        >>> x = jnp.ones((1, 1000))
        >>> out = Dropout(0.5).apply({}, x, train=True, rngs=rngs)
        >>> sorted(set(out.ravel().tolist()))
        [0.0, 2.0]
        """
        if not 0.0 <= self.rate < 1.0:
            raise UserError(f'a dropout rate is in [0, 1), not {self.rate}')
        if not train or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        shared = {axis % x.ndim for axis in self.shared_axes}
        shape = [1 if axis in shared else n for axis, n in enumerate(x.shape)][1:]
        keys = example_keys(self.make_rng('dropout'), x.shape[0])
        mask = jax.vmap(lambda key: jax.random.bernoulli(key, keep, shape))(keys)
        return jnp.where(mask, x / keep, jnp.zeros_like(x))


class DropPath(nn.Module):
    """Drops a residual branch for whole examples: stochastic depth.

    "Deep Networks with Stochastic Depth", arXiv 1603.09382; kept branches are
    scaled by 1 / (1 - rate) at training, so evaluation needs no change.

    Attributes:
      rate: probability that the branch of an example is dropped, in [0, 1).
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x, `[B, ...]`, a residual branch. Returns the same shape.

        >>> rngs = {'dropout': jax.random.key(0)}
        >>> out = DropPath(0.5).apply({}, jnp.ones((9, 2, 3)), train=True, rngs=rngs)
        >>> bool((out == out[:, :1, :1]).all())  # a branch is kept or dropped whole
        True
        """
        all_but_batch = tuple(range(1, x.ndim))
        dropout = Dropout(self.rate, shared_axes=all_but_batch, name='dropout')
        return dropout(x, train=train)
