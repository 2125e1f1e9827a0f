"""Norms of feature maps: over the global batch, or over groups of channels."""

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.axes import batch_axis
from vit_jax.errors import unknown
from vit_jax.typing import Dtype

NORMS = ('batch', 'group')


def batch_norm(**kwargs) -> nn.BatchNorm:
    """`nn.BatchNorm` whose statistics are those of the whole batch.

    "Batch Normalization", arXiv 1502.03167. Under `jit` over a mesh the batch is
    whole already; under `pmap` the devices average their moments.

    Args:
      **kwargs: fields of `nn.BatchNorm`.
    """
    return nn.BatchNorm(axis_name=batch_axis(), **kwargs)


def make_norm(
    kind: str,
    *,
    eps: float,
    num_groups: int,
    train: bool,
    name: str,
    dtype: Dtype = jnp.float32,
) -> nn.Module:
    """The norm of a convolutional network, called on `[B, R, C, D]`.

    Args:
      kind: 'batch' (`batch_norm`; a tenth of each batch's statistics enters the
        running ones, the variance without the correction n / (n - 1) that PyTorch's
        running variance has) or 'group' ("Group Normalization", arXiv 1803.08494).
      eps: added to the variance.
      num_groups: groups of 'group'; must divide D.
      train: whether 'batch' uses the statistics of the batch, or the running ones.
      name: of the module.
      dtype: dtype of the computation; statistics and parameters are float32.

    Raises:
      UserError: for an unknown `kind`.
    """
    if kind == 'batch':
        return batch_norm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=eps,
            dtype=dtype,
            name=name,
        )
    if kind == 'group':
        return nn.GroupNorm(num_groups, epsilon=eps, dtype=dtype, name=name)
    raise unknown('norm', kind, NORMS)
