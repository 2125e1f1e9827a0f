"""A task of our own: classification by squared error."""

import jax
import jax.numpy as jnp
import optax

from vit_jax.axes import batch_sum
from vit_jax.state import TrainState
from vit_jax.tasks.classify import init_state, normalize

__all__ = ['eval_step', 'init_state', 'train_step']


def _errors(params, batch, model, settings):
    logits = model.apply({'params': params}, normalize(batch['image'], settings))
    target = jax.nn.one_hot(batch['label'], logits.shape[-1])
    return jnp.sum((logits - target) ** 2, axis=-1), logits


def _metrics(errors, logits, batch):
    hits = jnp.argmax(logits, axis=-1) == batch['label']
    total = batch['weight'].sum()
    return batch_sum(
        {
            'loss': (jnp.sum(errors * batch['weight']), total),
            'accuracy': (jnp.sum(hits * batch['weight']), total),
        }
    )


def train_step(state, batch, *, model, tx, rng, settings):
    def loss_fn(params):
        errors, logits = _errors(params, batch, model, settings)
        return errors.sum() / batch_sum(batch['weight'].sum()), (errors, logits)

    params = state.variables['params']
    grads, (errors, logits) = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(batch_sum(grads), state.opt_state, params)
    variables = {'params': optax.apply_updates(params, updates)}
    state = TrainState(state.step + 1, variables, opt_state)
    return state, _metrics(errors, logits, batch)


def eval_step(variables, batch, *, model, settings):
    errors, logits = _errors(variables['params'], batch, model, settings)
    return _metrics(errors, logits, batch)
