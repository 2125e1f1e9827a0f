"""How long functions take next to each other, and how fast a run trains."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any, NamedTuple

import jax
import numpy as np

from vit_jax.build import Run
from vit_jax.errors import UserError
from vit_jax.telemetry import Clock
from vit_jax.typing import Batch

WARMUP = 3  # steps that are not measured: the first are slower


class Measured(NamedTuple):
    """What one function took.

    Attributes:
      seconds: median over the rounds.
      temp_bytes: peak temporary memory of the compiled program, without arguments
        and results.
    """

    seconds: float
    temp_bytes: int


def compare(
    functions: Mapping[str, Callable], args: tuple[Any, ...], rounds: int = 20
) -> dict[str, Measured]:
    """Compiles functions of the same arguments and times them in turns.

    Turns, because a noisy machine slows neighbours in time alike: every round runs
    each function once, in another order.

    Args:
      functions: name -> function of arrays.
      args: its arguments, the same for all.
      rounds: how often each runs.
    """
    compiled = {
        name: jax.jit(function).lower(*args).compile()
        for name, function in functions.items()
    }
    for program in compiled.values():
        jax.block_until_ready(program(*args))
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for name in order.permutation(list(compiled)):
            start = time.perf_counter()
            jax.block_until_ready(compiled[name](*args))
            seconds[name].append(time.perf_counter() - start)
    return {
        name: Measured(
            float(np.median(seconds[name])),
            program.memory_analysis().temp_size_in_bytes,  # type: ignore[union-attr]
        )
        for name, program in compiled.items()
    }


# --- A run --------------------------------------------------------------------


class Pace(NamedTuple):
    """How fast steps were.

    Attributes:
      step_seconds: median.
      quartiles: a quarter of the steps took less than the first, or more than the
        second.
      per_second: images or tokens at the median, over all devices.
      per_second_per_device: a device's share of them.
      data_wait: share of the time in which devices waited for data, as in the log of
        a run.
      flops_utilisation: share of the devices' peak that the model needs at the median;
        None where that is not known.
    """

    step_seconds: float
    quartiles: tuple[float, float]
    per_second: float
    per_second_per_device: float
    data_wait: float
    flops_utilisation: float | None


class Training(NamedTuple):
    """How fast a run trains.

    Attributes:
      compile_seconds: of the step.
      memory_bytes: the most that was in use on a device; where it does not tell, what
        the program needs.
      batch: the pace with one batch, made up, that lies on the devices.
      data: the pace with the run's own data, or None.
    """

    compile_seconds: float
    memory_bytes: int
    batch: Pace
    data: Pace | None


def measure_training(run: Run, steps: int = 20, data: bool = False) -> Training:
    """Times the steps of a run, which is not trained: its state is thrown away.

    Args:
      run: from `build`.
      steps: that are timed, after `WARMUP` ones.
      data: whether steps on the run's own data are timed too.

    Raises:
      UserError: with `data`, for data that is not there, and for text.
    """
    if data and run.vocabulary:
        raise UserError(
            'batches of text differ in shape, and each is compiled when it comes: only '
            'the longest are timed here; the log of a run tells of its data'
        )
    if data:
        run.train_data(0).close()  # what is not there is missed before compiling
    state = run.parallel.init(run.init)
    batch = run.parallel.put(make_batch(run))
    start = time.perf_counter()
    program = _compile(run, run.train_step, state, batch)
    compile_seconds = time.perf_counter() - start
    clock = Clock(run)
    state, seconds = time_steps(program, state, itertools.repeat(batch), steps, clock)
    of_batch, of_data = _pace(run, seconds, clock), None
    if data:
        with closing(run.feed(0, 0)) as feed:
            batches: Iterator[Batch] = feed
            size = 1
            if run.train_steps is not run.train_step:  # all of the data on the device
                size = next(run.periods.calls(0, run.num_steps))
                first = next(feed)
                batches = itertools.repeat(first)  # the same steps again
                program = _compile(run, run.train_steps, state, first)
            _, seconds = time_steps(program, state, batches, steps, clock, size)
            of_data = _pace(run, seconds, clock)
    return Training(compile_seconds, _memory(program), of_batch, of_data)


def make_batch(run: Run) -> Batch:
    """Noise and labels in the shape of a batch: this process's rows of it."""
    rng = np.random.default_rng(0)
    num_classes = run.metadata['model']['num_classes'] or 1  # or none read

    def draw(x: jax.ShapeDtypeStruct) -> np.ndarray:
        shape = (x.shape[0] // jax.process_count(), *x.shape[1:])
        if x.dtype == np.uint8:  # pixels
            return rng.integers(0, 256, shape, np.uint8)
        if x.dtype == np.int32:  # labels, tokens
            return rng.integers(0, num_classes, shape, np.int32)
        return np.ones(shape, x.dtype)  # weights

    return {key: draw(x) for key, x in run.batch_shape.items()}


def time_steps(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    batches: Iterator[Batch],
    count: int,
    clock: Clock,
    size: int = 1,
) -> tuple[Any, np.ndarray]:
    """Runs steps, the host one ahead of the devices, as a run does.

    Args:
      step: (state, batch) -> (state, metrics), compiled; makes `size` steps.
      state: is consumed.
      batches: an item a call of `step`.
      count: calls that are timed, after `WARMUP` ones.
      clock: counts the timed calls.
      size: steps of a call.

    Returns:
      (the last state, seconds of each step `[count]`).
    """
    ends = []  # of the call before the i-th
    metrics = None
    for i in range(WARMUP + count + 1):  # the last one closes the time before it
        if i == WARMUP + 1:
            clock.start()
        state, following = step(state, clock.wait_for(batches, size))
        clock.called(following)
        jax.block_until_ready(metrics)
        ends.append(time.perf_counter())
        metrics = following
    jax.block_until_ready(metrics)
    return state, np.diff(ends)[WARMUP:] / size


def _compile(run: Run, function: Callable, state: Any, batch: Any) -> Any:
    step: Any = run.parallel.train_step(function, run.state_shape)
    return step.lower(state, batch).compile()


def _pace(run: Run, seconds: np.ndarray, clock: Clock) -> Pace:
    low, median, high = np.percentile(seconds, (25, 50, 75)).tolist()
    rates = clock.rates()
    # Of a step: images of the batch, or the tokens that batches have on average.
    counted = rates[f'{run.units.losses}_per_second'] * rates['step_seconds']
    per_second = counted / median
    return Pace(
        step_seconds=median,
        quartiles=(low, high),
        per_second=per_second,
        per_second_per_device=per_second / len(run.parallel.devices),
        data_wait=rates['data_wait'],
        flops_utilisation=clock.utilisation(per_second),
    )


def _memory(program: Any) -> int:
    used = jax.local_devices()[0].memory_stats() or {}
    if 'peak_bytes_in_use' in used:
        return used['peak_bytes_in_use']
    needed = program.memory_analysis()
    return (
        needed.argument_size_in_bytes
        + needed.output_size_in_bytes
        - needed.alias_size_in_bytes
        + needed.temp_size_in_bytes
        + needed.generated_code_size_in_bytes
    )
