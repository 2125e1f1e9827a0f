"""The Vision Transformer.

"An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
arXiv 2010.11929; DeiT, arXiv 2012.12877: the same architecture, distilled one token
more; DINOv2, arXiv 2304.07193: LayerScale, and, since arXiv 2309.16588, registers.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.layers.attention import MultiHeadAttention
from vit_jax.layers.blocks import EncoderBlock, drop_path_rates
from vit_jax.layers.head import Head
from vit_jax.layers.pooling import ClassToken, Registers
from vit_jax.layers.position import PositionEmbedding
from vit_jax.layers.stochastic import Dropout
from vit_jax.models.hybrid import embed_image
from vit_jax.typing import Array, Dtype, Initializer


class ViT(nn.Module):
    """Patches, positions, encoder blocks, a head.

    Attributes:
      num_classes: V; None returns the pooled features.
      patch_size: patch length, or one per axis of the input, in its pixels.
      stem: what makes the feature map that patches are cut from: None (the pixels
        themselves), 'conv', 'resnet' or a callable, see `hybrid.STEMS`.
      stem_kwargs: fields of the stem.
      width: D, size of a token.
      depth: number of encoder blocks.
      mlp_dim: F, hidden size of the MLPs.
      num_heads: heads of every attention.
      attention: makes the attention of a block, from `num_heads`, `dtype` and the
        other fields of `MultiHeadAttention`.
      posemb: position embedding: a kind of `PositionEmbedding`, or what makes a module
        from `name=` that is called as that one is.
      pool: 'cls' (a class token joins the patches), 'mean' or 'map'; registers are
        never pooled.
      distilled: whether a distillation token, with positions and a classifier of its
        own, follows the class token, see `Head`; needs pool='cls'.
      num_registers: tokens without positions that join between the class token and
        the patches, see `Registers`.
      representation_size: size of the tanh layer before the classifier, or None.
      qkv_bias: whether query, key and value have biases.
      dropout_rate: dropout after embeddings, attention and in the MLPs.
      attention_dropout_rate: dropout of the attention weights.
      drop_path_rate: stochastic depth of the last block, growing from 0.
      layer_scale: where the learned factors of the residual branches start, see
        `LayerScale`; None for branches without.
      layer_norm_eps: epsilon of the LayerNorms.
      activation: see `get_activation`.
      attention_impl: see `dot_product_attention`.
      remat: what the backward pass computes again, see `EncoderBlock`.
      kernel_init: initializer of the linear maps.
      head_init: initializer of the classifier's kernel.
      token_init: initializer of the class token and the distillation token.
      dtype: dtype of the computation; parameters are float32.
    """

    num_classes: int | None
    patch_size: int | tuple[int, ...] = 16
    stem: str | Callable[..., nn.Module] | None = None
    stem_kwargs: Mapping[str, Any] | None = None
    width: int = 768
    depth: int = 12
    mlp_dim: int = 3072
    num_heads: int = 12
    attention: Callable[..., nn.Module] = MultiHeadAttention
    posemb: str | Callable[..., nn.Module] = 'learned'
    pool: str = 'cls'
    distilled: bool = False
    num_registers: int = 0
    representation_size: int | None = None
    qkv_bias: bool = True
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    layer_scale: float | None = None
    layer_norm_eps: float = 1e-6
    activation: str = 'gelu'
    attention_impl: str = 'auto'
    remat: str = 'none'
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    head_init: Initializer = nn.initializers.zeros
    token_init: Initializer = nn.initializers.zeros
    dtype: Dtype = jnp.float32

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens stand before those of the grid: class, dist, registers."""
        return (1 + self.distilled) * (self.pool == 'cls') + self.num_registers

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        """Classifies images (or sequences, or videos: see `PatchEmbed`).

        Args:
          image: `[B, height, width, channels]`, normalised; or `[B, length, channels]`
            or `[B, frames, height, width, channels]`, where `patch_size` suits it.
          train: whether dropout and stochastic depth are on (rng 'dropout').

        Returns:
          Logits `[B, V]`, float32.

        Raises:
          UserError: for sizes that do not fit the patches or the parameters, and for
            a distillation token without a class token.

        >>> import jax
        >>> model = ViT(num_classes=7, patch_size=2, width=8, depth=1, mlp_dim=16,
        ...             num_heads=2)
        >>> image = jnp.ones((3, 4, 10, 1))
        >>> variables = model.init(jax.random.key(0), image)
        >>> model.apply(variables, image).shape
        (3, 7)
        """
        x = embed_image(
            image,
            self.width,
            self.patch_size,
            stem=self.stem,
            stem_kwargs=self.stem_kwargs,
            train=train,
            dtype=self.dtype,
        )
        grid = x.shape[1:-1]
        x = x.reshape(x.shape[0], -1, self.width)
        if self.pool == 'cls':
            x = ClassToken(self.token_init, self.distilled, name='class_token')(x)
        posemb = self.posemb
        if isinstance(posemb, str):
            posemb = partial(PositionEmbedding, posemb)
        x = posemb(name='posemb')(x, grid)
        if self.num_registers:
            before = self.num_prefix_tokens - self.num_registers
            x = Registers(self.num_registers, name='registers')(x, before)
        x = Dropout(self.dropout_rate, name='dropout')(x, train=train)

        attention = partial(
            self.attention,
            num_heads=self.num_heads,
            qkv_bias=self.qkv_bias,
            dropout_rate=self.attention_dropout_rate,
            impl=self.attention_impl,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
        )
        for i, rate in enumerate(drop_path_rates(self.drop_path_rate, self.depth)):
            x = EncoderBlock(
                attention,
                self.mlp_dim,
                self.dropout_rate,
                drop_path_rate=rate,
                layer_scale=self.layer_scale,
                layer_norm_eps=self.layer_norm_eps,
                activation=self.activation,
                remat=self.remat,
                kernel_init=self.kernel_init,
                dtype=self.dtype,
                name=f'block{i:02d}',
            )(x, train=train)

        if self.num_registers and self.pool != 'cls':
            x = x[:, self.num_registers :]
        return Head(
            self.num_classes,
            self.pool,
            self.num_heads,
            self.mlp_dim,
            representation_size=self.representation_size,
            distilled=self.distilled,
            layer_norm_eps=self.layer_norm_eps,
            activation=self.activation,
            attention_impl=self.attention_impl,
            head_init=self.head_init,
            dtype=self.dtype,
            name='head',
        )(x, train=train)
