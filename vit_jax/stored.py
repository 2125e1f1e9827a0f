"""Weights that a run has stored, chosen by name: the best, an average, a step's."""

import pathlib
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from vit_jax.averaging import mean_of
from vit_jax.checkpoint import Checkpoints, best, regular, shapes_on, stored_tree
from vit_jax.errors import UserError, reason, some
from vit_jax.typing import Variables
from vit_jax.writer import read_evaluations


def latest_step(workdir: pathlib.Path) -> int:
    """Step of a workdir's newest checkpoint.

    Raises:
      UserError: when the folder holds none.
    """
    if not (workdir / 'checkpoints').is_dir():
        raise UserError(f'{workdir} is not the workdir of a run: no checkpoints/ in it')
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
    if step is None:
        raise UserError(f'{workdir} has no finished checkpoint yet')
    return step


def load_metadata(workdir: pathlib.Path, step: int | None = None) -> dict[str, Any]:
    """What a checkpoint of a workdir says of itself; by default the newest.

    Raises:
      UserError: when it is not there, or damaged.
    """
    step = latest_step(workdir) if step is None else step
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.load_metadata(step)


class Choice(NamedTuple):
    """Weights of a run.

    Attributes:
      steps: of the checkpoints; the mean of several is meant.
      item: 'variables', or 'average', the one over the steps.
    """

    steps: tuple[int, ...]
    item: str = 'variables'


def choose(workdir: pathlib.Path, wanted: str) -> Choice:
    """Which weights of a run are meant.

    Args:
      workdir: the run's folder.
      wanted: 'latest'; 'best' by the run's checkpoint.keep_best; 'ema', the average of
        the latest; 'last:5', the mean of five checkpoints; or the number of a step.

    Raises:
      UserError: when there are no such.
    """
    latest = latest_step(workdir)
    config = load_metadata(workdir, latest).get('config', {})
    period = config.get('checkpoint', {}).get('every_steps', 1)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        steps = checkpoints.steps()
        if wanted == 'latest':
            return Choice((latest,))
        if wanted == 'ema':
            if config.get('optim', {}).get('ema_decay') is None:
                raise UserError(f'{workdir} has no average: it has no optim.ema_decay')
            return Choice((latest,), 'average')
        if wanted == 'best':
            metric = config.get('checkpoint', {}).get('keep_best')
            if metric is None:
                raise UserError(
                    f'{workdir} has no best: it has no checkpoint.keep_best'
                )
            step = best(regular(steps, period), metric, read_evaluations(workdir))
            if step is None:
                raise UserError(
                    f'{workdir} has no best yet: its metrics.jsonl has no {metric} of '
                    'a checkpoint'
                )
            item = 'average' if metric.startswith('ema_') else 'variables'
            return Choice((step,), item)
    name, _, number = wanted.partition(':')
    newest = regular(steps, period)
    if name == 'last' and number.isdecimal() and 0 < int(number) <= len(newest):
        return Choice(tuple(newest[-int(number) :]))
    if wanted.isdecimal() and int(wanted) in steps:
        return Choice((int(wanted),))
    raise UserError(
        f'{workdir}@{wanted} is none of its weights: @latest, @best, @ema, '
        f'@last:N up to {len(newest)}, or @ one of the steps {some(map(str, steps))}'
    )


def restore_variables(
    workdir: pathlib.Path, choice: Choice, like: Variables
) -> Variables:
    """The model's variables of one checkpoint, or the mean of several.

    Args:
      workdir: the run's folder.
      choice: which of its weights.
      like: shapes, dtypes and shardings.

    Raises:
      UserError: when a checkpoint is damaged or of another model.
    """
    how = ocp.args.StandardRestore(like)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        found = (checkpoints.load(step, choice.item, how) for step in choice.steps)
        return next(found) if len(choice.steps) == 1 else mean_of(found)


def stored_shapes(workdir: pathlib.Path, choice: Choice) -> Variables:
    """Shapes and dtypes of weights in a checkpoint, to be read on one device.

    Args:
      workdir: the run's folder.
      choice: which of its weights.

    Raises:
      UserError: when the checkpoint is damaged.
    """
    folder = (workdir / 'checkpoints').absolute()
    step = choice.steps[-1]
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        return shapes_on(sharding, stored_tree(folder / str(step) / choice.item))
    except Exception as error:  # Orbax raises whatever its readers raise
        raise UserError(
            f'checkpoint {step} in {folder} cannot be read: {reason(error)}'
        ) from error
