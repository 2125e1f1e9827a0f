"""The hinge: `build(config) -> Run`, the only reader of a config.

All that trains, evaluates or looks at an experiment takes a `Run`.
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Generator, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import optax
from ml_collections import ConfigDict

from vit_jax.config import ConfigReader, check_ranges, check_unread
from vit_jax.data.resident import scan_steps
from vit_jax.data.vocabulary import Vocabulary
from vit_jax.data.watch import Watch
from vit_jax.errors import UserError, unknown
from vit_jax.feed import feed_from_device, feed_from_host
from vit_jax.image_data import make_image_data
from vit_jax.models import check_classifies, check_translates
from vit_jax.modules import make_model
from vit_jax.optim import DECAYING, make_optimizer, make_schedule
from vit_jax.parallel import Parallel, make_parallel
from vit_jax.pretrained import Report, load_variables
from vit_jax.pretrained.published import model_facts
from vit_jax.state import TrainState
from vit_jax.task_data import IMAGES, Score, Source, TaskData, Units, count_steps
from vit_jax.tasks import get_task
from vit_jax.typing import Batch, Inputs, Metrics, PRNGKey, Variables


@dataclasses.dataclass(frozen=True)
class Periods:
    """How often things happen, in steps.

    Attributes:
      log, evaluate, save: periods.
      call: steps that one call of the compiled step makes; None for the shortest of
        the periods, or one where something happens before its end.
      profile: first and last step of the trace, or None.
    """

    log: int
    evaluate: int
    save: int
    call: int | None = 1
    profile: tuple[int, int] | None = None

    def calls(self, start: int, num_steps: int) -> Iterator[int]:
        """The step after each call of the compiled step.

        >>> list(Periods(log=3, evaluate=5, save=100, call=None).calls(2, 12))
        [3, 4, 5, 6, 9, 10, 11, 12]
        """
        periods = (self.log, self.evaluate, self.save)
        size = self.call or min(periods)
        first, last = self.profile or (1, 0)
        step = start
        while step < num_steps:
            events = [num_steps, *((step // n + 1) * n for n in periods)]
            events += [n for n in (first - 1, last) if n > step]
            # Two sizes in all, for each is a program of its own.
            step += size if step + size <= min(events) else 1
            yield step


@dataclasses.dataclass(frozen=True)
class Run:
    """An experiment, assembled; no example has been read, no array computed.

    Attributes:
      model: the Flax module.
      dataset: what is known of the data.
      init: () -> TrainState; pure.
      load: sharding= -> (variables, report), the weights that the run starts from; or
        None, where it starts from `init` alone.
      load_teacher: sharding= -> variables of the model that is learned from, or None.
      train_step: (state, batch) -> (state, metrics); pure.
      train_steps: (state, feed) -> (state, metrics): what is compiled, which makes one
        step, or several where the data is on the device.
      eval_step: (variables, batch) -> metrics; pure.
      train_data: position -> endless host batches, this process's rows.
      feed: (steps made, position) -> what `train_steps` is given.
      position_per_step, seen, units, inputs, vocabulary, read_facts: see
        `TaskData`.
      score: further metrics of an evaluation, or None.
      eval_data: () -> host batches, every example of the split once.
      probe_data: the same of the examples to train on, not augmented; or None.
      schedule: step -> learning rate.
      parallel: how steps run on the devices.
      state_shape: shapes and dtypes of the TrainState.
      batch_shape: shapes and dtypes of a global batch.
      num_steps: updates in all.
      batch_size: rows of it, over all devices.
      periods: how often there is a log line, an evaluation, a checkpoint.
      keep, keep_best, average: newest checkpoints that are kept; the metric by which
        the best is, or None; how many are averaged at the end, 0 for none.
      tensorboard, wandb: whether metrics go to TensorBoard events too; the project of
        Weights & Biases that they go to, or None.
      metadata: what a checkpoint says of itself: model, classes, preprocessing and
        the resolved config; JSON.
    """

    model: nn.Module
    dataset: Source
    init: Callable[[], TrainState]
    load: Callable[..., tuple[Variables, Report]] | None
    load_teacher: Callable[..., Variables] | None
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    train_steps: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    eval_step: Callable[[Variables, Batch], Metrics]
    train_data: Callable[[int], Watch]
    feed: Callable[[int, int], Generator[Batch]]
    eval_data: Callable[[], Watch]
    probe_data: Callable[[], Watch] | None
    position_per_step: int
    seen: Callable[[int], dict[str, float]]
    units: Units
    inputs: Inputs
    score: Score | None
    vocabulary: Vocabulary | None
    read_facts: Callable[[], dict[str, Any]]
    schedule: optax.Schedule
    parallel: Parallel
    state_shape: TrainState
    batch_shape: dict[str, jax.ShapeDtypeStruct]
    num_steps: int
    batch_size: int
    periods: Periods
    keep: int
    keep_best: str | None
    average: int
    tensorboard: bool
    wandb: str | None
    metadata: dict[str, Any]


def build(config: ConfigDict, named: Collection[str] | None = None) -> Run:
    """Assembles the experiment that a config describes.

    Args:
      config: from `default_config`, by way of a recipe.
      named: keys that the user named, see `check_unread`.

    Raises:
      UserError: for values that do not fit each other, and for keys that were set
        but that this run does not read.
    """
    c = ConfigReader(config)
    check_ranges(config)
    _check_json(config)
    mesh = (c.parallel.data, c.parallel.fsdp, c.parallel.tensor)
    parallel = make_parallel(c.parallel.mode, *mesh, c.accum_steps)
    task = get_task(c.task)
    data: TaskData = getattr(task, 'make_data', make_image_data)(c, parallel)
    model = make_model(
        c.model.name, data.num_classes, c.dtype, c.model.kwargs, c.parallel.remat
    )
    if hasattr(task, 'check_model'):
        task.check_model(model)
    elif data.units == IMAGES:
        check_classifies(model)
    elif data.vocabulary:
        check_translates(model)
    init_rng, step_rng = jax.random.split(jax.random.key(c.seed))
    num_steps = count_steps(c, data)
    schedule = make_schedule(
        c.optim.schedule,
        c.optim.learning_rate,
        num_steps,
        c.optim.warmup_steps,
        c.optim.cooldown_steps,
        c.optim.end_learning_rate if c.optim.schedule in DECAYING else 0.0,
    )
    tx = make_optimizer(
        c.optim.name,
        schedule,
        weight_decay=c.optim.weight_decay,
        clip_norm=c.optim.clip_norm,
        b1=c.optim.b1,
        # Read only where it counts, so that setting it elsewhere is an error.
        **({} if c.optim.name == 'sgd' else {'b2': c.optim.b2}),
        layer_decay=c.optim.layer_decay,
        rules=c.optim.rules,
        freeze=c.optim.freeze,
        params=_param_shapes(c, model, data.inputs),
    )

    settings = task.make_settings(c, data)
    init = partial(
        task.init_state,
        model=model,
        tx=tx,
        rng=init_rng,
        inputs=data.inputs,
        settings=settings,
    )
    train_step = partial(
        task.train_step, model=model, tx=tx, rng=step_rng, settings=settings
    )
    eval_step = partial(task.eval_step, model=model, settings=settings)
    periods = _periods(c, parallel, data)
    train_steps: Callable = train_step
    feed: Callable
    if data.make_batch is None:
        feed = partial(feed_from_host, train_data=data.train_data, parallel=parallel)
    else:
        train_steps = scan_steps(train_step, data.make_batch, parallel.rows)
        feed = partial(
            feed_from_device,
            load=data.load,
            make_batch=data.make_batch,
            calls=partial(periods.calls, num_steps=num_steps),
            parallel=parallel,
            timeout_seconds=c.dataset.timeout_seconds,
        )
    score = None
    if hasattr(task, 'make_score'):
        score = task.make_score(c, data, model, parallel)
    load_teacher = None
    if hasattr(task, 'load_teacher'):
        load_teacher = partial(task.load_teacher, settings=settings)

    run = Run(
        model=model,
        dataset=data.dataset,
        init=init,
        load=_load(c, model, data.inputs, init_rng),
        load_teacher=load_teacher,
        train_step=train_step,
        train_steps=train_steps,
        eval_step=eval_step,
        train_data=data.train_data,
        feed=feed,
        eval_data=data.eval_data,
        probe_data=data.probe_data,
        position_per_step=data.position_per_step,
        seen=data.seen,
        units=data.units,
        inputs=data.inputs,
        score=score,
        vocabulary=data.vocabulary,
        read_facts=data.read_facts,
        schedule=schedule,
        parallel=parallel,
        state_shape=jax.eval_shape(init),  # a model that does not fit fails here
        batch_shape=data.batch_shape,
        num_steps=num_steps,
        batch_size=jax.tree.leaves(data.batch_shape)[0].shape[0],
        periods=periods,
        keep=c.checkpoint.keep,
        keep_best=c.checkpoint.keep_best,
        average=c.checkpoint.average,
        tensorboard=c.log.tensorboard,
        wandb=c.log.wandb,
        metadata={
            'model': {
                'name': c.model.name,
                'kwargs': c.model.kwargs,
                'num_classes': data.num_classes,
                'dtype': c.dtype,
                **model_facts(model, data.inputs[0].shape[1:-1]),
            },
            **data.facts,
            **(task.facts(settings) if hasattr(task, 'facts') else {}),
            'config': config.copy_and_resolve_references().to_dict(),
        },
    )
    _check_checkpoints(run)
    check_unread(config, c.unread(), named)
    return run


def _check_json(config: ConfigDict) -> None:
    """Raises UserError for values that a workdir could not store."""
    try:
        json.dumps(config.copy_and_resolve_references().to_dict())
    except TypeError as error:
        raise UserError(
            f'the config must be plain values ({error}); name a function or class by '
            "its path, 'package.module:name'"
        ) from error


def _param_shapes(c: ConfigReader, model: nn.Module, inputs: Inputs) -> Any:
    """Shapes of the parameters, where the optimizer tells them apart; else None."""
    if not (c.optim.rules or c.optim.freeze) and c.optim.layer_decay == 1.0:
        return None
    init = partial(model.init, train=False)
    return jax.eval_shape(init, {'params': jax.random.key(0)}, *inputs)['params']


def _periods(c: ConfigReader, parallel: Parallel, data: TaskData) -> Periods:
    # Read by `cluster.join`, before there are devices: a key of every run.
    _ = c.parallel.heartbeat_seconds
    return Periods(
        log=c.log.every_steps,
        evaluate=c.eval.every_steps,
        save=c.checkpoint.every_steps,
        # Read only where it counts, so that setting it elsewhere is an error.
        call=_steps_per_call(c, parallel) if data.make_batch else 1,
        profile=_profile_steps(c.log.profile_steps),
    )


def _steps_per_call(c: ConfigReader, parallel: Parallel) -> int | None:
    steps = c.dataset.steps_per_call
    return 1 if steps is None and parallel.devices[0].platform == 'cpu' else steps


def _profile_steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, last = text.partition(':')
    if not (colon and first.isdecimal() and last.isdecimal()) or not (
        1 <= int(first) <= int(last)
    ):
        raise UserError(
            f"log.profile_steps is 'first:last', such as '10:15', not {text!r}"
        )
    return int(first), int(last)


def _check_checkpoints(run: Run) -> None:
    if run.keep_best is not None:
        variables = run.state_shape.variables
        names = list(jax.eval_shape(run.eval_step, variables, run.batch_shape))
        names += run.score.names if run.score else ()
        if run.state_shape.average is not None:
            names += [f'ema_{name}' for name in names]
        if run.keep_best not in names:
            raise unknown('metric in checkpoint.keep_best', run.keep_best, names)
    first, _ = run.periods.profile or (1, 0)
    if first > run.num_steps:
        raise UserError(
            f'log.profile_steps begins at step {first}; the run has {run.num_steps}'
        )
    if run.keep_best is not None and run.periods.save % run.periods.evaluate:
        raise UserError(
            f'checkpoint.keep_best needs an evaluation at each checkpoint: '
            f'checkpoint.every_steps {run.periods.save} must be a multiple of '
            f'eval.every_steps {run.periods.evaluate}'
        )
    if run.average > run.keep:
        raise UserError(
            f'checkpoint.average {run.average} needs as many checkpoints; '
            f'checkpoint.keep is {run.keep}'
        )


def _load(
    c: ConfigReader, model: nn.Module, inputs: Inputs, rng: PRNGKey
) -> Callable[..., tuple[Variables, Report]] | None:
    if c.init.weights is None:
        return None
    return partial(
        load_variables,
        c.init.weights,
        model,
        inputs,
        new_head=c.init.new_head,
        rng=rng,  # as in `init`: a new head is the one that a fresh model has
    )
