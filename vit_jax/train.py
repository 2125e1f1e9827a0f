"""Training, from a `Run` to a workdir with its result: read it downwards."""

import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NoReturn

import jax
import numpy as np

from vit_jax.averaging import init_average, mean_of
from vit_jax.build import Run
from vit_jax.checkpoint import Checkpoints, shapes_on
from vit_jax.errors import Stopped, UserError
from vit_jax.evaluate import evaluate, evaluate_all
from vit_jax.interrupt import StopSignals
from vit_jax.parallel import bytes_per_device
from vit_jax.recent import RecentSteps
from vit_jax.state import TrainState
from vit_jax.summary import count_params
from vit_jax.telemetry import Clock, Profile, warn_of_cpu, warn_of_waiting
from vit_jax.typing import Variables
from vit_jax.workdir import open_workdir, write_launch
from vit_jax.writer import MetricWriter, Progress, format_metrics, read_evaluations


def train(
    run: Run, workdir: str | os.PathLike, allow_changes: bool = False
) -> dict[str, float]:
    """Trains, evaluates and checkpoints; goes on where the workdir holds this run.

    A run that was interrupted at any moment and is started again ends with the
    parameters of one that was not, bit for bit on the same hardware.

    Args:
      run: what to train.
      workdir: folder for checkpoints, metrics and config; made if need be.
      allow_changes: whether to go on with a run that was begun with another config.

    Returns:
      The metrics of the last evaluation, see `evaluate`; those of the averaged
      parameters as 'ema_accuracy' and so on, and of the mean of the last checkpoints
      as 'average_accuracy'.

    Raises:
      UserError: when the workdir cannot be written, is in use or holds another run,
        when the data is not there, or when the loss is not finite.
      Stopped: after SIGTERM or SIGINT, when the state is saved.
    """
    workdir = pathlib.Path(workdir)
    config = run.metadata['config']
    with (
        open_workdir(workdir, config, allow_changes),
        StopSignals() as signals,
        Checkpoints(workdir, run.keep, run.periods.save, run.keep_best) as checkpoints,
    ):
        if run.vocabulary:
            run.vocabulary.keep(workdir, begun=checkpoints.latest_step() is not None)
        run.eval_data().close()  # data that is not there is missed now, not at the end
        about = {**run.metadata, **run.read_facts()}
        if run.score:  # how it counts is missed now too, where that is not installed
            about['signature'] = run.score.signature
        _check_continues(run, checkpoints, about)

        # State and position in the data: the newest checkpoint's, or the beginning.
        shardings = run.parallel.state_sharding(run.state_shape)
        restored = checkpoints.restore_latest(shapes_on(shardings, run.state_shape))
        if restored:
            step, state = restored.step, restored.state
            position = restored.metadata['position']
        else:
            step, state, position = 0, _initial_state(run, workdir), 0
        # A finished run is left as it is. One that was stopped may lack an evaluation.
        evaluation = read_evaluations(workdir).get(step, {}) if restored else {}
        if step == run.num_steps and evaluation:
            print(f'{workdir} holds this run, already finished', file=sys.stderr)
            return evaluation
        if run.load_teacher:
            teacher = run.load_teacher(sharding=run.parallel.leaf_sharding)
            state = state.replace(teacher=teacher)  # type: ignore[attr-defined]
        write_launch(workdir, config)

        train_step = run.parallel.train_step(run.train_steps, run.state_shape)
        eval_step = run.parallel.eval_step(run.eval_step)
        recent = RecentSteps()
        once: dict[str, float] = {}  # what the first log says beside the others
        programs: set[Any] = set()  # steps and shapes that have been compiled for
        clock = Clock(run)
        with (
            closing(run.feed(step, position)) as batches,
            MetricWriter(workdir, step, run.tensorboard, run.wandb) as writer,
            Progress(step, run.num_steps) as progress,
            Profile(workdir, run.periods.profile) as profile,
        ):

            def log() -> None:
                values = recent.fetch(step, state.variables['params'])
                values['learning_rate'] = float(run.schedule(step - 1))
                values |= run.seen(position)
                rates = clock.rates()
                writer.write(step, _prefix('train/', values | rates | once))
                once.clear()
                progress.train(step, values, rates)
                progress.say_once('waiting', warn_of_waiting(rates))
                recent.clear()
                clock.start()

            def save(evaluation: dict[str, float] | None = None) -> None:
                recent.fetch(step, state.variables['params'])  # raises if not finite
                metadata = {**about, 'position': position}
                checkpoints.save(step, state, metadata, evaluation)
                clock.start()

            def stop(waiting: bool = False) -> NoReturn:
                if recent:
                    log()
                if checkpoints.latest_step() != step:
                    save()
                checkpoints.wait()
                raise Stopped(step, waiting)

            def evaluate_now() -> dict[str, float]:
                try:
                    with signals.interrupting():  # who asks to stop may not wait
                        result = _evaluate(run, state, eval_step, step)
                        if step == run.num_steps and run.average:
                            result |= _evaluate_average(
                                run, state, eval_step, checkpoints, shardings
                            )
                except KeyboardInterrupt:
                    if not signals.asked:
                        raise
                    stop()
                writer.write(step, _prefix('eval/', result))
                progress.say(f'step {step}  evaluation: {format_metrics(result)}')
                clock.start()
                return result

            progress.say(_describe(run, step, shardings))
            if step and not evaluation and _evaluates(run, step):
                evaluation = evaluate_now()
                checkpoints.note(step, evaluation)
            clock.start()
            stopping = False
            for end in run.periods.calls(step, run.num_steps):
                profile.before(step + 1)
                steps = end - step  # of this call: one, or several of data on device
                try:
                    with signals.interrupting():
                        batch = clock.wait_for(batches, steps)
                except KeyboardInterrupt:
                    if not signals.asked:
                        raise
                    stop(waiting=True)  # perhaps without end
                state, step_metrics = train_step(state, batch)
                step, position = end, position + steps * run.position_per_step
                clock.called(step_metrics)
                recent.add(step_metrics)
                recent.wait()
                progress.advance(steps)
                profile.after(step, state)
                program = steps, *(x.shape for x in jax.tree.leaves(batch))
                if program not in programs:
                    jax.block_until_ready(step_metrics)
                    seconds = clock.seconds()
                    once['compile_seconds'] = once.get('compile_seconds', 0) + seconds
                    programs.add(program)
                    once['programs'] = len(programs)
                    if len(programs) == 1:
                        progress.say(f'first step, compiled: {seconds:.1f} s')
                    clock.start()

                last = step == run.num_steps
                stopping = signals.stop()
                if stopping and not last:
                    stop()
                if step % run.periods.log == 0 or last:
                    log()
                evaluation = evaluate_now() if _evaluates(run, step) else {}
                # Last, so that all metrics up to a checkpoint's step are written.
                if step % run.periods.save == 0 or last:
                    save(evaluation)
        checkpoints.wait()
        if stopping or signals.stop():
            raise Stopped(step, finished=True)
    return evaluation


def _evaluates(run: Run, step: int) -> bool:
    return step % run.periods.evaluate == 0 or step == run.num_steps


def _check_continues(run: Run, checkpoints: Checkpoints, about: dict[str, Any]) -> None:
    """Raises UserError if the data or the model is not that of the checkpoint."""
    step = checkpoints.latest_step()
    if step is None:
        return
    try:
        there = checkpoints.load_metadata(step)
    except UserError:
        return  # a damaged checkpoint is not gone on from
    here = json.loads(json.dumps(about))
    # Older checkpoints say less of their model.
    here['model'] = {k: v for k, v in here['model'].items() if k in there['model']}
    keys = ('model', 'class_names', 'num_train_examples', 'teacher', 'tokenizer')
    for key in keys:
        if there.get(key) != here.get(key):
            way = 'choose another --workdir'
            if key == 'teacher' and there.get(key):  # whose own run has gone on
                same = f'--config.distill.teacher={there[key]} --allow_changes'
                way = f'go on by {same}, or {way}'
            raise UserError(
                f'the run was begun with {key} {there.get(key)}, now it is '
                f'{here.get(key)}; {way}'
            )
    if step > run.num_steps:
        raise UserError(
            f'the workdir is at step {step}, past the {run.num_steps} of this run'
        )


def _initial_state(run: Run, workdir: pathlib.Path) -> TrainState:
    """A fresh state, with the weights that the run starts from, if any."""
    state = run.parallel.init(run.init)
    if run.load is None:
        return state
    variables, report = run.load(sharding=run.parallel.leaf_sharding)
    print(report.summary(), file=sys.stderr)
    theirs = (report.metadata or {}).get('preprocessing', {})
    ours = json.loads(json.dumps(run.metadata.get('preprocessing', {})))
    for key in ('mean', 'std'):
        if key in theirs and theirs[key] != ours.get(key):
            print(
                f'warning: the weights saw pixels of {key} {theirs[key]}, this run has '
                f'{ours[key]}; see config.dataset.normalize',
                file=sys.stderr,
            )
    if jax.process_index() == 0:
        (workdir / 'init_weights.txt').write_text(f'{report}\n')
    average = state.average
    if average is not None:
        average = init_average(variables)
    return state.replace(  # type: ignore[attr-defined]
        variables=variables, average=average
    )


def _evaluate(
    run: Run, state: TrainState, eval_step: Callable, step: int
) -> dict[str, float]:
    """The metrics of the parameters, and of their average where there is one."""
    averages = [] if state.average is None else [state.average]
    result, *others = evaluate_all(run, [state.variables, *averages], eval_step)
    if not np.isfinite(result['loss']):
        raise UserError(
            f'the loss of the evaluation is {result["loss"]} after step {step}; what '
            'was saved before is kept'
        )
    for other in others:
        result |= _beside('ema_', other)
    return result


def _evaluate_average(
    run: Run,
    state: TrainState,
    eval_step: Callable,
    checkpoints: Checkpoints,
    shardings: TrainState,
) -> dict[str, float]:
    """The metrics of the mean of the last checkpoints, of which `state` is one."""
    last = run.num_steps
    checkpoints.wait()
    like = shapes_on(shardings.variables, run.state_shape.variables)
    steps = [n for n in checkpoints.steps() if n % run.periods.save == 0 and n < last]
    steps = steps[::-1][: run.average - 1]
    if len(steps) < run.average - 1:
        print(
            f'warning: an average of {len(steps) + 1} checkpoints, not of '
            f'{run.average}: there are no more',
            file=sys.stderr,
        )

    def variables() -> Iterator[Variables]:
        yield state.variables
        for step in steps:
            try:
                yield checkpoints.load_variables(step, like)
            except UserError as error:
                print(f'warning: left out of the average: {error}', file=sys.stderr)

    averaged = mean_of(variables())
    return _beside('average_', evaluate(run, averaged, eval_step))


def _beside(prefix: str, result: dict[str, float]) -> dict[str, float]:
    return _prefix(prefix, {k: v for k, v in result.items() if k != 'examples'})


def _prefix(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f'{prefix}{name}': value for name, value in values.items()}


def _warn_of_repeating(run: Run, shardings: TrainState) -> str | None:
    specs = [sharding.spec for sharding in jax.tree.leaves(shardings.variables)]
    if run.parallel.tensor == 1 or any('tensor' in spec for spec in specs):
        return None
    return (
        'warning: parallel.tensor divides no parameter of this model: its devices do '
        'the same work'
    )


def _describe(run: Run, start: int, shardings: TrainState) -> str:
    """What is about to happen: model, data, devices, memory, the batch."""
    state = run.state_shape
    gib = {
        name: bytes_per_device(tree, where) / 2**30
        for name, tree, where in (
            ('parameters', state.variables, shardings.variables),
            ('optimizer', state.opt_state, shardings.opt_state),
            ('average', state.average, shardings.average),
            ('teacher', state.teacher, shardings.teacher),
        )
    }
    budget = ', '.join(f'{name} {size:.3g}' for name, size in gib.items() if size)
    lines = [
        warn_of_cpu(),
        _warn_of_repeating(run, shardings),
        f'{run.metadata["model"]["name"]}: '
        f'{count_params(state.variables["params"]):,} parameters, '
        f'on {run.dataset.name} ({run.dataset.location})',
        run.parallel.describe(run.batch_size, run.units.rows),
        f'GiB per device before activations: {budget}',
        f'steps {start + 1} to {run.num_steps}',
    ]
    return '\n'.join(filter(None, lines))
