"""From the loss of a task to the state after a step.

`accumulate` takes gradients, in one piece or in micro-batches; `apply_gradients` is
the update. A task's train step is the two of them around its own loss.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax.averaging import ema_update
from vit_jax.axes import batch_mean, batch_sum
from vit_jax.config import ConfigReader
from vit_jax.errors import unknown
from vit_jax.param_groups import map_paths
from vit_jax.state import TrainState
from vit_jax.typing import Array, Batch, Metrics, PRNGKey, Variables

NAN_POLICIES = ('stop', 'skip')

# (params, other collections, batch, rng) -> (loss, (metrics, other collections));
# the loss is the batch's part of the mean over the global batch.
LossFn = Callable[..., tuple[Array, tuple[Metrics, Variables]]]


@dataclasses.dataclass(frozen=True)
class Updates:
    """How gradients become an update; the same for every task.

    Attributes:
      accum_steps: micro-batches that a batch is divided into.
      freeze: patterns of parameters that have no gradient, matched at the start of
        their paths.
      ema_decay: of `TrainState.average`; None keeps no average.
      skip_nonfinite: whether a step whose gradient is not finite has no weight in the
        metrics but is counted there, as 'skipped'.
    """

    accum_steps: int = 1
    freeze: tuple[str, ...] = ()
    ema_decay: float | None = None
    skip_nonfinite: bool = False


def make_updates(c: ConfigReader) -> Updates:
    """Those of a config.

    Raises:
      UserError: for an unknown `nan_policy`.
    """
    if c.nan_policy not in NAN_POLICIES:
        raise unknown('nan_policy', c.nan_policy, NAN_POLICIES)
    skip = c.nan_policy == 'skip'
    return Updates(c.accum_steps, tuple(c.optim.freeze), c.optim.ema_decay, skip)


def accumulate(
    loss_fn: LossFn, variables: Variables, batch: Batch, rng: PRNGKey, updates: Updates
) -> tuple[Any, Variables, Metrics]:
    """Gradient, other collections and metrics of a batch, in micro-batches.

    Row r belongs to micro-batch r modulo `accum_steps`: each device has its share of
    every micro-batch among its own rows, and which rows come together does not depend
    on the number of devices. The gradient is that of the whole batch, up to rounding,
    where rows do not see each other; BatchNorm sees one micro-batch at a time.

    Args:
      loss_fn: see `LossFn`; differentiated by its first argument.
      variables: of the model.
      batch: arrays of B rows in sight.
      rng: of the whole batch; each micro-batch has its own.
      updates: how many micro-batches, a divisor of B; what is frozen.

    Returns:
      Gradient and metrics, both summed over micro-batches and devices, and the other
      collections.
    """
    params = variables['params']
    others = {k: v for k, v in variables.items() if k != 'params'}
    accum_steps = updates.accum_steps

    def loss_of_trained(params: Any, *args: Any) -> Any:
        # XLA then leaves out the part of the backward pass that nobody asks for.
        def stop(path: str) -> bool:
            return any(re.match(pattern, path) for pattern in updates.freeze)

        frozen = map_paths(stop, params)
        params = jax.tree.map(
            lambda x, stop: jax.lax.stop_gradient(x) if stop else x, params, frozen
        )
        return loss_fn(params, *args)

    grad_fn = jax.grad(loss_of_trained, has_aux=True)
    if accum_steps == 1:
        grads, (metrics, others) = grad_fn(params, others, batch, rng)
        return batch_sum(grads), batch_mean(others), batch_sum(metrics)

    def micro_step(carry: Any, micro: tuple[Batch, Array]) -> tuple[Any, None]:
        sums, others = carry
        rows, i = micro
        grads, (metrics, others) = grad_fn(
            params, others, rows, jax.random.fold_in(rng, i)
        )
        sums = jax.tree.map(jnp.add, sums, (grads, metrics))
        return (sums, batch_mean(others)), None

    micro_batches = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, accum_steps, *x.shape[1:]), 1, 0), batch
    )
    first = jax.tree.map(lambda x: x[0], micro_batches)
    shapes = jax.eval_shape(grad_fn, params, others, first, rng)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[1][0])
    )
    ((grads, metrics), others), _ = jax.lax.scan(
        micro_step, (zeros, others), (micro_batches, jnp.arange(accum_steps))
    )
    return batch_sum(grads), others, batch_sum(metrics)


def apply_gradients(
    state: TrainState,
    grads: Any,
    others: Variables,
    metrics: Metrics,
    *,
    tx: optax.GradientTransformation,
    updates: Updates,
) -> tuple[TrainState, Metrics]:
    """The state after a step, and its metrics with 'grad_norm' (before clipping).

    A step whose loss or gradient is not finite changes nothing but the step's number
    and counters, so that what was wrong before it can still be told; 'nonfinite_leaf'
    is the number of the gradient's first leaf that is not finite.

    Args:
      state: before the step.
      grads: of the global batch, as `state.variables['params']`.
      others: the other collections after the forward pass.
      metrics: of the global batch.
      tx: the optimizer.
      updates: see `Updates`.
    """
    params = state.variables['params']
    grad_norm = optax.tree.norm(grads)
    leaf_norms = jnp.stack([jnp.sum(jnp.square(x)) for x in jax.tree.leaves(grads)])
    bad_leaf = jnp.argmax(~jnp.isfinite(leaf_norms)).astype(jnp.float32)
    deltas, opt_state = tx.update(grads, state.opt_state, params)
    variables = {'params': optax.apply_updates(params, deltas), **others}
    average = state.average
    if average is not None and updates.ema_decay is not None:
        average = ema_update(average, variables, updates.ema_decay)
    new = state.replace(  # type: ignore[attr-defined]
        variables=variables, opt_state=opt_state, average=average
    )
    one = jnp.ones(())
    metrics = {
        **metrics,
        'grad_norm': (grad_norm, one),
        'nonfinite_leaf': (bad_leaf, one),
    }
    total_loss, _ = metrics['loss']
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(total_loss)

    # Counters go on: the schedule is one of steps, skipped or not.
    def keep(x: Array, old: Array) -> Array:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.where(finite, x, old) if floating else x

    new = jax.tree.map(keep, new, state)
    if updates.skip_nonfinite:
        metrics = jax.tree.map(lambda x: jnp.where(finite, x, 0.0), metrics)
        metrics['skipped'] = (jnp.where(finite, 0.0, 1.0), one)
    return new.replace(step=state.step + 1), metrics
