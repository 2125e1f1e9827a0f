"""Runs a pure step on all devices: `jit` over a mesh, or `pmap`.

Both keep one replicated state and split every batch by rows. The step is the same
function (`vit_jax.axes` tells it where it runs), and so are the results.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.axes import BATCH_AXIS
from vit_jax.errors import UserError, unknown
from vit_jax.typing import Batch

MODES = ('jit', 'pmap')


@dataclasses.dataclass(frozen=True)
class Parallel:
    """A way to run steps.

    Attributes:
      mode: 'jit' or 'pmap'.
      devices: all devices that take part, of all hosts.
    """

    mode: str
    devices: tuple[jax.Device, ...]

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown('parallel.mode', self.mode, MODES)

    @property
    def mesh(self) -> Mesh:
        return Mesh(
            np.asarray(self.devices), (BATCH_AXIS,), axis_types=(AxisType.Auto,)
        )

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def check_batch_size(self, batch_size: int, key: str) -> None:
        """Raises UserError unless the batch can be split over the devices."""
        count = len(self.devices)
        if batch_size <= 0 or batch_size % count:
            below = batch_size // count * count
            near = [str(n) for n in (below, below + count) if n > 0] or [str(count)]
            raise UserError(
                f'{key} {batch_size} cannot be split over {count} device(s); '
                f'the nearest that can: {" or ".join(near)}'
            )

    def init(self, init: Callable[[], Any]) -> Any:
        """Runs `init` so that its result lies on every device."""
        return jax.jit(init, out_shardings=self.replicated)()

    def train_step(self, step: Callable) -> Callable:
        """Compiles (state, batch) -> (state, metrics); the old state is consumed."""
        return self._compile(step, donate_argnums=0)

    def eval_step(self, step: Callable) -> Callable:
        """Compiles (variables, batch) -> metrics."""
        return self._compile(step)

    def _compile(self, step: Callable, **kwargs: Any) -> Callable:
        if self.mode == 'jit':
            return jax.jit(step, out_shardings=self.replicated, **kwargs)
        return jax.pmap(
            step,
            axis_name=BATCH_AXIS,
            in_axes=(None, 0),
            out_axes=None,
            devices=self.devices,
            **kwargs,
        )

    def put(self, batch: Batch) -> Batch:
        """Sends this host's rows of a batch to its devices."""
        if self.mode == 'pmap':  # one leading row per device
            here = jax.process_index()
            local = sum(device.process_index == here for device in self.devices)
            batch = {k: v.reshape(local, -1, *v.shape[1:]) for k, v in batch.items()}
        sharding = NamedSharding(self.mesh, PartitionSpec(BATCH_AXIS))
        return {
            k: jax.make_array_from_process_local_data(sharding, v)
            for k, v in batch.items()
        }

    def prefetch(self, batches: Iterable[Batch], ahead: int = 2) -> Iterator[Batch]:
        """Batches on the devices, the next `ahead` ones already on their way."""
        batches = iter(batches)
        queue = collections.deque(map(self.put, itertools.islice(batches, ahead)))
        while queue:
            yield queue.popleft()
            queue.extend(map(self.put, itertools.islice(batches, 1)))


def make_parallel(mode: str) -> Parallel:
    """All devices there are, run as `mode` says."""
    return Parallel(mode, tuple(jax.devices()))
