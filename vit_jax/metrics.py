"""Metrics as (sum, weight) pairs: exact for any batch and device count."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.typing import Array, Metrics


def classification_metrics(
    logits: Array, label: Array, weight: Array, losses: Array
) -> Metrics:
    """Loss, accuracy and, above five classes, top-5 accuracy of a batch.

    Args:
      logits: `[B, V]`.
      label: `[B]` int.
      weight: `[B]`, 0 for rows that only fill the batch.
      losses: `[B]`, loss of each example.

    Returns:
      name -> (sum over the rows, sum of weights), float32 scalars.
    """
    hit = jnp.argmax(logits, axis=-1) == label
    total = jnp.sum(weight)
    metrics = {
        'loss': (jnp.sum(losses * weight), total),
        'accuracy': (jnp.sum(hit * weight), total),
    }
    if logits.shape[-1] > 5:
        _, best = jax.lax.top_k(logits, 5)
        hit5 = jnp.any(best == label[:, None], axis=-1)
        metrics['accuracy_top5'] = (jnp.sum(hit5 * weight), total)
    return metrics


def per_step(calls: Iterable[Metrics]) -> list[Metrics]:
    """The metrics of single steps, of calls that made one or several of them.

    >>> per_step([{'loss': (np.array([6.0, 1.0]), np.array([2.0, 1.0]))}])
    [{'loss': (6.0, 2.0)}, {'loss': (1.0, 1.0)}]
    """
    steps: list[Metrics] = []
    for call in calls:
        columns = {
            name: np.stack([np.atleast_1d(x) for x in pair], axis=1).tolist()
            for name, pair in call.items()
        }
        for row in zip(*columns.values()):
            steps.append({name: tuple(pair) for name, pair in zip(columns, row)})
    return steps


def mean(batches: Iterable[Metrics]) -> dict[str, float]:
    """The weighted mean of each metric over batches, summed in float64.

    Metrics of no weight at all are left out.

    >>> mean([{'loss': (6.0, 2.0)}, {'loss': (1.0, 1.0)}])
    {'loss': 2.3333333333333335}
    """
    sums: dict[str, np.ndarray] = {}
    for batch in batches:
        for name, pair in batch.items():
            sums[name] = sums.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
    return {
        name: float(total / weight) for name, (total, weight) in sums.items() if weight
    }
