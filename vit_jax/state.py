"""The state of training."""

import flax.struct
import optax

from vit_jax.typing import Array, Variables


@flax.struct.dataclass
class TrainState:
    """All that changes from step to step, and what steps are given beside the batch.

    Attributes:
      step: int32 scalar, steps made so far.
      variables: the model's collections; 'params' is trained.
      opt_state: state of the optimizer.
      average: the variables averaged over the steps, or None.
      teacher: variables of another model, which no step changes and no checkpoint
        holds, or None.
    """

    step: Array
    variables: Variables
    opt_state: optax.OptState
    average: Variables | None = None
    teacher: Variables | None = None
