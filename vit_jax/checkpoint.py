"""Checkpoints of a run, through Orbax.

A workdir holds `checkpoints/<step>/` with three items: `variables` (all that the
model needs), `optimizer`, and `metadata`, which says what the variables are: model,
grid, classes, preprocessing, the resolved config and the position in the data. A run
that averages its parameters has a fourth, `average`. How good each is stands in the
run's `metrics.jsonl`.
"""

import contextlib
import dataclasses
import itertools
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from vit_jax.averaging import init_average
from vit_jax.errors import UserError, reason
from vit_jax.state import TrainState
from vit_jax.typing import Variables
from vit_jax.writer import read_evaluations

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
      every_steps: the period of saving, see `regular`.
      keep_best: name of a metric of the evaluation, by which the best one is kept as
        well; the lowest of a loss, perplexity or distance, the highest of others. Or
        None.
      read_only: whether the folder is another's, and left as it is.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        keep: int | None = None,
        every_steps: int = 1,
        keep_best: str | None = None,
        read_only: bool = False,
    ):
        self._evaluations = read_evaluations(workdir)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Retention(
                keep, every_steps, keep_best, self._evaluations
            ),
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # of saves that were cut off
        )
        self._folder = (workdir / 'checkpoints').absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            try:
                self._manager.close()
            except Exception as error:  # what is already on its way up says more
                log.warning('the last checkpoint was not written (%s)', reason(error))

    def steps(self) -> list[int]:
        """Of the finished checkpoints, in their order."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: TrainState,
        metadata: dict[str, Any],
        evaluation: dict[str, float] | None = None,
    ) -> None:
        """Copies the state to the host, then writes in the background.

        Args:
          step: steps made.
          state: after them.
          metadata: what the checkpoint says of itself.
          evaluation: metrics of this step, where there are; see `note`.

        Raises:
          UserError: when this or the checkpoint before it cannot be written.
        """
        if evaluation:
            self.note(step, evaluation)
        optimizer = {'step': state.step, 'opt_state': state.opt_state}
        items = {
            'variables': ocp.args.StandardSave(state.variables),
            'optimizer': ocp.args.StandardSave(optimizer),
            'metadata': ocp.args.JsonSave(metadata),
        }
        if state.average is not None:
            items['average'] = ocp.args.StandardSave(state.average)
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def note(self, step: int, evaluation: dict[str, float]) -> None:
        """Remembers how good a step is, by which the best one is kept.

        `metrics.jsonl` has it too, for whoever opens the folder again.
        """
        self._evaluations[step] = evaluation

    def load_variables(self, step: int, like: Variables) -> Variables:
        """The model's variables of one checkpoint, of shapes and shardings `like`."""
        return self.load(step, 'variables', ocp.args.StandardRestore(like))

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
          UserError: when it fails.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax raises whatever its writers raise
            raise UserError(
                f'a checkpoint cannot be written to {self._folder}: {reason(error)}; '
                'what was saved before is kept'
            ) from error

    def restore_latest(self, like: TrainState) -> Restored | None:
        """The newest state that can be read, or None where there is none.

        A damaged checkpoint is reported and set aside, and the one before it taken.

        Args:
          like: shapes, dtypes and shardings of the state; its `teacher` is not read.

        Raises:
          UserError: when there are checkpoints and none can be read.
        """
        optimizer = {'step': like.step, 'opt_state': like.opt_state}
        items = {
            'variables': ocp.args.StandardRestore(like.variables),
            'optimizer': ocp.args.StandardRestore(optimizer),
            'metadata': ocp.args.JsonRestore(),
        }
        steps = self.steps()[::-1]
        for step in steps:
            self._check_structure(step, 'variables', like.variables)
            self._check_structure(step, 'optimizer', optimizer)
            wanted = dict(items)
            # A run may go on with an average which it did not have before.
            has_average = (self._folder / str(step) / 'average').exists()
            if like.average is not None and has_average:
                wanted['average'] = ocp.args.StandardRestore(like.average)
            restored = None
            try:
                args = ocp.args.Composite(**wanted)
                restored = self._manager.restore(step, args=args)
            except Exception as error:  # Orbax raises whatever its readers raise
                log.warning('checkpoint %d cannot be read (%s)', step, reason(error))
            if not _everywhere(restored is not None):
                continue
            assert restored is not None
            if steps[0] != step:
                self._set_aside(steps[: steps.index(step)], step)
            average = restored.get('average')
            if average is None and like.average is not None:
                average = init_average(restored.variables)
                log.warning('checkpoint %d has no average: it begins here', step)
            state = TrainState(
                variables=restored.variables, average=average, **restored.optimizer
            )
            return Restored(step, state, restored.metadata)
        if steps:
            raise UserError(
                f'none of the checkpoints {steps} in {self._folder} can be '
                'read; move the folder away to start anew'
            )
        return None

    def _check_structure(self, step: int, item: str, like: Any) -> None:
        """Raises UserError for a checkpoint of another model or optimizer."""
        try:
            stored = stored_tree(self._folder / str(step) / item)
            there = [tuple(x.shape) for x in jax.tree.leaves(stored)]
        except Exception:  # a damaged one, as will be told when it is read
            return
        here = [tuple(x.shape) for x in jax.tree.leaves(like)]
        if sorted(there) != sorted(here):
            raise UserError(
                f'checkpoint {step} in {self._folder} holds {len(there)} arrays of '
                f'{item}, this run has {len(here)}, or others: a config that changes '
                'them needs another --workdir; see config.init.weights'
            )

    def _set_aside(self, damaged: Sequence[int], step: int) -> None:
        """Out of the way but not lost: the fault may be in the file system."""
        for number in damaged if jax.process_index() == 0 else ():
            names = (f'unreadable-{number}{"-" * i}' for i in itertools.count())
            targets = (self._folder / name for name in names)
            target = next(path for path in targets if not path.exists())
            (self._folder / str(number)).rename(target)
            log.warning('going on from checkpoint %d; kept %s', step, target)
        _everywhere(True)  # all wait for the renaming
        self._manager.reload()

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


def _everywhere(holds: bool) -> bool:
    """Whether it holds on all processes, which meet here."""
    if jax.process_count() == 1:
        return holds
    return bool(multihost_utils.process_allgather(np.asarray(holds)).all())


def stored_tree(folder: pathlib.Path) -> dict[str, Any]:
    """What an item of a checkpoint holds: a tree of shapes and dtypes."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata
    if tree is None:
        raise ValueError('the list of its arrays is damaged')
    return dict(tree.items())


def shapes_on(sharding: Any, tree: Any) -> Any:
    """Shapes and dtypes of a tree, to be restored so.

    Args:
      sharding: of all its leaves, or a tree of theirs.
      tree: of arrays, or of their shapes and dtypes.
    """
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding
    )


def regular(steps: Sequence[int], every_steps: int) -> list[int]:
    """The steps that a run saves by itself, and the newest whatever it is.

    Where a run was stopped by a signal is no place of its own: it must not push out
    others, or what an interrupted run keeps is not what it would keep otherwise.

    Args:
      steps: of all checkpoints, in their order.
      every_steps: the period of saving.

    >>> regular([10, 17, 20, 23], 10)
    [10, 20, 23]
    """
    return [n for n in steps if n % every_steps == 0 or n == steps[-1]]


def best(
    steps: Sequence[int], metric: str, evaluations: dict[int, dict[str, float]]
) -> int | None:
    """The step whose evaluation is best, the first of equals; None of none evaluated.

    >>> best([10, 20, 30], 'loss', {10: {'loss': 0.5}, 20: {'loss': 0.2}})
    20
    """
    sign = -1.0 if metric.endswith(('loss', 'perplexity', 'frechet')) else 1.0
    known = [n for n in steps if metric in evaluations.get(n, {})]
    scores = {n: sign * evaluations[n][metric] for n in known}
    return max(scores, key=scores.__getitem__) if scores else None


@dataclasses.dataclass(frozen=True)
class _Retention(preservation_policy.PreservationPolicy):
    """Which checkpoints stay: the newest `regular` ones, and the best of them."""

    keep: int | None
    every_steps: int
    keep_best: str | None
    evaluations: dict[int, dict[str, float]]

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(steps)
        if self.keep is not None:
            newest = regular(steps, self.every_steps)
            kept = set(newest[-self.keep :])
            if self.keep_best is not None:
                kept.add(best(newest, self.keep_best, self.evaluations))
        return [step in kept for step in steps]
