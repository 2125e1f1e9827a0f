"""The state of training."""

import flax.struct
import optax

from vit_jax.typing import Array, Variables


@flax.struct.dataclass
class TrainState:
    """All that changes from step to step.

    Attributes:
      step: int32 scalar, updates made so far.
      variables: the model's collections; 'params' is trained.
      opt_state: state of the optimizer.
    """

    step: Array
    variables: Variables
    opt_state: optax.OptState
