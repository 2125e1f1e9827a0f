"""Convolutions: explicit padding, weight standardisation, a stem of several."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError, unknown
from vit_jax.layers.norm import group_norm
from vit_jax.layers.patch import check_channels
from vit_jax.typing import Array, Dtype, Initializer

PADDINGS = ('symmetric', 'same')


def padding(
    size: tuple[int, ...], kernel_size: int, strides: int, kind: str
) -> tuple[tuple[int, int], ...]:
    """Zeros before and after each axis, so that n rows become ceil(n / strides).

    Args:
      size: lengths of the axes.
      kernel_size, strides: of the window, the same along every axis.
      kind: 'symmetric', half a kernel on both sides (as PyTorch's models, for odd
        kernels); or 'same', no more than needed, the odd one at the end (as XLA's).
        At a stride of 2 and an even size the two see other pixels.

    Returns:
      A pair (before, after) for each axis.

    Raises:
      UserError: for an unknown `kind`, or an even kernel with 'symmetric'.

    >>> padding((8, 9), 3, 2, 'symmetric'), padding((8, 9), 3, 2, 'same')
    (((1, 1), (1, 1)), ((0, 1), (1, 1)))
    """
    if kind == 'symmetric':
        if kernel_size % 2 == 0:
            raise UserError(
                f"symmetric padding needs an odd kernel, not {kernel_size}; use 'same'"
            )
        return ((kernel_size // 2, kernel_size // 2),) * len(size)
    if kind != 'same':
        raise unknown('padding', kind, PADDINGS)
    rows = [(-(-n // strides) - 1) * strides + kernel_size for n in size]
    missing = [max(row - n, 0) for row, n in zip(rows, size)]
    return tuple((m // 2, m - m // 2) for m in missing)


def max_pool(x: Array, kernel_size: int, strides: int, kind: str) -> Array:
    """The largest value of each window, zeros around the map being values too.

    Behind a ReLU this is the usual max pooling; the pre-activation ResNet pools
    signed values, and its published weights have seen these zeros.

    Args:
      x: `[B, R, C, D]`.
      kernel_size, strides, kind: see `padding`.

    Returns:
      `[B, ceil(R / strides), ceil(C / strides), D]`.
    """
    pads = padding(x.shape[1:3], kernel_size, strides, kind)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    return nn.max_pool(x, (kernel_size,) * 2, strides=(strides,) * 2)


def standardize(kernel: Array, eps: float = 0.0) -> Array:
    """Weight standardisation: each output's weights get mean 0 and deviation 1.

    "Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization", arXiv 1903.10520.

    Args:
      kernel: `[..., outputs]`.
      eps: added to the deviation.

    >>> standardize(jnp.array([[1.0, 5.0], [3.0, 9.0]]))
    Array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    """
    axes = tuple(range(kernel.ndim - 1))
    kernel = kernel - jnp.mean(kernel, axis=axes)
    # Not zero under the root, whose gradient there is infinite.
    return kernel / (jnp.sqrt(jnp.mean(kernel**2, axis=axes) + 1e-10) + eps)


def check_feature_map(module: nn.Module, x: Array, strides: int = 1) -> None:
    """Raises UserError unless `x` is `[B, R, C, D]` and `strides` above 0."""
    name = type(module).__name__
    if x.ndim != 4:
        raise UserError(f'{name} takes a map [B, R, C, D]; got shape {x.shape}')
    if strides <= 0:
        raise UserError(f'{name} takes strides above 0, not {strides}')


class Conv(nn.Module):
    """A square convolution without bias, of images.

    Attributes:
      features: channels of the output.
      strides: stride along both axes.
      kernel_size: side of the kernel.
      padding: see `padding`.
      standardize_eps: epsilon of weight standardisation; None for no such.
      kernel_init: initializer of the kernel.
      dtype: dtype of the computation; parameters are float32.
    """

    features: int
    strides: int = 1
    kernel_size: int = 3
    padding: str = 'symmetric'
    standardize_eps: float | None = None
    # That of "Delving Deep into Rectifiers", arXiv 1502.01852, by the outputs.
    kernel_init: Initializer = nn.initializers.variance_scaling(2, 'fan_out', 'normal')
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Convolves.

        Args:
          x: `[B, R, C, channels]`.
          train: changes nothing; blocks that take this one's place may need it.

        Returns:
          `[B, ceil(R / strides), ceil(C / strides), features]`.

        Raises:
          UserError: for a wrong rank, no strides, or what `padding` refuses.

        >>> x = jnp.ones((2, 5, 8, 3))
        >>> Conv(7, strides=2).init_with_output(jax.random.key(0), x)[0].shape
        (2, 3, 4, 7)
        """
        del train
        check_feature_map(self, x, self.strides)
        size = (self.kernel_size, self.kernel_size)
        shape = (*size, x.shape[-1], self.features)
        kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)
        if self.standardize_eps is not None:
            kernel = standardize(kernel, self.standardize_eps)
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.strides, self.strides),
            padding=padding(x.shape[1:3], self.kernel_size, self.strides, self.padding),
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2 in the place of large patches of pixels.

    "Early Convolutions Help Transformers See Better", arXiv 2106.14881, whose last
    1x1 convolution is the patch embedding of the model behind. GroupNorm for its
    BatchNorm: an image does not depend on its neighbours in the batch.

    Attributes:
      widths: channels of each convolution; the total stride is 2^len(widths).
      num_groups: groups of each GroupNorm; must divide every width.
      dtype: dtype of the computation; parameters are float32.
    """

    widths: tuple[int, ...] = (24, 48, 96, 192)
    num_groups: int = 8
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        """Makes a feature map.

        Args:
          image: `[B, height, width, channels]`.
          train: changes nothing.

        Returns:
          `[B, R, C, widths[-1]]`, each size halved (and rounded up) by each width.

        Raises:
          UserError: for a wrong rank, groups that do not divide the widths, or
            channels that are not those of the parameters.

        >>> stem = ConvStem(widths=(8, 16))
        >>> x = jnp.ones((2, 8, 20, 3))
        >>> stem.init_with_output(jax.random.key(0), x)[0].shape
        (2, 2, 5, 16)
        """
        check_feature_map(self, image)
        if self.num_groups <= 0 or any(w % self.num_groups for w in self.widths):
            raise UserError(
                f'num_groups {self.num_groups} does not divide widths {self.widths}'
            )
        check_channels(self, 'conv0', image.shape[-1])
        x = image
        for i, width in enumerate(self.widths):
            x = Conv(width, 2, dtype=self.dtype, name=f'conv{i}')(x, train=train)
            x = group_norm(self.num_groups, dtype=self.dtype, name=f'norm{i}')(x)
            x = nn.relu(x)
        return x
