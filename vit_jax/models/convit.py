"""ConViT: a Vision Transformer that starts as a convolution.

"ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
arXiv 2103.10697.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.layers.attention import MultiHeadAttention
from vit_jax.layers.blocks import EncoderBlock, drop_path_rates
from vit_jax.layers.head import Head
from vit_jax.layers.pooling import ClassToken
from vit_jax.layers.position import PositionEmbedding
from vit_jax.layers.psa import GPSA
from vit_jax.layers.stochastic import Dropout
from vit_jax.models.hybrid import embed_image
from vit_jax.typing import Array, Dtype, Initializer


class ConViT(nn.Module):
    """`ViT` whose first blocks attend by content and position (GPSA).

    The class token joins the patches after the last GPSA block, whose positions
    are those of the grid only.

    Attributes:
      num_local_layers: how many blocks, from the first, have GPSA.
      local_init: start GPSA as a convolution; needs a square number of heads.
      locality_strength: sharpness of that convolution.
      gating_init: what GPSA's gates start as, before the sigmoid.
      gpsa_impl: see `gated_positional_attention`.
      The others are those of `ViT`; the attention maps have biases as `qkv_bias`
      says, in both kinds of block.
    """

    num_classes: int | None
    patch_size: int | tuple[int, int] = 16
    stem: str | Callable[..., nn.Module] | None = None
    stem_kwargs: Mapping[str, Any] | None = None
    width: int = 192
    depth: int = 12
    mlp_dim: int = 768
    num_heads: int = 4
    num_local_layers: int = 10
    local_init: bool = True
    locality_strength: float = 1.0
    gating_init: float = 1.0
    posemb: str = 'learned'
    pool: str = 'cls'
    qkv_bias: bool = False
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    layer_norm_eps: float = 1e-6
    activation: str = 'gelu'
    gpsa_impl: str = 'auto'
    attention_impl: str = 'auto'
    remat: str = 'none'
    kernel_init: Initializer = nn.initializers.normal(0.02)
    head_init: Initializer = nn.initializers.normal(0.02)
    # Not zero: no position joins this token, and the gradient of a LayerNorm at zero
    # is a thousand times that elsewhere.
    token_init: Initializer = nn.initializers.normal(0.02)
    dtype: Dtype = jnp.float32

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens stand before those of the grid, at the end."""
        return int(self.pool == 'cls')

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        """Classifies images.

        Args:
          image: `[B, height, width, channels]`, normalised; rectangular is fine.
          train: whether dropout and stochastic depth are on (rng 'dropout').

        Returns:
          Logits `[B, V]`, float32.

        Raises:
          UserError: when every block is local but a class token should pool, or
            for sizes that do not fit the patches or the parameters.

        >>> import jax
        >>> model = ConViT(num_classes=7, patch_size=2, width=8, depth=2, mlp_dim=16,
        ...                num_heads=4, num_local_layers=1)
        >>> image = jnp.ones((3, 4, 10, 1))
        >>> variables = model.init(jax.random.key(0), image)
        >>> model.apply(variables, image).shape
        (3, 7)
        """
        self._check_layers()
        x = embed_image(
            image,
            self.width,
            self.patch_size,
            stem=self.stem,
            stem_kwargs=self.stem_kwargs,
            train=train,
            dtype=self.dtype,
        )
        if x.ndim != 4:
            raise UserError(
                f'ConViT takes images [B, h, w, channels]; got {image.shape}'
            )
        batch, rows, cols, _ = x.shape
        grid = (rows, cols)
        x = x.reshape(batch, rows * cols, self.width)
        x = PositionEmbedding(self.posemb, name='posemb')(x, grid)
        x = Dropout(self.dropout_rate, name='dropout')(x, train=train)

        shared = {
            'num_heads': self.num_heads,
            'qkv_bias': self.qkv_bias,
            'dropout_rate': self.attention_dropout_rate,
            'kernel_init': self.kernel_init,
            'dtype': self.dtype,
        }
        local = partial(
            GPSA,
            grid=grid,
            local_init=self.local_init,
            locality_strength=self.locality_strength,
            gating_init=self.gating_init,
            impl=self.gpsa_impl,
            attention_impl=self.attention_impl,
            **shared,
        )
        content = partial(MultiHeadAttention, impl=self.attention_impl, **shared)
        for i, rate in enumerate(drop_path_rates(self.drop_path_rate, self.depth)):
            if i == self.num_local_layers and self.pool == 'cls':
                x = ClassToken(self.token_init, name='class_token')(x)
            x = EncoderBlock(
                local if i < self.num_local_layers else content,
                self.mlp_dim,
                self.dropout_rate,
                drop_path_rate=rate,
                layer_norm_eps=self.layer_norm_eps,
                activation=self.activation,
                remat=self.remat,
                kernel_init=self.kernel_init,
                dtype=self.dtype,
                name=f'block{i:02d}',
            )(x, train=train)

        return Head(
            self.num_classes,
            self.pool,
            self.num_heads,
            self.mlp_dim,
            layer_norm_eps=self.layer_norm_eps,
            activation=self.activation,
            attention_impl=self.attention_impl,
            head_init=self.head_init,
            dtype=self.dtype,
            name='head',
        )(x, train=train)

    def _check_layers(self) -> None:
        if not 0 <= self.num_local_layers <= self.depth:
            raise UserError(
                f'num_local_layers {self.num_local_layers} is not between 0 and the '
                f'depth {self.depth}'
            )
        sharp = self.locality_strength != 1.0
        if sharp and not (self.local_init and self.num_local_layers):
            raise UserError(
                'locality_strength is of the convolutional start: it needs '
                'local_init=True and num_local_layers above 0'
            )
        if self.gating_init != 1.0 and not self.num_local_layers:
            raise UserError('gating_init is of GPSA: it needs num_local_layers above 0')
        if self.num_local_layers == self.depth and self.pool == 'cls':
            raise UserError(
                f'all {self.depth} layers are local, so no class token can join; use '
                f"num_local_layers <= {self.depth - 1}, or pool='mean'"
            )
