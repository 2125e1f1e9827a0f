"""A task of our own: classification by a power of the error."""

import dataclasses

import jax
import jax.numpy as jnp

from vit_jax.axes import batch_sum
from vit_jax.tasks import classify
from vit_jax.tasks.classify import init_state, normalize
from vit_jax.update import accumulate, apply_gradients

__all__ = ['eval_step', 'init_state', 'make_settings', 'train_step']


@dataclasses.dataclass(frozen=True)
class Settings(classify.Settings):
    power: float = 2.0


def make_settings(c, data):
    return Settings(**vars(classify.make_settings(c, data)), power=c.error.power)


def _errors(params, batch, model, settings):
    images = normalize(batch['image'], settings.mean, settings.std)
    logits = model.apply({'params': params}, images)
    target = jax.nn.one_hot(batch['label'], logits.shape[-1])
    return jnp.sum(jnp.abs(logits - target) ** settings.power, axis=-1), logits


def _metrics(errors, logits, batch):
    hits = jnp.argmax(logits, axis=-1) == batch['label']
    total = batch['weight'].sum()
    return {
        'loss': (jnp.sum(errors * batch['weight']), total),
        'accuracy': (jnp.sum(hits * batch['weight']), total),
    }


def train_step(state, batch, *, model, tx, rng, settings):
    total_weight = batch_sum(batch['weight'].sum())

    def loss_fn(params, others, batch, rng):
        errors, logits = _errors(params, batch, model, settings)
        metrics = _metrics(errors, logits, batch)
        return metrics['loss'][0] / total_weight, (metrics, others)

    grads, others, metrics = accumulate(
        loss_fn, state.variables, batch, rng, settings.updates
    )
    return apply_gradients(
        state, grads, others, metrics, tx=tx, updates=settings.updates
    )


def eval_step(variables, batch, *, model, settings):
    errors, logits = _errors(variables['params'], batch, model, settings)
    return batch_sum(_metrics(errors, logits, batch))
