"""A generator and a discriminator with self-attention in both.

"Self-Attention Generative Adversarial Networks", arXiv 1805.08318. The nets are the
residual ones of "Spectral Normalization for Generative Adversarial Networks", arXiv
1802.05957, appendix B.4, one block for each size of the map; every kernel is divided
by its largest singular value, in both nets, as SAGAN has it. Neither net knows classes:
the papers' conditional norms and projection are not here.
"""

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.errors import UserError, times
from vit_jax.layers.conv_attention import SAGANAttention, average_pool
from vit_jax.layers.norm import batch_norm
from vit_jax.typing import Array, Dtype


def attention_block(rows: tuple[int, ...], most: int) -> int:
    """Behind which block the attention stands: that of the largest map it may see.

    Args:
      rows: of each block's map.
      most: rows of the largest map.

    Raises:
      UserError: when all maps are larger.

    >>> attention_block((8, 16, 32), 16), attention_block((32, 16, 8), 16)
    (1, 1)
    """
    small = [n for n in rows if n <= most]
    if not small:
        raise UserError(
            f'attention_rows {most} is below the rows of every map, '
            f'{", ".join(map(str, rows))}'
        )
    return rows.index(max(small))


def upsample(x: Array) -> Array:
    """Every position of `[B, R, C, D]` becomes four, `[B, 2 R, 2 C, D]`."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def normalized(layer: nn.Module, *args: Array, train: bool, **kwargs: bool) -> Array:
    """Calls a layer whose kernels are divided by their largest singular values.

    One step of power iteration a call, from the vector of the last training step
    (arXiv 1802.05957, algorithm 1), which training keeps in 'batch_stats'. A kernel of
    a convolution is a matrix with a column for each output.

    Args:
      layer: named, of the module that calls this.
      *args, **kwargs: of its call.
      train: whether the vector is kept.
    """
    norm = nn.SpectralNorm(layer, name=f'{layer.name}_spectral')
    return norm(*args, update_stats=train, **kwargs)


class Block(nn.Module):
    """x + two 3x3 convolutions, activations first; neither shrinks nor enlarges.

    Upsampling before the block and pooling behind it are those of the paper inside:
    repeating commutes with all that is done at a position, averaging with a sum.

    Attributes:
      width: channels of the output.
      norm: whether BatchNorm stands before each activation.
      activate: whether there is an activation before the first convolution; images
        go without.
      dtype: dtype of the computation; parameters are float32.
    """

    width: int
    norm: bool = False
    activate: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Args: x, `[B, R, C, D]`. Returns `[B, R, C, width]`.

        >>> import jax
        >>> x = jnp.ones((2, 3, 5, 7))
        >>> jax.eval_shape(Block(4).init_with_output, jax.random.key(0), x)[0].shape
        (2, 3, 5, 4)
        """
        y = x
        for i in range(2):
            if self.norm:
                y = batch_norm(
                    use_running_average=not train,
                    momentum=0.9,
                    dtype=self.dtype,
                    name=f'norm{i}',
                )(y)
            if i or self.activate:
                y = nn.relu(y)
            conv = nn.Conv(self.width, (3, 3), dtype=self.dtype, name=f'conv{i}')
            y = normalized(conv, y, train=train)
        if x.shape[-1] != self.width:
            project = nn.Dense(self.width, dtype=self.dtype, name='project')
            x = normalized(project, x, train=train)
        return x.astype(self.dtype) + y


class Generator(nn.Module):
    """Latents to images.

    Attributes:
      image_shape: (height, width, channels) of the images.
      widths: channels of each block, before which the map doubles.
      attention: whether `SAGANAttention` stands behind a block.
      attention_rows: see `attention_block`.
      dtype: dtype of the computation; parameters are float32.
    """

    image_shape: tuple[int, ...]
    widths: tuple[int, ...]
    attention: bool = True
    attention_rows: int = 16
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, latent: Array, *, train: bool = False) -> Array:
        """Args: latent, `[B, Z]`. Returns images `[B, h, w, c]` float32 in [-1, 1].

        >>> import jax
        >>> init = Generator((8, 12, 3), widths=(16, 8)).init_with_output
        >>> jax.eval_shape(init, jax.random.key(0), jnp.ones((5, 7)))[0].shape
        (5, 8, 12, 3)
        """
        check_halves(self.image_shape, len(self.widths))
        height, width, channels = self.image_shape
        rows, columns = (n >> len(self.widths) for n in (height, width))
        first = (rows, columns, self.widths[0])
        stem = nn.Dense(rows * columns * first[-1], dtype=self.dtype, name='stem')
        x = normalized(stem, latent, train=train).reshape(-1, *first)
        sizes = tuple(rows << i for i in range(1, len(self.widths) + 1))
        for i, features in enumerate(self.widths):
            block = Block(features, norm=True, dtype=self.dtype, name=f'block{i}')
            x = block(upsample(x), train=train)
            if self.attention and i == attention_block(sizes, self.attention_rows):
                attention = SAGANAttention(dtype=self.dtype, name='attention')
                x = normalized(attention, x, train=train)
        x = batch_norm(
            use_running_average=not train, momentum=0.9, dtype=self.dtype, name='norm'
        )(x)
        conv = nn.Conv(channels, (3, 3), dtype=self.dtype, name='conv')
        x = normalized(conv, nn.relu(x), train=train)
        return jnp.tanh(x.astype(jnp.float32))


class Discriminator(nn.Module):
    """Images to logits: above 0, an image is taken for a real one.

    Attributes:
      widths: channels of each block, behind which the map is halved.
      attention: whether `SAGANAttention` stands behind a block.
      attention_rows: see `attention_block`.
      dtype: dtype of the computation; parameters are float32.
    """

    widths: tuple[int, ...]
    attention: bool = True
    attention_rows: int = 16
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        """Args: image, `[B, h, w, c]`. Returns logits `[B]` float32.

        >>> import jax
        >>> init = Discriminator(widths=(8, 16)).init_with_output
        >>> jax.eval_shape(init, jax.random.key(0), jnp.ones((5, 8, 12, 3)))[0].shape
        (5,)
        """
        check_halves(image.shape[1:], len(self.widths))
        sizes = tuple(image.shape[1] >> i for i in range(len(self.widths)))
        x = image
        for i, features in enumerate(self.widths):
            block = Block(features, activate=i > 0, dtype=self.dtype, name=f'block{i}')
            x = block(x, train=train)
            if self.attention and i == attention_block(sizes, self.attention_rows):
                attention = SAGANAttention(dtype=self.dtype, name='attention')
                x = normalized(attention, x, train=train)
            x = average_pool(x, 2)
        x = jnp.sum(nn.relu(x), axis=(1, 2), dtype=jnp.float32)
        return normalized(nn.Dense(1, name='head'), x, train=train)[:, 0]


def check_halves(image_shape: tuple[int, ...], count: int) -> None:
    """Raises UserError unless both sides can be halved so often."""
    sides = image_shape[:2]
    if any(n % (1 << count) for n in sides):
        raise UserError(
            f'images of {times(sides)} cannot be halved {count} times, once for each '
            'width; change their size, generator_widths or discriminator_widths'
        )


class SAGAN(nn.Module):
    """Both nets.

    Attributes:
      num_classes: has no effect; the nets know no classes.
      image_shape: (height, width, channels) of the images.
      latent_dim: Z, size of the latents, which are normal.
      generator_widths, discriminator_widths: see the nets. The default has those of
        arXiv 1802.05957 for CIFAR-10.
      attention: whether both nets have it.
      attention_rows: see `attention_block`.
      dtype: dtype of the computation; parameters are float32.
    """

    num_classes: int | None = None
    image_shape: tuple[int, ...] = (32, 32, 3)
    latent_dim: int = 128
    generator_widths: tuple[int, ...] = (256, 256, 256)
    discriminator_widths: tuple[int, ...] = (128, 128, 128)
    attention: bool = True
    attention_rows: int = 16
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        options = {
            'attention': self.attention,
            'attention_rows': self.attention_rows,
            'dtype': self.dtype,
        }
        if len(self.image_shape) != 3:
            raise UserError(
                f'image_shape is (height, width, channels), not {self.image_shape}'
            )
        self.generator = Generator(self.image_shape, self.generator_widths, **options)
        self.discriminator = Discriminator(self.discriminator_widths, **options)

    def generate(self, latent: Array, *, train: bool = False) -> Array:
        """Args: latent, `[B, Z]`. Returns images `[B, h, w, c]` float32 in [-1, 1]."""
        return self.generator(latent, train=train)

    def __call__(self, image: Array, *, train: bool = False) -> Array:
        """What the discriminator says of images; initialises both nets.

        Args:
          image: `[B, h, w, c]`.
          train: whether the vectors of spectral normalisation are kept.

        Returns:
          Logits `[B]` float32; above 0 for images that are taken for real ones.

        Raises:
          UserError: for images of another shape than `image_shape`, and for sizes
            that do not fit each other.

        >>> import jax
        >>> model = SAGAN(
        ...     image_shape=(8, 8, 1), generator_widths=(16, 8),
        ...     discriminator_widths=(8,), latent_dim=7)
        >>> def run(rng, latent):
        ...     variables = model.init(rng, jnp.ones((1, 8, 8, 1)))
        ...     images = model.apply(variables, latent, method='generate')
        ...     return images, model.apply(variables, images)
        >>> out = jax.eval_shape(run, jax.random.key(0), jnp.ones((5, 7)))
        >>> [x.shape for x in out]
        [(5, 8, 8, 1), (5,)]
        """
        if image.shape[1:] != self.image_shape:
            raise UserError(
                f'this SAGAN is of images of {times(self.image_shape)}, not '
                f'{times(image.shape[1:])}; set config.model.kwargs.image_shape'
            )
        if self.is_initializing():
            self.generate(jnp.zeros((1, self.latent_dim)))
        return self.discriminator(image, train=train)
