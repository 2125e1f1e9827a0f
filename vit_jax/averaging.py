"""Averages of a model: over the steps of a run, and over its checkpoints.

Floating leaves are averaged, statistics of BatchNorm included; others are the newest.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.typing import Array, Variables


def init_average(variables: Variables) -> Variables:
    """The average before the first step: a copy, float32 or wider."""

    def copy(x: Array) -> Array:
        wide = jnp.promote_types(x.dtype, jnp.float32) if _is_floating(x) else x.dtype
        return jnp.array(x, wide, copy=True)  # a state's buffers are given away

    return jax.tree.map(copy, variables)


def ema_update(average: Variables, variables: Variables, decay: float) -> Variables:
    """Exponential moving average: `decay` of the old and `1 - decay` of the new.

    From the first step on, without warm-up, as DeiT's with its decay of 0.99996
    (arXiv 2012.12877; timm's `ModelEma`): it forgets its start over some
    `1 / (1 - decay)` steps, so a short run needs a smaller decay.

    Args:
      average: from `init_average`, or the last of these.
      variables: the model's, after the step.
      decay: in [0, 1).

    >>> average = init_average({'params': {'bias': jnp.array([1.0, 3.0])}})
    >>> ema_update(average, {'params': {'bias': jnp.array([2.0, 3.0])}}, 0.75)
    {'params': {'bias': Array([1.25, 3.  ], dtype=float32)}}
    """
    return _move(average, variables, 1.0 - decay)


def mean_of(trees: Iterable[Variables]) -> Variables:
    """Mean of the variables of several checkpoints, of which one is held at a time.

    Args:
      trees: of the same structure and shapes; each is dropped before the next is
        asked for. Where they lie on many devices, so does the mean.

    Returns:
      Float32 leaves, or wider, where they are floating.

    Raises:
      UserError: when there is none.

    >>> checkpoints = ({'bias': jnp.array([x, 5.0])} for x in (1.0, 2.0, 6.0))
    >>> mean_of(checkpoints)
    {'bias': Array([3., 5.], dtype=float32)}
    """
    trees = iter(trees)
    first = next(trees, None)
    if first is None:
        raise UserError('there is no checkpoint to average')
    mean = init_average(first)
    del first
    move = jax.jit(_move, donate_argnums=0)
    count = 1
    for tree in trees:
        count += 1
        mean = move(mean, tree, 1.0 / count)
        del tree  # before the next one is read
    return mean


def _move(average: Variables, variables: Variables, share: float | Array) -> Variables:
    """The average, moved towards the new values by a share of the way.

    Written so, and not as a sum of two products, it is exact where both agree.
    """

    def move(old: Array, new: Array) -> Array:
        if not _is_floating(old):
            return new
        return old + jnp.asarray(share, old.dtype) * (new.astype(old.dtype) - old)

    return jax.tree.map(move, average, variables)


def _is_floating(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
