"""The largest batch whose train step fits accelerators that are not here."""

import math
from typing import Any

import jax

from vit_jax.build import Run
from vit_jax.errors import UserError
from vit_jax.topology import Report, compile_for, run_on, with_batch_size


def largest_batch(
    run: Run,
    devices: tuple[jax.Device, ...],
    report: Report,
    quick: bool = False,
) -> Report | None:
    """The report of the largest batch that fits, within a device's share of rows.

    A second batch size gives a line through the memory of both; where it meets the
    limit is the answer, which is compiled too. Should that not fit, the line is
    drawn anew through it, three times at most.

    Args:
      run, devices, quick: see `compile_for`.
      report: of the run as it is.

    Returns:
      None where not even the smallest batch fits.

    Raises:
      UserError: where the memory of the devices is not known.
    """
    limit = report.memory.limit
    if limit is None:
        raise UserError(f'the memory of {report.device_kind!r} devices is not known')
    run = run_on(run, devices)
    unit = run.parallel.data * run.parallel.fsdp * run.parallel.accum_steps
    augment = getattr(_settings(run), 'augment', None)  # not every task has it
    if augment is not None and augment.mixes:  # whole pairs of rows
        unit = math.lcm(unit, 2)
    # A size that takes more than half of the limit, and fits: from far away, what
    # does not grow with the batch hides what does.
    proportional = report.batch_size * limit / report.memory.total
    other = max(int(0.6 * proportional) // unit, 1) * unit
    if other == report.batch_size:
        other *= 2

    def compile_at(batch_size: int) -> Report:
        sized = with_batch_size(run, batch_size)
        return compile_for(sized, devices, limit=limit, quick=quick)

    reports = {r.batch_size: r for r in (report, compile_at(other))}
    for _ in range(3):
        points = {size: r.memory.total for size, r in reports.items()}
        answer = solve_line(points, limit) // unit * unit
        if answer <= 0:
            break
        if answer not in reports:
            reports[answer] = compile_at(answer)
        if reports[answer].memory.fits:
            break
    fitting = [size for size, r in reports.items() if r.memory.fits]
    return reports[max(fitting)] if fitting else None


def solve_line(points: dict[int, int], limit: int) -> int:
    """The x at which the line through the two points nearest to `limit` meets it.

    Rounded down; below the smallest x whose y is above `limit`, should the line,
    which is no more than an approximation, say otherwise.

    >>> solve_line({10: 120, 20: 220}, 1000)
    98
    """
    near = sorted(points, key=lambda x: abs(points[x] - limit))[:2]
    x, other = min(near), max(near)
    slope = (points[other] - points[x]) / (other - x)
    above = [n for n, y in points.items() if y > limit]
    most = min(above, default=None)
    if slope <= 0:  # no more memory for more: nothing to solve
        return max(points) if most is None else most - 1
    answer = math.floor(x + (limit - points[x]) / slope)
    return answer if most is None else min(answer, most - 1)


def _settings(run: Run) -> Any:
    """What the task reads from the config; see `vit_jax.tasks.classify.Settings`."""
    return run.train_step.keywords['settings']  # type: ignore[attr-defined]
