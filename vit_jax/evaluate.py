"""One exact pass over a split: every example counts once."""

from collections.abc import Callable
from contextlib import closing

import jax

from vit_jax import metrics
from vit_jax.build import Run
from vit_jax.typing import Variables


def evaluate(
    run: Run, variables: Variables, eval_step: Callable | None = None
) -> dict[str, float]:
    """The metrics of `run.eval_data()`, exact at any batch size and device count.

    Args:
      run: what to evaluate.
      variables: the model's.
      eval_step: `run.eval_step` compiled, where it is at hand.

    Returns:
      Name -> mean over the examples; 'examples' -> how many there are.
    """
    eval_step = eval_step or run.parallel.eval_step(run.eval_step)
    with closing(run.eval_data()) as data:
        pairs = []
        for batch in run.parallel.prefetch(data):
            pairs.append(eval_step(variables, batch))
            jax.block_until_ready(pairs[-3:-2])  # two batches ahead, as in training
    pairs = jax.device_get(pairs)
    examples = sum(float(batch['loss'][1]) for batch in pairs)
    return {**metrics.mean(pairs), 'examples': round(examples)}
