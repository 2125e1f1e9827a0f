"""Image classification."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vit_jax.averaging import init_average
from vit_jax.axes import batch_sum
from vit_jax.config import ConfigReader
from vit_jax.data.augment import BatchAugment
from vit_jax.image_data import ImageData
from vit_jax.losses import cross_entropy, smooth_labels
from vit_jax.metrics import classification_metrics
from vit_jax.state import TrainState
from vit_jax.typing import Array, Batch, Inputs, Metrics, PRNGKey, Variables
from vit_jax.update import Updates, accumulate, apply_gradients, make_updates


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a step needs beside model and optimizer.

    Attributes:
      num_classes: V.
      mean, std: of the pixels, in [0, 1], one per channel or one for all.
      label_smoothing: see `smooth_labels`.
      augment: random erasing, mixup and cutmix.
      updates: accumulation, averaging, what is done with steps that are not finite.
    """

    num_classes: int
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    label_smoothing: float = 0.0
    augment: BatchAugment = dataclasses.field(default_factory=BatchAugment)
    updates: Updates = dataclasses.field(default_factory=Updates)


def make_settings(c: ConfigReader, images: ImageData) -> Settings:
    """The settings of a config.

    Raises:
      UserError: for values that make no sense.
    """
    assert images.num_classes is not None
    return Settings(
        num_classes=images.num_classes,
        mean=images.mean,
        std=images.std,
        label_smoothing=c.optim.label_smoothing,
        augment=images.augment,
        updates=make_updates(c),
    )


def normalize(image: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """uint8 pixels `[B, h, w, c]` to float32, (x / 255 - mean) / std."""
    shift, scale = (jnp.asarray(v, jnp.float32) for v in (mean, std))
    return (image.astype(jnp.float32) / 255.0 - shift) / scale


def init_state(
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    rng: PRNGKey,
    inputs: Inputs,
    settings: Settings,
) -> TrainState:
    """Fresh parameters and optimizer.

    Args:
      model: called on arrays like `inputs`.
      tx: the optimizer.
      rng: key of the initialisation.
      inputs: shapes and dtypes of what the model takes for one example.
      settings: see `Settings`.
    """
    zeros = [jnp.zeros(x.shape, x.dtype) for x in inputs]
    variables = model.init({'params': rng}, *zeros, train=False)
    average = None
    if settings.updates.ema_decay is not None:
        average = init_average(variables)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=tx.init(variables['params']),
        average=average,
    )


def prepare(batch: Batch, rng: PRNGKey, settings: Settings) -> dict[str, Array]:
    """Images as the model sees them, targets as the loss does.

    Args:
      batch: image `[B, h, w, c]` uint8, label `[B]` int32, weight `[B]` float32.
      rng: of this step.
      settings: see `Settings`.

    Returns:
      The batch with image float32, normalised and augmented, target `[B, V]`, smoothed
      and mixed, and the label that has the largest share of the target.
    """
    images = normalize(batch['image'], settings.mean, settings.std)
    target = smooth_labels(
        batch['label'], settings.num_classes, settings.label_smoothing
    )
    images, target = settings.augment(rng, images, target, batch['weight'])
    label = batch['label']
    if settings.augment.mixes:
        label = jnp.argmax(target, axis=-1).astype(label.dtype)
    return {**batch, 'image': images, 'target': target, 'label': label}


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    rng: PRNGKey,
    settings: Settings,
) -> tuple[TrainState, Metrics]:
    """One update, on the global batch or on one device's rows of it (`axes`).

    Args:
      state: before the step.
      batch: image `[B, h, w, c]` uint8, label `[B]` int32, weight `[B]` float32.
      model, tx: as for `init_state`.
      rng: key of the run's randomness; a step folds its number in.
      settings: see `Settings`.

    Returns:
      The state after the step, and the metrics of the batch; the accuracy is that on
      the images as they were augmented and mixed, see `prepare` for their labels.
    """
    augment_rng, model_rng = jax.random.split(jax.random.fold_in(rng, state.step))
    batch = prepare(batch, augment_rng, settings)
    total_weight = jnp.maximum(batch_sum(jnp.sum(batch['weight'])), 1.0)

    def loss_fn(params: Any, others: Variables, batch: Batch, rng: PRNGKey):
        logits, others = model.apply(
            {'params': params, **others},
            batch['image'],
            train=True,
            rngs={'dropout': rng},
            mutable=list(others),
        )
        losses = cross_entropy(logits, batch['target'])
        metrics = classification_metrics(
            logits, batch['label'], batch['weight'], losses
        )
        return metrics['loss'][0] / total_weight, (metrics, others)

    grads, others, metrics = accumulate(
        loss_fn, state.variables, batch, model_rng, settings.updates
    )
    return apply_gradients(
        state, grads, others, metrics, tx=tx, updates=settings.updates
    )


def eval_step(
    variables: Variables, batch: Batch, *, model: nn.Module, settings: Settings
) -> Metrics:
    """The metrics of a batch; rows of weight 0 do not count. The loss is unsmoothed."""
    images = normalize(batch['image'], settings.mean, settings.std)
    logits: Array = model.apply(variables, images, train=False)  # type: ignore
    target = smooth_labels(batch['label'], settings.num_classes)
    return batch_sum(
        classification_metrics(
            logits, batch['label'], batch['weight'], cross_entropy(logits, target)
        )
    )
