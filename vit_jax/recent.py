"""The steps since the last log: their metrics, and whether they were sound."""

from typing import Any

import jax
import numpy as np

from vit_jax import metrics
from vit_jax.errors import UserError
from vit_jax.typing import Metrics

# Steps in a row without a finite gradient, after which skipping them is no way on.
MANY_SKIPPED = 20


class RecentSteps:
    """Metrics of steps, on the device until somebody wants to know them."""

    def __init__(self) -> None:
        self._calls: list[Metrics] = []
        # In a row, up to the first of these steps, and up to the last that was fetched.
        self._skipped = self._skipped_after = 0

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Metrics) -> None:
        """The metrics of the steps of one call, see `metrics.per_step`."""
        self._calls.append(call)

    def wait(self) -> None:
        """Until the devices are two calls behind: batches in flight take memory."""
        jax.block_until_ready(self._calls[-3:-2])

    def fetch(self, step: int, params: Any) -> dict[str, float]:
        """The mean of the metrics, and how many steps were skipped.

        Args:
          step: the last of the steps.
          params: after it.

        Raises:
          UserError: when a metric, the gradient's norm among them, was not finite;
            names the first such step and the first such leaf. Also when many steps
            in a row were skipped for that reason.
        """
        steps = metrics.per_step(jax.device_get(self._calls))
        first = step - len(steps) + 1
        skipped = self._skipped
        for i, pairs in enumerate(steps):
            leaf, _ = pairs.pop('nonfinite_leaf', (0.0, 0.0))
            bad = [name for name, (total, _) in pairs.items() if not np.isfinite(total)]
            if bad:
                where = _first_nonfinite(params, int(leaf), 'grad_norm' in bad)
                raise UserError(
                    f'{bad[0]} is {pairs[bad[0]][0]} at step {first + i} ({where}); '
                    'what was saved before is kept. Try a lower learning rate, a '
                    'longer warm-up or optim.clip_norm'
                )
            skipped = skipped + 1 if pairs.get('skipped', (0.0,))[0] else 0
            if skipped >= MANY_SKIPPED:
                raise UserError(
                    f'none of the {skipped} steps up to step {first + i} had a finite '
                    'gradient; what was saved before is kept'
                )
        self._skipped_after = skipped
        values = metrics.mean(steps)
        if 'skipped' in values:
            values['skipped'] = sum(int(pairs['skipped'][0]) for pairs in steps)
        return values

    def clear(self) -> None:
        """Of what was fetched: it has been told."""
        self._skipped = self._skipped_after
        self._calls.clear()


def _first_nonfinite(params: Any, number: int, in_gradient: bool) -> str:
    """The first bad leaf, of the parameters, or else that number of the gradient."""
    leaves = [
        (jax.tree_util.keystr(path, simple=True, separator='/'), x)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    ]
    for name, x in leaves:
        if not jax.numpy.isfinite(x).all():
            return f'first parameter that is not finite: {name}'
    if in_gradient:
        name, _ = leaves[number]
        return f'parameters are finite; first gradient that is not: {name}'
    return 'parameters and gradients are finite'
