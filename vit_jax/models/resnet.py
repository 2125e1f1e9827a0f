"""Residual networks, of convolutions, of attention, or of both.

"Deep Residual Learning for Image Recognition", arXiv 1512.03385, as the public
PyTorch models have it (the 3x3 convolution carries the stride); "Big Transfer",
arXiv 1912.11370 (pre-activation, GroupNorm, weight standardisation); and those whose
3x3 convolutions are attention: "Stand-Alone Self-Attention", arXiv 1906.05909,
"Attention Augmented Convolutional Networks", arXiv 1904.09925, and "Bottleneck
Transformers", arXiv 2101.11605.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.errors import UserError, unknown
from vit_jax.layers.conv import Conv, max_pool
from vit_jax.layers.conv_attention import AugmentedConv, GlobalAttention, SAGANAttention
from vit_jax.layers.local_attention import AttentionStem, LocalAttention
from vit_jax.layers.norm import NORMS, make_norm
from vit_jax.layers.patch import check_channels
from vit_jax.models.parts import make_part
from vit_jax.typing import Array, Dtype, Initializer

# What can take the place of a 3x3 convolution: made from `features`, `strides`,
# `dtype` and `name`, and called as `module(x, train=train)` on a feature map.
SPATIAL = {
    'sagan': SAGANAttention,
    'augmented': AugmentedConv,
    'local': LocalAttention,
    'global': GlobalAttention,
}
STEMS = ('conv', 'small', 'attention')


class ResidualBlock(nn.Module):
    """x + f(x), where f has one 3x3 convolution between 1x1 ones, or two 3x3 ones.

    Attributes:
      width: channels of the 3x3 convolutions; a bottleneck's output has 4 times more.
      strides: of the first 3x3 convolution.
      bottleneck: whether 1x1 convolutions narrow and widen.
      preactivation: norm and ReLU before each convolution ("Identity Mappings in
        Deep Residual Networks", arXiv 1603.05027), not behind it.
      conv: makes a convolution from `features`, `strides`, `kernel_size`, `name`.
      spatial: makes what stands for 3x3 convolutions from `features`, `strides`,
        `name`: called as `module(x, train=train)`.
      norm: makes a norm from `name`.
    """

    width: int
    strides: int
    bottleneck: bool
    preactivation: bool
    conv: Callable[..., nn.Module]
    spatial: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x, `[B, R, C, channels]`. Returns `[B, R/s, C/s, features]`.

        >>> import jax
        >>> block = ResidualBlock(width=8, strides=2, bottleneck=True,
        ...     preactivation=False, conv=Conv, spatial=Conv, norm=nn.LayerNorm)
        >>> x = jnp.ones((2, 3, 5, 8))
        >>> block.init_with_output(jax.random.key(0), x)[0].shape
        (2, 2, 3, 32)
        """
        features = self.width * (4 if self.bottleneck else 1)
        pointwise = partial(self.conv, kernel_size=1)
        spatial = partial(self.spatial, features=self.width)
        layers = [partial(spatial, strides=self.strides), spatial]
        if self.bottleneck:
            narrow = partial(pointwise, features=self.width)
            widen = partial(pointwise, features=features)
            layers = [narrow, layers[0], widen]
        project = self.strides != 1 or x.shape[-1] != features
        shortcut = partial(pointwise, features, strides=self.strides, name='shortcut')

        y = residual = x
        for i, make in enumerate(layers, start=1):
            norm = self.norm(name=f'norm{i}')
            if self.preactivation:
                y = nn.relu(norm(y))
                if i == 1 and project:
                    residual = shortcut()(y)
            y = make(name=f'conv{i}')(y, train=train)
            if not self.preactivation:
                y = norm(y)
                y = nn.relu(y) if i < len(layers) else y
        if self.preactivation:
            return residual + y
        if project:
            residual = self.norm(name='shortcut_norm')(shortcut()(x))
        return nn.relu(residual + y)


class ResNet(nn.Module):
    """A stem, stages of residual blocks, a classifier.

    Stage i of `len(stage_sizes)`, from 1, has `width * 2^(i - 1)` channels in its 3x3
    convolutions, and each but the first halves the map (rounding up).

    Attributes:
      num_classes: V; None returns the pooled features.
      stage_sizes: blocks of each stage.
      width: channels behind the stem, and of the first stage's 3x3 convolutions.
      bottleneck: see `ResidualBlock`.
      preactivation: see `ResidualBlock`; a last norm then stands before the pooling.
      norm: 'batch' (statistics of the global batch) or 'group'.
      norm_eps: epsilon of the norms.
      num_groups: groups of 'group'; must divide `width`.
      standardize_eps: epsilon of the convolutions' weight standardisation, see
        `standardize`; None for plain kernels.
      padding: 'symmetric' (as PyTorch's) or 'same' (as XLA's), see `padding`.
      stem: 'conv' (7x7 of stride 2, and 3x3 max pooling of stride 2); 'small' (3x3
        of stride 1, for small images); or 'attention' (`AttentionStem`, and 4x4 max
        pooling of stride 4).
      attention_stages: the stages, such as (3, 4), whose 3x3 convolutions, all of
        them, are attention.
      attention: which: 'sagan', 'augmented', 'local', 'global', or a callable that
        makes a module from `features`, `strides`, `dtype` and `name`.
      attention_kwargs: its other fields.
      pool: 'mean', or 'none' to keep the map (of features, or of logits).
      kernel_init: initializer of the convolutions.
      dtype: dtype of the computation; parameters are float32.
    """

    num_classes: int | None
    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    bottleneck: bool = True
    preactivation: bool = False
    norm: str = 'batch'
    norm_eps: float = 1e-5
    num_groups: int = 32
    standardize_eps: float | None = None
    padding: str = 'symmetric'
    stem: str = 'conv'
    attention_stages: tuple[int, ...] = ()
    attention: str | Callable[..., nn.Module] = 'global'
    attention_kwargs: Mapping[str, Any] | None = None
    pool: str = 'mean'
    kernel_init: Initializer = nn.initializers.variance_scaling(2, 'fan_out', 'normal')
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        """Classifies images.

        Args:
          image: `[B, height, width, channels]`, normalised; rectangular is fine.
          train: whether BatchNorm uses the batch's statistics, and updates the
            collection 'batch_stats'.

        Returns:
          Logits `[B, V]`, float32; or a map `[B, R, C, ...]` for `pool='none'`.

        Raises:
          UserError: for fields that do not fit each other, or channels that are not
            those of the parameters.

        >>> import jax
        >>> model = ResNet(num_classes=7, stage_sizes=(1, 1), width=8, stem='small')
        >>> image = jnp.ones((3, 4, 9, 1))
        >>> variables = model.init(jax.random.key(0), image)
        >>> model.apply(variables, image).shape
        (3, 7)
        """
        attention = make_part(
            'attention',
            self.attention,
            SPATIAL,
            self.attention_kwargs,
            owned=('features', 'strides', 'dtype', 'name'),
        )
        self._check(image)
        conv = partial(
            Conv,
            padding=self.padding,
            standardize_eps=self.standardize_eps,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
        )
        norm = partial(
            make_norm,
            self.norm,
            eps=self.norm_eps,
            num_groups=self.num_groups,
            train=train,
            dtype=self.dtype,
        )
        x = self._stem(image, conv, norm, train)
        for i, size in enumerate(self.stage_sizes, start=1):
            attends = i in self.attention_stages
            for j in range(1, size + 1):
                x = ResidualBlock(
                    self.width * 2 ** (i - 1),
                    strides=2 if i > 1 and j == 1 else 1,
                    bottleneck=self.bottleneck,
                    preactivation=self.preactivation,
                    conv=conv,
                    spatial=partial(attention, dtype=self.dtype) if attends else conv,
                    norm=norm,
                    name=f'stage{i}_block{j}',
                )(x, train=train)
        if self.preactivation:
            x = nn.relu(norm(name='norm')(x))
        if self.pool == 'mean':
            x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        if self.num_classes is None:
            return x
        return nn.Dense(self.num_classes, name='head')(x.astype(jnp.float32))

    def _stem(
        self,
        image: Array,
        conv: Callable[..., nn.Module],
        norm: Callable[..., nn.Module],
        train: bool,
    ) -> Array:
        kernel_size, strides = (7, 2) if self.stem == 'conv' else (3, 1)
        if self.stem == 'attention':
            stem: nn.Module = AttentionStem(self.width, dtype=self.dtype, name='stem')
        else:
            stem = conv(self.width, strides, kernel_size, name='stem')
            check_channels(self, 'stem', image.shape[-1])
        x = stem(image, train=train)
        if not self.preactivation:
            x = nn.relu(norm(name='stem_norm')(x))
        if self.stem == 'conv':
            return max_pool(x, 3, 2, self.padding)
        return max_pool(x, 4, 4, 'same') if self.stem == 'attention' else x

    def _check(self, image: Array) -> None:
        """Raises UserError for what no submodule will notice."""
        for kind, value, options in (
            ('stem', self.stem, STEMS),
            ('norm', self.norm, NORMS),
            ('pool', self.pool, ('mean', 'none')),
        ):
            if value not in options:
                raise unknown(kind, value, options)
        if image.ndim != 4:
            raise UserError(
                f'ResNet takes images [B, h, w, channels]; got {image.shape}'
            )
        if self.norm == 'group' and self.width % self.num_groups:
            raise UserError(
                f'num_groups {self.num_groups} does not divide the width {self.width}'
            )
        if not self.attention_stages and (
            self.attention != 'global' or self.attention_kwargs
        ):
            raise UserError(
                f'attention={self.attention!r} and attention_kwargs need '
                'attention_stages, such as (3, 4)'
            )
        stages = range(1, len(self.stage_sizes) + 1)
        if not set(self.attention_stages) <= set(stages):
            raise UserError(
                f'attention_stages {self.attention_stages} must be among the stages '
                f'{tuple(stages)}'
            )


# ResNet-{18,34,50,101,152}: arXiv 1512.03385, table 1.
_DEPTHS: dict[int, dict[str, Any]] = {
    18: {'stage_sizes': (2, 2, 2, 2), 'bottleneck': False},
    34: {'stage_sizes': (3, 4, 6, 3), 'bottleneck': False},
    50: {'stage_sizes': (3, 4, 6, 3)},
    101: {'stage_sizes': (3, 4, 23, 3)},
    152: {'stage_sizes': (3, 8, 36, 3)},
}
# arXiv 1912.11370, and its published code.
_BIT = {'preactivation': True, 'norm': 'group', 'standardize_eps': 0.0}

# Name -> fields of `ResNet`.
RESNETS: dict[str, dict[str, Any]] = {
    **{f'ResNet-{depth}': fields for depth, fields in _DEPTHS.items()},
    # Every 3x3 convolution and the stem are attention: arXiv 1906.05909. Published:
    # 18.0M parameters, with stem='conv' too.
    'SASA-ResNet-50': {
        'attention': 'local',
        'attention_stages': (1, 2, 3, 4),
        'stem': 'attention',
    },
    # From maps of 28x28 pixels on: arXiv 1904.09925, section 4.2. Published: 25.8M.
    'AA-ResNet-50': {'attention': 'augmented', 'attention_stages': (2, 3, 4)},
    # The last stage, with the stride of its c5: arXiv 2101.11605, table 1. Published:
    # 20.8M, to which the position tables, which grow with the map, add 0.01M here.
    'BoTNet-50': {'attention': 'global', 'attention_stages': (4,)},
    **{
        f'BiT-R{depth}x{factor}': {**_DEPTHS[depth], **_BIT, 'width': 64 * factor}
        for depth, factor in ((50, 1), (50, 3), (101, 1), (101, 3), (152, 2), (152, 4))
    },
}
