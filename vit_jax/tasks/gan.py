"""Generative adversarial training: images like those of the data, from noise.

"Self-Attention Generative Adversarial Networks", arXiv 1805.08318, section 3: hinge
losses, and a learning rate for each net ("GANs Trained by a Two Time-Scale Update
Rule", arXiv 1706.08500), which `optim.rules` sets: (('discriminator/', 4.0, None),). A
step updates both nets once and at the same time, as equation 1 there: each gradient is
taken where both nets were before the step.

Images are not conditional on classes. What is averaged by `optim.ema_decay` is both
nets, of which the generator is what samples are drawn from.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vit_jax.axes import batch_sum, example_keys
from vit_jax.config import ConfigReader
from vit_jax.data.augment import BatchAugment
from vit_jax.errors import UserError
from vit_jax.features import headless
from vit_jax.frozen import find_frozen
from vit_jax.generation import FrechetScore, Sampler, draw_latents
from vit_jax.image_data import ImageData, make_image_data
from vit_jax.losses import hinge
from vit_jax.models import check_generates as check_model
from vit_jax.parallel import Parallel
from vit_jax.pretrained.zoo import HALF
from vit_jax.state import TrainState
from vit_jax.tasks.classify import init_state, normalize
from vit_jax.typing import Array, Batch, Metrics, PRNGKey, Variables
from vit_jax.update import Updates, accumulate, apply_gradients, make_updates

__all__ = [
    'check_model',
    'eval_step',
    'init_state',
    'make_data',
    'make_score',
    'make_settings',
    'train_step',
]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a step needs beside model and optimizer.

    Attributes:
      updates: accumulation, averaging, what is done with steps that are not finite.
    """

    updates: Updates = dataclasses.field(default_factory=Updates)


def make_data(c: ConfigReader, parallel: Parallel) -> ImageData:
    """The images, for a model that knows no classes.

    Raises:
      UserError: as `make_image_data`; and for pixels that a generator cannot make, or
        augmentation that it would learn.
    """
    images = make_image_data(c, parallel)
    if (images.mean, images.std) != HALF:
        raise UserError(
            "a generator makes images in [-1, 1]: leave config.dataset.normalize 'half'"
        )
    if images.augment != BatchAugment():
        raise UserError(
            "task='gan' neither erases nor mixes, for the generator would learn it: "
            'leave out augment.erasing, augment.mixup and augment.cutmix'
        )
    return dataclasses.replace(images, num_classes=None)


def make_settings(c: ConfigReader, images: ImageData) -> Settings:
    """The settings of a config.

    Raises:
      UserError: for values that make no sense.
    """
    del images
    return Settings(make_updates(c))


def make_score(
    c: ConfigReader, images: ImageData, model: nn.Module, parallel: Parallel
) -> FrechetScore | None:
    """What an evaluation tells beside the metrics of batches, if anything.

    Raises:
      UserError: for a classifier that is not there, or does not fit the images.
    """
    if c.gan.classifier is None:
        return None
    assert images.probe_data is not None  # of all images
    if c.gan.num_samples < 2:
        raise UserError(
            f'config.gan.num_samples must be 2 or more, not {c.gan.num_samples}'
        )
    classifier = find_frozen('classifier', c.gan.classifier, images)
    headless(classifier.model)  # raises where it has no features
    return FrechetScore(
        sampler=Sampler(model, parallel, c.eval.batch_size or c.batch_size),
        classifier=classifier,
        num_samples=c.gan.num_samples,
        train_images=images.probe_data,
    )


def real_metrics(logits: Array, weight: Array) -> Metrics:
    """The discriminator's loss and accuracy on real images.

    Args:
      logits: `[B]`.
      weight: `[B]`.

    Returns:
      name -> (sum over the rows, sum of weights), float32 scalars.
    """
    total = jnp.sum(weight)
    return {
        'loss': (jnp.sum(hinge(logits) * weight), total),
        'accuracy': (jnp.sum((logits > 0) * weight), total),
    }


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    rng: PRNGKey,
    settings: Settings,
) -> tuple[TrainState, Metrics]:
    """One update of both nets, on the global batch or one device's rows (`axes`).

    Args:
      state: before the step.
      batch: image `[B, h, w, c]` uint8, weight `[B]` float32; the labels do not count.
      model: as `SAGAN`, called on images and by the method `generate`.
      tx: the optimizer, of both nets.
      rng: key of the run's randomness; a step folds its number in.
      settings: see `Settings`.

    Returns:
      The state after the step, and the metrics of the batch: the discriminator's loss
      and its accuracy on real and generated images, both on the real ones alone
      ('real_loss', 'real_accuracy'), the generator's loss, and the gammas of attention.
    """
    rng = jax.random.fold_in(rng, state.step)
    images = normalize(batch['image'], *HALF)
    batch = {'image': images, 'weight': batch['weight']}
    total_weight = jnp.maximum(batch_sum(jnp.sum(batch['weight'])), 1.0)

    def loss_fn(params: Any, others: Variables, batch: Batch, rng: PRNGKey):
        before = {'params': jax.lax.stop_gradient(params), **others}
        real, weight = batch['image'], batch['weight']
        keys = example_keys(rng, real.shape[0])
        latents = draw_latents(keys, model.latent_dim)  # type: ignore[attr-defined]
        fake, others = model.apply(
            {'params': params, **others},
            latents,
            train=True,
            method='generate',
            mutable=list(others),
        )
        # Next to each other, so that no row leaves its device.
        both = jnp.stack([real, jax.lax.stop_gradient(fake)], axis=1)
        logits, others = model.apply(
            {'params': params, **others},
            both.reshape(-1, *real.shape[1:]),
            train=True,
            mutable=list(others),
        )
        of_real, of_fake = logits.reshape(-1, 2).T
        # Once more, where the discriminator is held fast.
        held: Array = model.apply(before, fake, train=False)  # type: ignore

        alone = real_metrics(of_real, weight)
        loss, total = alone['loss']
        hits, _ = alone['accuracy']
        loss += jnp.sum(hinge(-of_fake) * weight)
        hits += jnp.sum((of_fake < 0) * weight)
        generator_loss = -jnp.sum(held * weight)
        metrics = {
            'loss': (loss, total),
            'accuracy': (hits, 2.0 * total),
            'generator_loss': (generator_loss, total),
            **{f'real_{name}': pair for name, pair in alone.items()},
            **gammas(params),
        }
        return (loss + generator_loss) / total_weight, (metrics, others)

    grads, others, metrics = accumulate(
        loss_fn, state.variables, batch, rng, settings.updates
    )
    return apply_gradients(
        state, grads, others, metrics, tx=tx, updates=settings.updates
    )


def gammas(params: Any) -> Metrics:
    """What attention is multiplied by before it is added, see `SAGANAttention`.

    >>> gammas({'generator': {'attention': {'gamma': jnp.float32(0.5)}}})
    {'generator_attention_gamma': (Array(0.5, dtype=float32), Array(1., dtype=float32))}
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator='_'): (x, jnp.ones(()))
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == 'gamma'
    }


def eval_step(
    variables: Variables, batch: Batch, *, model: nn.Module, settings: Settings
) -> Metrics:
    """What the discriminator says of real images that nobody trained on.

    Nothing is generated here, so 'loss' and 'accuracy' are to be compared with
    'real_loss' and 'real_accuracy' of training: a discriminator that tells these apart
    knows the training images by heart.
    """
    del settings
    logits: Any = model.apply(variables, normalize(batch['image'], *HALF), train=False)
    return batch_sum(real_metrics(logits, batch['weight']))
