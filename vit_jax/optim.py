"""Learning-rate schedules and optimizers, as optax chains."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax.errors import UserError, unknown
from vit_jax.param_groups import (
    Group,
    Rule,
    decay_mask,
    decays,
    group_params,
    map_paths,
)
from vit_jax.typing import Array

OPTIMIZERS = ('adamw', 'sgd', 'lamb', 'adafactor')
SCHEDULES = ('cosine', 'linear', 'rsqrt', 'constant')
DECAYING = ('cosine', 'linear')  # to an end that is told


def make_schedule(
    name: str,
    learning_rate: float,
    num_steps: int,
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    end_learning_rate: float = 0.0,
) -> optax.Schedule:
    """Step -> learning rate: a linear warm-up from 0, the named curve, a cool-down.

    Args:
      name: 'cosine' or 'linear' (to `end_learning_rate`), 'constant', or 'rsqrt'
        (arXiv 1706.03762, equation 3: `learning_rate * sqrt(warmup_steps / step)`,
        which knows no end).
      learning_rate: at its highest, where the warm-up ends.
      num_steps: of the whole run.
      warmup_steps: of the warm-up.
      cooldown_steps: of a straight line to 0, at the end of the run, from where
        'rsqrt' or 'constant' then is (arXiv 2106.04560, section 3.5). The other two
        have an end of their own.
      end_learning_rate: of 'cosine' and 'linear', at `num_steps`.

    Raises:
      UserError: for an unknown name, a warm-up and cool-down longer than the run, a
        cool-down of a curve that has an end, an end above the learning rate, or 'rsqrt'
        without a warm-up.

    >>> schedule = make_schedule('rsqrt', 1.0, 100, warmup_steps=4, cooldown_steps=36)
    >>> [round(float(schedule(step)), 3) for step in (0, 2, 4, 16, 64, 82, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.25, 0.125, 0.0]
    """
    if name not in SCHEDULES:
        raise unknown('optim.schedule', name, SCHEDULES)
    if not 0 <= warmup_steps <= num_steps:
        raise UserError(
            f'optim.warmup_steps {warmup_steps} must be within num_steps {num_steps}'
        )
    steps = num_steps - warmup_steps - cooldown_steps  # of the curve itself
    if cooldown_steps < 0 or steps < 0:
        raise UserError(
            f'optim.cooldown_steps {cooldown_steps} must be within the '
            f'{num_steps - warmup_steps} steps after the warm-up'
        )
    if cooldown_steps and name in DECAYING:
        raise UserError(
            f"optim.cooldown_steps is for 'rsqrt' and 'constant'; {name!r} has an end "
            'of its own'
        )
    if end_learning_rate > learning_rate:
        raise UserError(
            f'optim.end_learning_rate {end_learning_rate} is above '
            f'optim.learning_rate {learning_rate}'
        )
    if name == 'cosine':
        share = end_learning_rate / learning_rate if learning_rate else 0.0
        curve = optax.cosine_decay_schedule(learning_rate, max(steps, 1), share)
    elif name == 'linear':
        curve = optax.linear_schedule(learning_rate, end_learning_rate, max(steps, 1))
    elif name == 'rsqrt':
        curve = _rsqrt_schedule(learning_rate, warmup_steps)
    else:
        curve = optax.constant_schedule(learning_rate)
    warmup = optax.linear_schedule(0.0, learning_rate, max(warmup_steps, 1))
    schedule = optax.join_schedules([warmup, curve], [warmup_steps])
    if cooldown_steps:
        cooldown = optax.linear_schedule(float(curve(steps)), 0.0, cooldown_steps)
        schedule = optax.join_schedules([schedule, cooldown], [warmup_steps + steps])
    return schedule


def _rsqrt_schedule(learning_rate: float, warmup_steps: int) -> optax.Schedule:
    """Steps since the warm-up -> learning rate * sqrt(warmup_steps / all steps)."""
    if not warmup_steps:
        raise UserError(
            "optim.schedule 'rsqrt' is measured in optim.warmup_steps, which are 0; "
            'set them (the papers take 10,000)'
        )

    def schedule(step: Array | int) -> Array:
        # Those before the end of the warm-up, which are not looked at, are no error.
        return learning_rate * jnp.sqrt(
            warmup_steps / (warmup_steps + jnp.maximum(step, 0))
        )

    return schedule


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    layer_decay: float = 1.0,
    rules: Sequence[Rule] = (),
    freeze: Sequence[str] = (),
    params: Any = None,
) -> optax.GradientTransformation:
    """The optax chain: clip, optimizer, decay, learning rate, factors of some.

    The decay is of the parameters that `param_groups.decays` names.

    Args:
      name: one of
        'adamw' (arXiv 1711.05101);
        'sgd': Nesterov momentum; the decay is added to the gradient, as in PyTorch;
        'lamb' (arXiv 1904.00962): AdamW whose step is as long as the parameter, times
        the learning rate. Parameters that do not decay take AdamW's own step, as in
        the authors' and NVIDIA's code: lengths of biases mean little;
        'adafactor' as modified in arXiv 2106.04560, section 3.4: mean squares kept as
        rows and columns, no scaling by the parameter, a first moment in bfloat16.
      schedule: step -> learning rate.
      weight_decay: factor of the parameter, before the learning rate: where a paper
        gives it apart from the learning rate (as arXiv 2106.04560), it is to be
        divided by the highest learning rate.
      clip_norm: largest norm of the whole gradient, without what is frozen; or None.
      b1: decay of the first moment, momentum of 'sgd'. 0 keeps none in 'sgd' and
        'adafactor'.
      b2: decay of the second moment; of 'adafactor', where it grows as
        1 - step**-0.8, the highest. 'sgd' has none.
      layer_decay: factor of the learning rate, and so of the decay, per layer below
        the head; 1.0 is off.
      rules: (pattern, factor of the learning rate, factor of the weight decay), see
        `param_groups.group_params`.
      freeze: patterns of parameters that get no update and no optimizer state.
      params: the parameters or their shapes; only the last three need them.

    Returns:
      The transformation. Paths of its state end in the parameter's, as in
      '0/mu/head/kernel'; 'adafactor' has 'v_row' and 'v_col' with an axis less each,
      and a placeholder [1] where a leaf has no such moment.

    Raises:
      UserError: for an unknown name, and as in `param_groups.group_params`.
    """
    if name not in OPTIMIZERS:
        raise unknown('optim.name', name, OPTIMIZERS)
    groups = group_params(params, layer_decay=layer_decay, rules=rules, freeze=freeze)
    trained = [group for group in groups.values() if not group.frozen] or [Group()]
    decay = [
        _decay_where(groups, factor, weight_decay)
        for factor in sorted({group.weight_decay for group in trained} - {0.0})
    ]
    descend = optax.scale_by_learning_rate(schedule)
    if name == 'adamw':
        steps = [optax.scale_by_adam(b1, b2), *decay, descend]
    elif name == 'sgd':
        steps = [*decay, optax.sgd(schedule, momentum=b1 or None, nesterov=True)]
    elif name == 'lamb':
        trust = optax.masked(optax.scale_by_trust_ratio(), decay_mask)
        steps = [optax.scale_by_adam(b1, b2, eps=1e-6), *decay, trust, descend]
    else:
        steps = [*_adafactor_moments(b1, b2), *decay, descend]
    if any(group.learning_rate != 1.0 for group in trained):
        steps.append(_scale_by_factors(groups))
    # Of the same structure with and without clipping, which a run may so begin late.
    clip = optax.identity()
    if clip_norm is not None:
        clip = optax.clip_by_global_norm(clip_norm)
    tx = optax.chain(clip, optax.chain(*steps))
    if len(trained) < len(groups):
        parts = {'trained': tx, 'frozen': optax.set_to_zero()}
        return optax.partition(
            parts,
            lambda tree: map_paths(
                lambda path: 'frozen' if groups[path].frozen else 'trained', tree
            ),
        )
    return tx


def _decay_where(
    groups: Mapping[str, Group], factor: float, weight_decay: float
) -> optax.GradientTransformation:
    """Decay of the parameters whose group has this factor of it."""

    def mask(tree: Any) -> Any:
        return map_paths(
            lambda path: decays(path) and groups[path].weight_decay == factor, tree
        )

    return optax.add_decayed_weights(weight_decay * factor, mask)


def _scale_by_factors(groups: Mapping[str, Group]) -> optax.GradientTransformation:
    """Every update times its group's factor of the learning rate."""

    def scale(updates: Any, params: Any) -> Any:
        factors = map_paths(lambda path: groups[path].learning_rate, updates)
        return jax.tree.map(lambda update, factor: update * factor, updates, factors)

    return optax.stateless(scale)


def _adafactor_moments(b1: float, b2: float) -> list[optax.GradientTransformation]:
    """Gradients over the root of their mean squares, then their mean.

    As arXiv 2106.04560 trains with: no clipping of updates, matrices factored from 32
    rows and columns on (https://github.com/google-research/big_vision).
    """

    def second(step: Array, exponent: float) -> Array:
        return jnp.minimum(1.0 - (step + 1.0) ** -exponent, b2)

    moments = [
        optax.scale_by_factored_rms(
            decay_rate=0.8, min_dim_size_to_factor=32, decay_rate_fn=second
        )
    ]
    if b1:
        moments.append(optax.ema(b1, debias=False, accumulator_dtype=jnp.bfloat16))
    return moments
