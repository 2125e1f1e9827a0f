"""Image classification."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vit_jax.axes import batch_mean, batch_sum
from vit_jax.losses import softmax_cross_entropy
from vit_jax.metrics import classification_metrics
from vit_jax.state import TrainState
from vit_jax.typing import Array, Batch, Metrics, PRNGKey, Shape, Variables


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a step needs beside model and optimizer.

    Attributes:
      mean, std: of the pixels, in [0, 1], one per channel or one for all.
      label_smoothing: see `softmax_cross_entropy`.
    """

    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    label_smoothing: float = 0.0


def normalize(image: Array, settings: Settings) -> Array:
    """uint8 pixels `[B, h, w, c]` to float32, (x / 255 - mean) / std."""
    mean, std = (jnp.asarray(v, jnp.float32) for v in (settings.mean, settings.std))
    return (image.astype(jnp.float32) / 255.0 - mean) / std


def init_state(
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    rng: PRNGKey,
    image_shape: Shape,
) -> TrainState:
    """Fresh parameters and optimizer.

    Args:
      model: called on `[1, *image_shape]`.
      tx: the optimizer.
      rng: key of the initialisation.
      image_shape: (height, width, channels).
    """
    variables = model.init({'params': rng}, jnp.zeros((1, *image_shape)), train=False)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=tx.init(variables['params']),
    )


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
      The state after the step, and the metrics of the batch.
    """
    images = normalize(batch['image'], settings)
    label, weight = batch['label'], batch['weight']
    rngs = {'dropout': jax.random.fold_in(rng, state.step)}
    params = state.variables['params']
    others = {k: v for k, v in state.variables.items() if k != 'params'}
    total_weight = jnp.maximum(batch_sum(jnp.sum(weight)), 1.0)

    def loss_fn(params):
        logits, updated = model.apply(
            {'params': params, **others},
            images,
            train=True,
            rngs=rngs,
            mutable=list(others),
        )
        losses = softmax_cross_entropy(logits, label, settings.label_smoothing)
        return jnp.sum(losses * weight) / total_weight, (logits, losses, updated)

    grads, (logits, losses, others) = jax.grad(loss_fn, has_aux=True)(params)
    grads = batch_sum(grads)
    updates, opt_state = tx.update(grads, state.opt_state, params)
    state = TrainState(
        step=state.step + 1,
        variables={
            'params': optax.apply_updates(params, updates),
            **batch_mean(others),
        },
        opt_state=opt_state,
    )
    metrics = batch_sum(classification_metrics(logits, label, weight, losses))
    metrics['grad_norm'] = (optax.tree.norm(grads), jnp.ones(()))
    return state, metrics


def eval_step(
    variables: Variables, batch: Batch, *, model: nn.Module, settings: Settings
) -> Metrics:
    """The metrics of a batch; rows of weight 0 do not count. The loss is unsmoothed."""
    images = normalize(batch['image'], settings)
    logits: Array = model.apply(variables, images, train=False)  # type: ignore
    losses = softmax_cross_entropy(logits, batch['label'])
    return batch_sum(
        classification_metrics(logits, batch['label'], batch['weight'], losses)
    )
