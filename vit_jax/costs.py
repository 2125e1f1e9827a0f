"""What cells that have not run would cost: operations, and the time of a GPU.

Operations are those of the cell's own train step, traced and not run, as often as it
would be made. The time follows from them by an assumption, which is made here alone.
"""

import json
from collections.abc import Iterable, Iterator

from vit_jax.experiment import Cell, Experiment, build_cell
from vit_jax.hardware import HARDWARE
from vit_jax.summary import step_flops

# Of the published peak, what a large model in bfloat16 may reach. Not measured here.
GPU, SHARE = HARDWARE['NVIDIA H100 80GB HBM3'], 0.4
PEAK = f'{SHARE:.0%} of its {GPU.flops / 1e12:g} TFLOP/s in bfloat16'
ASSUMPTION = f"""\
FLOP: operations of products and convolutions, a multiply-add being two. Time: one
{GPU.name} at {PEAK}, an assumption; small models,
float32 and slow input take several times as long (docs/reproducing.md).
"""

# Overrides that say how often a step is made, and on which examples: not what it is.
_OF_NO_STEP = ('dataset.train_fraction', 'num_epochs', 'num_steps')


def cell_flops(
    experiment: Experiment, cells: Iterable[Cell], data_dir: str | None = None
) -> Iterator[int | None]:
    """Operations of each cell, None where nobody counts them; a few seconds for each.

    Of a training they are those of its steps, without evaluations, and without what
    the experiment measures afterwards. Cells with the same step share its trace.

    Args:
      experiment: of the cells.
      cells: of any seed.
      data_dir: where datasets lie; of most nothing but the size is asked, which is
        known.

    Raises:
      UserError: as `build` does.
    """
    steps: dict[str, int] = {}
    for cell in cells:
        if cell.config is None:
            yield experiment.flops(cell)
            continue
        run = build_cell(cell, data_dir=data_dir)
        same = {k: v for k, v in cell.overrides.items() if k not in _OF_NO_STEP}
        key = json.dumps([cell.config, same], sort_keys=True)
        if key not in steps:
            steps[key] = step_flops(run)
        yield run.num_steps * steps[key]


def describe(flops: int | None) -> tuple[str, str]:
    """Operations in two digits; and the time of `GPU`, by the assumption made here.

    >>> describe(10**17), describe(10**19), describe(10**21)
    (('1.0e17', '4.2 minutes'), ('1.0e19', '7.0 hours'), ('1.0e21', '29 days'))
    >>> describe(10**18), describe(13_400_000_000), describe(None)
    (('1.0e18', '42 minutes'), ('1.3e10', 'seconds'), ('not counted', ''))
    """
    if flops is None:
        return 'not counted', ''
    time = flops / (SHARE * GPU.flops) / 60
    told = f'{flops:.1e}'.replace('e+', 'e')
    if time < 1:
        return told, 'seconds'
    unit = 'minutes'
    for larger, size in (('hours', 60), ('days', 24)):
        if time < size:
            break
        unit, time = larger, time / size
    return told, f'{time:.1f} {unit}' if time < 10 else f'{time:.0f} {unit}'
