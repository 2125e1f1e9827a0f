"""One exact pass over a split: every example counts once."""

from collections.abc import Callable, Sequence
from contextlib import closing

import jax

from vit_jax import metrics
from vit_jax.build import Run
from vit_jax.typing import Metrics, Variables


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
    return evaluate_all(run, [variables], eval_step)[0]


def evaluate_all(
    run: Run, models: Sequence[Variables], eval_step: Callable | None = None
) -> list[dict[str, float]]:
    """The metrics of several variables of the model, in one pass over the data."""
    eval_step = eval_step or run.parallel.eval_step(run.eval_step)
    with closing(run.eval_data()) as data:
        batches: list[list[Metrics]] = []
        for batch in run.parallel.prefetch(data):
            batches.append([eval_step(variables, batch) for variables in models])
            jax.block_until_ready(batches[-3:-2])  # two ahead, as in training
    results = [_summarize(pairs) for pairs in zip(*jax.device_get(batches))]
    if run.score is not None:
        for result, variables in zip(results, models):
            result |= run.score(variables, result)
    return results


def _summarize(batches: Sequence[Metrics]) -> dict[str, float]:
    counted = sum(float(batch.get('examples', batch['loss'])[1]) for batch in batches)
    return {**metrics.mean(batches), 'examples': round(counted)}
