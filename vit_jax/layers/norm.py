"""Norms: over the global batch, over groups of channels, over all of them.

Flax's default variance, E[x^2] - E[x]^2, takes one pass, but nothing is left of it in
float32 where the mean is large against the deviation. Norms of feature maps take the
mean of (x - mean)^2 instead, `LayerNorm` one pass over values moved near zero.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.axes import batch_axis
from vit_jax.errors import UserError, unknown
from vit_jax.typing import Array, Dtype

NORMS = ('batch', 'group')


def batch_norm(**kwargs) -> nn.BatchNorm:
    """`nn.BatchNorm` whose statistics are those of the whole batch.

    "Batch Normalization", arXiv 1502.03167. Under `jit` over a mesh the batch is
    whole already; under `pmap` the devices average their moments.

    Args:
      **kwargs: fields of `nn.BatchNorm`.
    """
    return nn.BatchNorm(axis_name=batch_axis(), use_fast_variance=False, **kwargs)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` of what the features are beside the first of them.

    That changes nothing but rounding: the result does not depend on what is common to
    all features. No value is farther from the mean than sqrt(D) deviations, so the
    variance keeps all but log2(D) of its bits. (A second pass makes an encoder block 6%
    slower on a CPU, this 2%.)

    >>> import jax
    >>> x = 1e6 + jnp.arange(3.0)
    >>> LayerNorm().init_with_output(jax.random.key(0), x[None])[0].round(2)
    Array([[-1.22,  0.  ,  1.22]], dtype=float32)
    """

    @nn.nowrap  # the method behind is a layer's call already; two would be reported
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Args: x, `[..., D]`. Returns the same shape, in `dtype`."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        common = jax.lax.stop_gradient(x[..., :1])  # its gradient is zero
        return super().__call__(x - common, mask=mask)


def layer_norm(eps: float = 1e-6, **kwargs) -> nn.LayerNorm:
    """`LayerNorm`: "Layer Normalization", arXiv 1607.06450.

    Args:
      eps: added to the variance.
      **kwargs: other fields of `nn.LayerNorm`.
    """
    return LayerNorm(epsilon=eps, **kwargs)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that says which groups do not fit.

    >>> import jax
    >>> x = jnp.ones((2, 3, 5, 8))
    >>> GroupNorm(num_groups=2).init_with_output(jax.random.key(0), x)[0].shape
    (2, 3, 5, 8)
    """

    @nn.nowrap  # the method behind is a layer's call already; two would be reported
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Args: x, `[B, ..., D]`. Raises UserError where no whole groups of D are."""
        groups, channels = self.num_groups, x.shape[-1]
        if groups is not None and (groups <= 0 or channels % groups):
            raise UserError(
                f'num_groups {groups} does not divide the {channels} channels of the '
                'map; change one of them'
            )
        return super().__call__(x, mask=mask)


def group_norm(num_groups: int, **kwargs) -> nn.GroupNorm:
    """`nn.GroupNorm`: "Group Normalization", arXiv 1803.08494.

    Args:
      num_groups: must divide the channels, or a UserError says so.
      **kwargs: other fields of `nn.GroupNorm`.
    """
    return GroupNorm(num_groups, use_fast_variance=False, **kwargs)


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
      UserError: for an unknown `kind`; when called, for groups that do not divide D.
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
        return group_norm(num_groups, epsilon=eps, dtype=dtype, name=name)
    raise unknown('norm', kind, NORMS)
