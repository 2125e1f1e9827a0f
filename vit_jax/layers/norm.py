"""BatchNorm over the global batch."""

import flax.linen as nn

from vit_jax.axes import batch_axis


def batch_norm(**kwargs) -> nn.BatchNorm:
    """`nn.BatchNorm` whose statistics are those of the whole batch.

    "Batch Normalization", arXiv 1502.03167. Under `jit` over a mesh the batch is
    whole already; under `pmap` the devices average their moments.

    Args:
      **kwargs: fields of `nn.BatchNorm`.
    """
    return nn.BatchNorm(axis_name=batch_axis(), **kwargs)
