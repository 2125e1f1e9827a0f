"""Runs a pure step on all devices: `jit` over a mesh, or `pmap`.

The mesh has three axes. Rows of the batch are split over 'data' and 'fsdp'; parameters
and optimizer over 'fsdp' and 'tensor', as `vit_jax.sharding` says. `pmap` is the simple
way: one replicated state, rows of the batch for each device. The step is the same
function (`vit_jax.axes` tells it where it runs), and so are the results.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.axes import BATCH_AXIS, ROW_AXES
from vit_jax.errors import UserError, times, unknown
from vit_jax.sharding import param_spec
from vit_jax.typing import Batch, Shape

MODES = ('jit', 'pmap')
MESH_AXES = (*ROW_AXES, 'tensor')


@dataclasses.dataclass(frozen=True)
class Parallel:
    """A way to run steps.

    Attributes:
      mode: 'jit' or 'pmap'.
      devices: all devices that take part, of all hosts.
      fsdp, tensor: sizes of these axes of the mesh; 'data' has what is left.
      accum_steps: micro-batches that a training batch is divided into.
    """

    mode: str
    devices: tuple[jax.Device, ...]
    fsdp: int = 1
    tensor: int = 1
    accum_steps: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown('parallel.mode', self.mode, MODES)
        if self.mode == 'pmap' and self.fsdp * self.tensor > 1:
            raise UserError(
                "parallel.mode='pmap' keeps the whole state on every device; "
                "parallel.fsdp and parallel.tensor need parallel.mode='jit'"
            )
        if len(self.devices) % (self.fsdp * self.tensor):
            raise UserError(
                f'parallel.fsdp x parallel.tensor = {self.fsdp} x {self.tensor} does '
                f'not divide the {len(self.devices)} device(s)'
            )
        # A process reads rows of its own: no two may be given the same ones.
        counts = collections.Counter(device.process_index for device in self.devices)
        if any(count % self.tensor for count in counts.values()):
            raise UserError(
                f'parallel.tensor {self.tensor} must divide the devices of each '
                f'process, {max(counts.values())}: heads and hidden units are not '
                'divided over processes'
            )

    @property
    def data(self) -> int:
        """Size of the mesh's axis 'data'."""
        return len(self.devices) // (self.fsdp * self.tensor)

    @functools.cached_property
    def mesh(self) -> Mesh:
        shape = (self.data, self.fsdp, self.tensor)
        devices = np.asarray(self.devices).reshape(shape)
        return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def rows(self) -> NamedSharding:
        """Of arrays whose first axis is the batch."""
        return NamedSharding(self.mesh, PartitionSpec(ROW_AXES))

    def state_sharding(self, tree: Any) -> Any:
        """Where each leaf of a state, or of variables, lies; see `vit_jax.sharding`."""

        def sharding(path: Any, x: Any) -> NamedSharding:
            name = jax.tree_util.keystr(path, simple=True, separator='/')
            return self.leaf_sharding(name, x.shape)

        return jax.tree_util.tree_map_with_path(sharding, tree)

    def leaf_sharding(self, path: str, shape: Shape) -> NamedSharding:
        """Where a parameter of that path ('block00/mlp/fc1/kernel') and shape lies."""
        return NamedSharding(self.mesh, param_spec(path, shape, self.mesh.shape))

    def check_batch_size(self, batch_size: int, key: str, accum_steps: int = 1) -> None:
        """Raises UserError unless the batch can be split over the devices."""
        shards = self.data * self.fsdp
        unit = shards * accum_steps
        if batch_size <= 0 or batch_size % unit:
            below = batch_size // unit * unit
            near = [str(n) for n in (below, below + unit) if n > 0] or [str(unit)]
            over = self._groups()
            if accum_steps > 1:
                over += f' x {accum_steps} micro-batches'
            raise UserError(
                f'{key} {batch_size} cannot be split over {over}; '
                f'the nearest that can: {" or ".join(near)}'
            )

    def _groups(self) -> str:
        """What rows of the batch are divided over, in words."""
        if self.tensor == 1:
            return f'{len(self.devices)} device(s)'
        return f'{self.data * self.fsdp} group(s) of {self.tensor} devices'

    def init(self, init: Callable[[], Any]) -> Any:
        """Runs `init` so that each device makes its part of the result."""
        shardings = self.state_sharding(jax.eval_shape(init))
        return jax.jit(init, out_shardings=shardings)()

    def train_step(self, step: Callable, state: Any) -> Callable:
        """Compiles (state, batch) -> (state, metrics); the old state is consumed.

        Args:
          step: the pure function.
          state: shapes of its state.
        """
        shardings = (self.state_sharding(state), self.replicated)
        return self._compile(step, shardings, donate_argnums=0)

    def eval_step(self, step: Callable) -> Callable:
        """Compiles (variables, batch) -> metrics."""
        return self._compile(step, self.replicated)

    def _compile(self, step: Callable, out_shardings: Any, **kwargs: Any) -> Callable:
        if self.mode == 'jit':
            mesh = self.mesh.abstract_mesh

            @functools.wraps(step)
            def on_mesh(*args: Any) -> Any:
                with jax.sharding.use_abstract_mesh(mesh):
                    return step(*args)

            return jax.jit(on_mesh, out_shardings=out_shardings, **kwargs)
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
        hosts = len({device.process_index for device in self.devices})
        return {
            k: jax.make_array_from_process_local_data(
                self.rows, v, (len(v) * hosts, *v.shape[1:])
            )
            for k, v in batch.items()
        }

    def prefetch(self, batches: Iterable[Batch], ahead: int = 2) -> Iterator[Batch]:
        """Batches on the devices, the next `ahead` ones already on their way."""
        batches = iter(batches)
        queue = collections.deque(map(self.put, itertools.islice(batches, ahead)))
        while queue:
            yield queue.popleft()
            queue.extend(map(self.put, itertools.islice(batches, 1)))

    def describe(self, batch_size: int, rows: str = 'images') -> str:
        """The mesh and the arithmetic of the batch, for people."""
        hosts = len({device.process_index for device in self.devices})
        mesh = f'mesh of data {self.data} x fsdp {self.fsdp} x tensor {self.tensor}'
        micro_batch = batch_size // (self.data * self.fsdp * self.accum_steps)
        return (
            f'{hosts} host(s), {len(self.devices)} {self.devices[0].device_kind} '
            f'device(s), {mesh if self.mode == "jit" else self.mode}\n'
            f'batch of {batch_size} = {self._groups()} x '
            f'{self.accum_steps} micro-batch(es) x {micro_batch} {rows}'
        )


def make_parallel(
    mode: str,
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    accum_steps: int = 1,
) -> Parallel:
    """All devices there are, run as the config's section `parallel` says.

    Raises:
      UserError: when the axes of the mesh do not make up the devices.
    """
    parallel = Parallel(mode, tuple(jax.devices()), fsdp, tensor, accum_steps)
    if data not in (None, parallel.data):
        raise UserError(
            f'parallel.data x fsdp x tensor = {times((data, fsdp, tensor))} is not the '
            f'{len(parallel.devices)} device(s); leave parallel.data out, or set it to '
            f'{parallel.data}'
        )
    return parallel


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """What the leaves of a tree take on one device.

    Args:
      tree: of arrays, or of their shapes and dtypes.
      shardings: of its leaves.
    """
    sizes = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize,
        tree,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))
