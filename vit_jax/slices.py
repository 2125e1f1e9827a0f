"""TPU slices that are not here, by name: their chips, and devices to compile for.

XLA compiles for a slice from its name alone: libtpu brings the compiler, which runs on
the CPU.
"""

import importlib.util
import math
import os
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from vit_jax.errors import UserError, reason, unknown


class Generation(NamedTuple):
    """A generation of TPUs.

    Attributes:
      slices: the shapes in which up to 256 chips are let, as published with each
        generation at https://docs.cloud.google.com/tpu/docs.
      cores: devices that JAX counts per chip.
      options: of the compiler's topology, beside the shape.
    """

    slices: tuple[str, ...]
    cores: int = 1
    options: dict[str, str] = {}


_TORUS_2D = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_TORUS_3D = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x4x12', '4x8x8')
GENERATIONS: dict[str, Generation] = {
    # A chip's two cores work as one device, 'megacore', where JAX runs on v4; the
    # compiler would take them for two unless told.
    'v4': Generation((*_TORUS_3D, '4x4x16'), options={'chip_config_name': 'megacore'}),
    'v5e': Generation(_TORUS_2D),
    'v5p': Generation((*_TORUS_3D, '4x4x16')),
    'v6e': Generation(_TORUS_2D),
    'tpu7x': Generation(_TORUS_3D, cores=2),
}

# What libtpu would otherwise ask the metadata server of a cloud machine for, and
# complain about not finding; and a lock that is for programs that run.
_LIBTPU_ENV = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-1',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


class Slice(NamedTuple):
    """Accelerators that are not here.

    Attributes:
      name: such as 'v5e:16x16'.
      chips: how many there are.
      num_devices: how many devices JAX counts.
    """

    name: str
    chips: int
    num_devices: int


def parse_slice(name: str) -> Slice:
    """What a name such as 'v5e:4x4' or 'v4:4x4x8' stands for.

    Raises:
      UserError: for a generation or a shape that there is not.

    >>> parse_slice('tpu7x:2x2x4')
    Slice(name='tpu7x:2x2x4', chips=16, num_devices=32)
    """
    kind, _, shape = name.lower().partition(':')
    if kind not in GENERATIONS:
        raise unknown('TPU generation', kind, GENERATIONS)
    generation = GENERATIONS[kind]
    if shape not in generation.slices:
        raise UserError(
            f'no {kind} slice of up to 256 chips has the shape {shape!r}; choose one '
            f'of: {", ".join(generation.slices)}'
        )
    chips = math.prod(map(int, shape.split('x')))
    return Slice(f'{kind}:{shape}', chips, chips * generation.cores)


def slice_devices(name: str) -> tuple[jax.Device, ...]:
    """The devices of a slice; programs can be compiled for them, not run.

    Raises:
      UserError: for a name that is none (see `parse_slice`), without libtpu, and with
        one that does not know the slice.
    """
    name = parse_slice(name).name
    if importlib.util.find_spec('libtpu') is None:
        raise UserError("compiling for TPUs needs libtpu: pip install 'vit_jax[tpu]'")
    for key, value in _LIBTPU_ENV.items():
        os.environ.setdefault(key, value)
    kind, _, shape = name.partition(':')
    options: dict[str, Any] = dict(GENERATIONS[kind].options)
    if shape == '1x1':  # less than a host's four, which some versions take for granted
        options['chips_per_host_bounds'] = (1, 1, 1)
    try:
        description = topologies.get_topology_desc(
            topology_name=name, platform='tpu', **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f'libtpu does not know {name}: {reason(error)}') from error
    return tuple(description.devices)
