"""A plain convolutional network: the baseline of the small experiments."""

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.errors import UserError, unknown
from vit_jax.layers.conv_attention import SAGANAttention
from vit_jax.layers.norm import group_norm
from vit_jax.layers.patch import check_channels
from vit_jax.typing import Array, Dtype

# What lies beyond the border: zeros, which tell where it is, or the opposite side.
PADDINGS = ('same', 'circular')


class CNN(nn.Module):
    """Convolutions with GroupNorm and ReLU, mean pooling, a classifier.

    Attributes:
      num_classes: V; None returns the pooled features.
      widths: channels of each convolution.
      strides: stride of each convolution.
      kernel_size: side of the kernels.
      padding: 'same', zeros around a map; 'circular', its opposite sides, so that a
        convolution cannot tell how far the border is.
      num_groups: groups of each GroupNorm; must divide every width.
      attention_after: numbers of the convolutions, from 0, behind which stands
        `SAGANAttention`, which starts as the identity.
      dtype: dtype of the computation; parameters are float32.
    """

    num_classes: int | None
    widths: tuple[int, ...] = (48, 48, 88, 88, 88)
    strides: tuple[int, ...] = (1, 1, 2, 1, 1)
    kernel_size: int = 3
    padding: str = 'same'
    num_groups: int = 8
    attention_after: tuple[int, ...] = ()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        """Args: image, `[B, height, width, channels]`. Returns logits `[B, V]`.

        >>> import jax
        >>> model = CNN(num_classes=7, widths=(8, 16), strides=(1, 2))
        >>> image = jnp.ones((3, 4, 10, 1))
        >>> model.apply(model.init(jax.random.key(0), image), image).shape
        (3, 7)
        """
        if len(self.widths) != len(self.strides):
            raise UserError(
                f'CNN needs a stride per width; got {self.widths} and {self.strides}'
            )
        if any(width % self.num_groups for width in self.widths):
            raise UserError(
                f'num_groups {self.num_groups} does not divide widths {self.widths}'
            )
        if not set(self.attention_after) <= set(range(len(self.widths))):
            raise UserError(
                f'attention_after {self.attention_after} must be among the numbers of '
                f'convolutions, 0 to {len(self.widths) - 1}'
            )
        if self.padding not in PADDINGS:
            raise unknown('padding', self.padding, PADDINGS)
        if image.ndim != 4:
            raise UserError(f'CNN takes images [B, h, w, channels]; got {image.shape}')
        check_channels(self, 'conv0', image.shape[-1])
        x = image
        kernel = (self.kernel_size, self.kernel_size)
        for i, width in enumerate(self.widths):
            x = nn.Conv(
                width,
                kernel,
                strides=self.strides[i],
                padding=self.padding.upper(),
                use_bias=False,
                dtype=self.dtype,
                name=f'conv{i}',
            )(x)
            x = group_norm(self.num_groups, dtype=self.dtype, name=f'norm{i}')(x)
            x = nn.relu(x)
            if i in self.attention_after:
                attention = SAGANAttention(
                    width, dtype=self.dtype, name=f'attention{i}'
                )
                x = attention(x, train=train)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        if self.num_classes is None:
            return x
        return nn.Dense(self.num_classes, name='head')(x)
