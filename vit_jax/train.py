"""Training, from a `Run` to a workdir with its result: read it downwards."""

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing

import jax
import numpy as np

from vit_jax import metrics
from vit_jax.build import Run
from vit_jax.checkpoint import Checkpoints, shapes_on
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate
from vit_jax.state import TrainState
from vit_jax.summary import count_params
from vit_jax.typing import Batch, Metrics
from vit_jax.workdir import open_workdir
from vit_jax.writer import MetricWriter, Progress, format_metrics, read_metrics


def train(run: Run, workdir: str | os.PathLike) -> dict[str, float]:
    """Trains, evaluates and checkpoints; goes on where the workdir holds this run.

    A run that was interrupted at any moment and is started again ends with the
    parameters of one that was not, bit for bit on the same hardware.

    Args:
      run: what to train.
      workdir: folder for checkpoints, metrics and config; made if need be.

    Returns:
      The metrics of the last evaluation, see `evaluate`.

    Raises:
      UserError: when the workdir cannot be written or holds another run, when the
        data is not there, or when the loss is not finite.
    """
    workdir = pathlib.Path(workdir)
    open_workdir(workdir, run.metadata['config'])
    run.eval_data().close()  # data that is not there is missed now, not at the end

    with Checkpoints(workdir, keep=run.checkpoint_keep) as checkpoints:
        # A finished run is left as it is.
        if checkpoints.latest_step() == run.num_steps:
            print(f'{workdir} holds this run, already finished', file=sys.stderr)
            return _last_evaluation(workdir)
        _check_continues(run, checkpoints)

        # State and position in the data: the newest checkpoint's, or the beginning.
        like = shapes_on(run.parallel.replicated, run.state_shape)
        restored = checkpoints.restore_latest(like)
        if restored:
            start, state = restored.step, restored.state
            position = restored.metadata['position']
        else:
            start, state, position = 0, _initial_state(run, workdir), 0

        train_step = run.parallel.train_step(run.train_step)
        eval_step = run.parallel.eval_step(run.eval_step)
        with (
            closing(run.train_data(position)) as data,
            MetricWriter(workdir, start, run.tensorboard) as writer,
            Progress(start, run.num_steps) as progress,
        ):
            progress.say(_describe(run, start))
            batches = run.parallel.prefetch(data)
            pending: list[Metrics] = []  # of the steps since the last log, on device
            clock = Clock()

            for step in range(start + 1, run.num_steps + 1):
                batch = clock.wait_for(batches)
                state, step_metrics = train_step(state, batch)
                pending.append(step_metrics)
                # The host may run two steps ahead of the device, not more: batches
                # in flight take memory.
                two_steps_ago = pending[-3:-2]
                jax.block_until_ready(two_steps_ago)
                progress.advance()
                if step == start + 1:
                    jax.block_until_ready(step_metrics)
                    progress.say(f'first step, compiled: {clock.seconds():.1f} s')
                    clock = Clock()

                if step % run.log_every_steps == 0 or step == run.num_steps:
                    values = _fetch(pending, step, state)
                    values['learning_rate'] = float(run.schedule(step - 1))
                    rates = clock.rates(run.batch_size)
                    writer.write(step, _prefix('train', values | rates))
                    progress.train(step, values, rates)
                    pending, clock = [], Clock()

                if step % run.eval_every_steps == 0 or step == run.num_steps:
                    result = evaluate(run, state.variables, eval_step)
                    if not np.isfinite(result['loss']):
                        raise UserError(
                            f'the loss of the evaluation is {result["loss"]} after '
                            f'step {step}; what was saved before is kept'
                        )
                    writer.write(step, _prefix('eval', result))
                    progress.say(f'step {step}  evaluation: {format_metrics(result)}')
                    clock = Clock()

                # Last, so that all metrics up to a checkpoint's step are written.
                if step % run.checkpoint_every_steps == 0 or step == run.num_steps:
                    _fetch(pending, step, state)  # raises if a step was not finite
                    position = step * run.batch_size
                    checkpoints.save(
                        step, state, {**run.metadata, 'position': position}
                    )
                    clock = Clock()
    return result


class Clock:
    """How fast steps have been since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waited = 0.0
        self._steps = 0

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; counts the step, and the time until it is there."""
        before = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - before
        self._steps += 1
        return batch

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def rates(self, batch_size: int) -> dict[str, float]:
        """Images per second, and the share of the time spent waiting for data."""
        if not self._steps:
            return {}
        return {
            'images_per_second': batch_size * self._steps / self.seconds(),
            'data_wait': self._waited / self.seconds(),
        }


def _check_continues(run: Run, checkpoints: Checkpoints) -> None:
    """Raises UserError if the data or the model is not that of the checkpoint."""
    step = checkpoints.latest_step()
    if step is None:
        return
    try:
        there = checkpoints.load_metadata(step)
    except UserError:
        return  # a damaged checkpoint is not gone on from
    here = json.loads(json.dumps(run.metadata))
    # Older checkpoints say less of their model.
    here['model'] = {k: v for k, v in here['model'].items() if k in there['model']}
    for key in ('model', 'class_names', 'num_train_examples'):
        if there[key] != here[key]:
            raise UserError(
                f'the run was begun with {key} {there[key]}, now it is {here[key]}; '
                'choose another --workdir'
            )
    if step > run.num_steps:
        raise UserError(
            f'the workdir is at step {step}, past the {run.num_steps} of this run'
        )


def _fetch(
    pending: Sequence[Metrics], step: int, state: TrainState
) -> dict[str, float]:
    """The mean of the metrics of the steps up to `step`.

    Raises:
      UserError: when a metric, the gradient's norm among them, was not finite;
        names the first such step.
    """
    fetched = jax.device_get(pending)
    for i, pairs in enumerate(fetched):
        bad = [name for name, (total, _) in pairs.items() if not np.isfinite(total)]
        if bad:
            params = state.variables['params']
            leaf = next(
                (
                    jax.tree_util.keystr(path, simple=True, separator='/')
                    for path, x in jax.tree_util.tree_leaves_with_path(params)
                    if not np.isfinite(x).all()
                ),
                'none yet',
            )
            raise UserError(
                f'{bad[0]} is {pairs[bad[0]][0]} at step '
                f'{step - len(fetched) + 1 + i} (first parameter that is not finite: '
                f'{leaf}); what was saved before is kept. Try a lower learning rate, '
                'a longer warm-up or optim.clip_norm'
            )
    return metrics.mean(fetched)


def _initial_state(run: Run, workdir: pathlib.Path) -> TrainState:
    """A fresh state, with the weights that the run starts from, if any."""
    state = run.parallel.init(run.init)
    if run.load is None:
        return state
    variables, report = run.load(sharding=run.parallel.replicated)
    print(report.summary(), file=sys.stderr)
    theirs = (report.metadata or {}).get('preprocessing', {})
    ours = json.loads(json.dumps(run.metadata['preprocessing']))
    for key in ('mean', 'std'):
        if key in theirs and theirs[key] != ours[key]:
            print(
                f'warning: the weights saw pixels of {key} {theirs[key]}, this run has '
                f'{ours[key]}; see config.dataset.normalize',
                file=sys.stderr,
            )
    if jax.process_index() == 0:
        (workdir / 'init_weights.txt').write_text(f'{report}\n')
    return dataclasses.replace(state, variables=variables)


def _prefix(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f'{prefix}/{name}': value for name, value in values.items()}


def _describe(run: Run, start: int) -> str:
    """What is about to happen, with the arithmetic of the batch."""
    hosts, devices = jax.process_count(), jax.local_devices()
    micro_batch = run.batch_size // (hosts * len(devices))
    params = count_params(run.state_shape.variables['params'])
    return (
        f'{run.metadata["model"]["name"]}: {params:,} parameters, '
        f'on {run.dataset.name} ({run.dataset.location})\n'
        f'batch of {run.batch_size} = {hosts} host(s) x {len(devices)} '
        f'{devices[0].device_kind} x {micro_batch} images, {run.parallel.mode}; '
        f'steps {start + 1} to {run.num_steps}'
    )


def _last_evaluation(workdir: pathlib.Path) -> dict[str, float]:
    for line in reversed(read_metrics(workdir)):
        if 'eval/loss' in line:
            values = {k.removeprefix('eval/'): v for k, v in line.items()}
            return {k: v for k, v in values.items() if k != 'step'}
    return {}
