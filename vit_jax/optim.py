"""Learning-rate schedules and optimizers, as optax chains."""

from typing import Any

import jax
import optax

from vit_jax.errors import UserError, unknown

OPTIMIZERS = ('adamw', 'sgd')
SCHEDULES = ('cosine', 'constant')


def make_schedule(
    name: str, learning_rate: float, num_steps: int, warmup_steps: int = 0
) -> optax.Schedule:
    """Step -> learning rate: a linear warm-up from 0, then the named curve.

    Args:
      name: 'cosine' (to 0 at `num_steps`) or 'constant'.
      learning_rate: at its highest.
      num_steps: of the whole run.
      warmup_steps: of the warm-up.

    Raises:
      UserError: for an unknown name, or a warm-up longer than the run.
    """
    if name not in SCHEDULES:
        raise unknown('optim.schedule', name, SCHEDULES)
    if not 0 <= warmup_steps <= num_steps:
        raise UserError(
            f'optim.warmup_steps {warmup_steps} must be within num_steps {num_steps}'
        )
    if name == 'cosine':
        after = optax.cosine_decay_schedule(
            learning_rate, max(num_steps - warmup_steps, 1)
        )
    else:
        after = optax.constant_schedule(learning_rate)
    warmup = optax.linear_schedule(0.0, learning_rate, max(warmup_steps, 1))
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """The optax chain: clip, optimizer, decay of `decay_mask`'s parameters.

    Args:
      name: 'adamw' (arXiv 1711.05101) or 'sgd' (Nesterov momentum 0.9; the decay
        is added to the gradient, as in PyTorch).
      schedule: step -> learning rate.
      weight_decay: factor of the parameter, before the learning rate.
      clip_norm: largest norm of the whole gradient, or None.

    Raises:
      UserError: for an unknown name.
    """
    if name == 'adamw':
        rule = optax.adamw(schedule, weight_decay=weight_decay, mask=decay_mask)
    elif name == 'sgd':
        rule = optax.chain(
            optax.add_decayed_weights(weight_decay, mask=decay_mask),
            optax.sgd(schedule, momentum=0.9, nesterov=True),
        )
    else:
        raise unknown('optim.name', name, OPTIMIZERS)
    if clip_norm is None:
        return rule
    return optax.chain(optax.clip_by_global_norm(clip_norm), rule)


def decay_mask(params: Any) -> Any:
    """True for the parameters that decay: kernels, GPSA's position kernel included.

    Biases, norms, gates, tokens and position embeddings do not.

    >>> decay_mask({'fc1': {'kernel': 0, 'bias': 0}, 'gating': 0})
    {'fc1': {'bias': False, 'kernel': True}, 'gating': False}
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        return str(path[-1].key).endswith('kernel')

    return jax.tree_util.tree_map_with_path(decays, params)
