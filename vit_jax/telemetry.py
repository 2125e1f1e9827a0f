"""How fast a run is, how well it uses its devices, and what it waits for."""

import glob
import os
import pathlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from vit_jax.build import Run
from vit_jax.hardware import find_hardware
from vit_jax.summary import step_flops
from vit_jax.typing import Array, Batch, Metrics

MUCH_WAITING = 0.3  # of the time, above which the user is told

# Files of devices, and the extra that makes JAX use them.
_ACCELERATORS = (
    ('/dev/nvidia[0-9]*', 'gpu'),
    ('/dev/accel*', 'tpu'),
    ('/dev/vfio/[0-9]*', 'tpu'),  # of newer TPU hosts
)


class Clock:
    """How fast steps have been since it was made.

    Args:
      run: what the steps are of.
    """

    def __init__(self, run: Run) -> None:
        self._unit = run.units.losses
        self._num_devices = len(run.parallel.devices)
        hardware = find_hardware(run.parallel.devices[0].device_kind)
        self._peak = hardware.flops if hardware else None
        self._flops = step_flops(run) / _units(run) if hardware else None
        self._watcher = ThreadPoolExecutor(1, 'device')
        self._finished: Future[float] | None = None  # when the last call was
        self.start()

    def start(self) -> None:
        """Counts from here."""
        self._start = time.perf_counter()
        self._waited = 0.0
        self._steps = 0
        self._counts: list[Array] = []

    def wait_for(self, batches: Iterator[Batch], steps: int = 1) -> Batch:
        """The next batch, of that many steps; counts the time without work for the
        devices until it is there.
        """
        before = time.perf_counter()
        batch = next(batches)
        if self._finished is None:
            self._waited += time.perf_counter() - before
        elif self._finished.done() and not self._finished.exception():
            idle_since = max(before, self._finished.result())
            self._waited += time.perf_counter() - idle_since
        self._steps += steps
        return batch

    def called(self, metrics: Metrics) -> None:
        """To be told of each call of the compiled step, by what it returned."""

        def when_ready() -> float:
            jax.block_until_ready(metrics)
            return time.perf_counter()

        self._finished = self._watcher.submit(when_ready)
        self._counts.append(metrics['loss'][1])

    def seconds(self) -> float:
        """Since it counts, without the time that devices waited for data."""
        return time.perf_counter() - self._start - self._waited

    def rates(self) -> dict[str, float]:
        """Seconds per step, images or tokens per second, the share of the time in which
        devices had to wait for data; where they are known, the share of the devices'
        peak FLOP/s that the model needed, and the most memory that was in use, in GiB.
        """
        if not self._steps:
            return {}
        seconds = time.perf_counter() - self._start
        step_seconds = seconds / self._steps
        counts = jax.device_get(self._counts)
        per_second = sum(float(np.sum(count)) for count in counts) / seconds
        rates = {
            'step_seconds': step_seconds,
            f'{self._unit}_per_second': per_second,
            'data_wait': self._waited / seconds,
        }
        utilisation = self.utilisation(per_second)
        if utilisation is not None:
            rates['flops_utilisation'] = utilisation
        memory = jax.local_devices()[0].memory_stats() or {}
        if 'peak_bytes_in_use' in memory:
            rates['memory_gib'] = memory['peak_bytes_in_use'] / 2**30
        return rates

    def utilisation(self, per_second: float) -> float | None:
        """The share of the devices' peak that the model needs at that pace, or None."""
        if not (self._flops and self._peak):
            return None
        return self._flops * per_second / (self._num_devices * self._peak)


class Profile:
    """Traces the steps that the config names, for TensorBoard or Perfetto.

    Args:
      workdir: the trace goes to `profile` in it.
      steps: first and last step, or None.
    """

    def __init__(self, workdir: pathlib.Path, steps: tuple[int, int] | None) -> None:
        self._folder = workdir / 'profile'
        self._first, self._last = steps or (0, -1)
        self._tracing = False

    def __enter__(self) -> 'Profile':
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Starts the trace, if `step` is the first of it."""
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def after(self, step: int, state: object) -> None:
        """Ends the trace after its last step, when the device is done with it."""
        if self._tracing and step >= self._last:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False


def warn_of_waiting(rates: dict[str, float]) -> str | None:
    """What to say when the devices wait for data, else None."""
    share = rates.get('data_wait', 0.0)
    if share < MUCH_WAITING:
        return None
    return (
        f'warning: {share:.0%} of the time goes into waiting for data; see '
        "config.dataset.num_workers, or dataset.placement='device' for small images"
    )


def warn_of_cpu() -> str | None:
    """What to say when JAX runs on the CPU of a machine with accelerators, or None."""
    if jax.default_backend() != 'cpu' or os.environ.get('JAX_PLATFORMS') == 'cpu':
        return None
    for pattern, extra in _ACCELERATORS:
        if glob.glob(pattern):
            return (
                f'warning: {glob.glob(pattern)[0]} is there, but JAX runs on the CPU; '
                f"install it with pip install -e '.[{extra}]'"
            )
    return None


def _units(run: Run) -> int:
    """Images of a batch, or tokens of the longest."""
    length = run.inputs[-1].shape[1] if run.units.losses == 'tokens' else 1
    return run.batch_size * length
