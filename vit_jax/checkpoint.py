"""Checkpoints of a run, through Orbax.

A workdir holds `checkpoints/<step>/` with three items: `variables` (all that the
model needs), `optimizer`, and `metadata`, which says what the variables are: model,
grid, classes, preprocessing, the resolved config, and the position in the data.
"""

import logging
import pathlib
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from vit_jax.errors import UserError, reason
from vit_jax.state import TrainState
from vit_jax.typing import Variables

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    step: int
    state: TrainState
    metadata: dict[str, Any]


class Checkpoints:
    """The checkpoints of one workdir; saving goes on while training does.

    Args:
      workdir: the run's folder.
      keep: how many of the newest to keep; None for all.
      read_only: whether the folder is another's, and left as it is.
    """

    def __init__(
        self, workdir: pathlib.Path, keep: int | None = None, read_only: bool = False
    ):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, read_only=read_only)
        self._folder = (workdir / 'checkpoints').absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._manager.close()  # waits for the save under way

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, metadata: dict[str, Any]) -> None:
        """Copies the state to the host, then writes in the background."""
        optimizer = {'step': state.step, 'opt_state': state.opt_state}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                variables=ocp.args.StandardSave(state.variables),
                optimizer=ocp.args.StandardSave(optimizer),
                metadata=ocp.args.JsonSave(metadata),
            ),
        )

    def restore_latest(self, like: TrainState) -> Restored | None:
        """The newest state that can be read, or None where there is none.

        A damaged checkpoint is reported and set aside, and the one before it taken.

        Args:
          like: shapes, dtypes and shardings of the state.

        Raises:
          UserError: when there are checkpoints and none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        variables=ocp.args.StandardRestore(like.variables),
                        optimizer=ocp.args.StandardRestore(
                            {'step': like.step, 'opt_state': like.opt_state}
                        ),
                        metadata=ocp.args.JsonRestore(),
                    ),
                )
            except Exception as error:  # Orbax raises whatever its readers raise
                log.warning('checkpoint %d cannot be read (%s)', step, reason(error))
                continue
            for damaged in steps[: steps.index(step)]:
                # Out of the way but not lost: the fault may be in the file system.
                target = self._folder / f'unreadable-{damaged}'
                (self._folder / str(damaged)).rename(target)
                log.warning('going on from checkpoint %d; kept %s', step, target)
            if steps[0] != step:
                self._manager.reload()
            state = TrainState(variables=restored.variables, **restored.optimizer)
            return Restored(step, state, restored.metadata)
        if steps:
            raise UserError(
                f'none of the checkpoints {steps} in {self._folder} can be '
                'read; move the folder away to start anew'
            )
        return None

    def load_metadata(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        return self.load(step, 'metadata', ocp.args.JsonRestore())

    def load(self, step: int, item: str, how: Any) -> Any:
        """One item of one checkpoint.

        Raises:
          UserError: when it cannot be read.
        """
        args = ocp.args.Composite(**{item: how})
        try:
            return self._manager.restore(step, args=args)[item]
        except Exception as error:  # Orbax raises whatever its readers raise
            raise UserError(
                f'checkpoint {step} in {self._folder} cannot be read: {reason(error)}'
            ) from error


def load_metadata(workdir: pathlib.Path) -> tuple[int, dict[str, Any]]:
    """Step and metadata of a workdir's newest checkpoint.

    Raises:
      UserError: when the folder holds none, or it is damaged.
    """
    if not (workdir / 'checkpoints').is_dir():
        raise UserError(f'{workdir} is not the workdir of a run: no checkpoints/ in it')
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise UserError(f'{workdir} has no finished checkpoint yet')
        return step, checkpoints.load_metadata(step)


def restore_variables(workdir: pathlib.Path, step: int, like: Variables) -> Variables:
    """The model's variables of one checkpoint.

    Args:
      workdir: the run's folder.
      step: which checkpoint.
      like: shapes, dtypes and shardings.

    Raises:
      UserError: when the checkpoint is damaged or of another model.
    """
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.load(step, 'variables', ocp.args.StandardRestore(like))


def stored_shapes(workdir: pathlib.Path, step: int) -> Variables:
    """Shapes and dtypes of the variables in a checkpoint, to be read on one device.

    Args:
      workdir: the run's folder.
      step: which checkpoint.

    Raises:
      UserError: when the checkpoint is damaged.
    """
    folder = (workdir / 'checkpoints').absolute()
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(folder / str(step) / 'variables')
        tree = metadata.item_metadata
        if tree is None:
            raise ValueError('the list of its arrays is damaged')
        return shapes_on(sharding, dict(tree.items()))
    except Exception as error:  # Orbax raises whatever its readers raise
        raise UserError(
            f'checkpoint {step} in {folder} cannot be read: {reason(error)}'
        ) from error


def shapes_on(sharding: jax.sharding.Sharding, tree: Any) -> Any:
    """Shapes and dtypes of a tree, to be restored with that sharding."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )
