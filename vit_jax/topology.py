"""The train step of a run, compiled for accelerators that are not here.

XLA compiles for devices from their description alone (`vit_jax.slices`), and tells what
the program needs of each before any is rented: the same step, sharded and donated in
the same way, that `train` would compile there.
"""

import contextlib
import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from vit_jax.build import Run
from vit_jax.data.resident import MakeBatch, scan_steps
from vit_jax.errors import UserError
from vit_jax.hardware import find_hardware
from vit_jax.parallel import bytes_per_device
from vit_jax.summary import count_macs

# XLA's least effort (`jax_optimization_level` O0), by its number.
_QUICK = {'optimization_level': 9}


class Memory(NamedTuple):
    """Bytes that the step takes on one device.

    Attributes:
      arguments: by kind, 'parameters', 'optimizer', 'batch' (or 'data', where all
        examples are on every device)..., without padding.
      padding: what the layout of the arguments on the device adds to them.
      outputs: results that do not take the place of an argument.
      temporaries: activations, gradients and other intermediate results.
      code: the program.
      total: all of it. Where the program does not fit, what the compiler says it
        needs, of which it tells no parts beside the arguments.
      limit: what there is for programs, or None where that is not known.
    """

    arguments: dict[str, int]
    padding: int
    outputs: int
    temporaries: int
    code: int
    total: int
    limit: int | None

    @property
    def fits(self) -> bool:
        return self.limit is None or self.total <= self.limit


class Report(NamedTuple):
    """What a compiled train step costs each device.

    Attributes:
      device_kind: as JAX names it.
      num_devices: in all.
      chips: in all, of which each may be two devices.
      mesh: sizes of the mesh's axes.
      batch_size: images a step, over all devices.
      accum_steps: micro-batches of a step.
      memory: see `Memory`.
      flops: operations a step of one device, a multiply-add being two.
      bytes_accessed: to and from memory in a step, if every operation of the program
        read its operands there and wrote its results there; None where the compiler
        did not say.
      collectives: bytes of the results of each kind of message between devices, as
        often as the program's text names it (the body of a loop once); empty where
        there is no program.
      compile_seconds: how long compiling for memory took here.
    """

    device_kind: str
    num_devices: int
    chips: int
    mesh: dict[str, int]
    batch_size: int
    accum_steps: int
    memory: Memory
    flops: float
    bytes_accessed: float | None
    collectives: dict[str, int]
    compile_seconds: float

    def roofline(self) -> dict[str, float]:
        """Least seconds a step for 'compute' and 'memory', by the published peaks.

        That of compute is a bound. That of memory is an estimate: what stays in the
        chip between operations need not be moved. Empty for an unknown device.
        """
        hardware = find_hardware(self.device_kind)
        if hardware is None:
            return {}
        seconds = {'compute': self.flops / hardware.flops}
        if self.bytes_accessed is not None:
            seconds['memory'] = self.bytes_accessed / hardware.hbm_bandwidth
        return seconds

    def to_json(self) -> dict[str, Any]:
        """The report, and what follows from it, as plain values."""
        return {
            **self._asdict(),
            'memory': {**self.memory._asdict(), 'fits': self.memory.fits},
            'roofline_seconds': self.roofline(),
        }


def run_on(run: Run, devices: tuple[jax.Device, ...]) -> Run:
    """The same run on other devices.

    Raises:
      UserError: when its mesh or its batch does not fit them.
    """
    parallel = dataclasses.replace(run.parallel, devices=devices)
    if parallel.mode != 'jit':
        raise UserError("compiling for other devices needs parallel.mode='jit'")
    parallel.check_batch_size(run.batch_size, 'config.batch_size', parallel.accum_steps)
    return dataclasses.replace(run, parallel=parallel)


def with_batch_size(run: Run, batch_size: int) -> Run:
    """The same run with batches of another size; its schedule stays."""
    shapes = {
        key: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype)
        for key, x in run.batch_shape.items()
    }
    return dataclasses.replace(run, batch_size=batch_size, batch_shape=shapes)


def memory_limit(device: jax.Device) -> int | None:
    """Bytes that the compiler lets a program have on a device; None if it has no limit.

    Asked of the compiler itself, by a program that is too large.
    """
    sharding = SingleDeviceSharding(device)
    huge = jax.ShapeDtypeStruct((2**42,), jnp.int8, sharding=sharding)  # 4 TiB
    try:
        jax.jit(lambda x: x[:1]).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        return parse_overflow(str(error))[1]
    return None


def compile_for(
    run: Run,
    devices: tuple[jax.Device, ...],
    *,
    limit: int | None = None,
    quick: bool = False,
) -> Report:
    """Compiles a run's train step for other devices, and reports what it needs.

    Args:
      run: as `build` made it, for any devices.
      devices: those to compile for.
      limit: see `memory_limit`.
      quick: compile with the least effort: several times faster, and the program
        takes somewhat more memory than the one that would run.

    Raises:
      UserError: when the run does not fit these devices but for their memory.
    """
    run = run_on(run, devices)
    function, feed, count = _steps(run)
    traced = _trace(run, function, feed)
    with _for_devices(run):
        lowered = traced.lower(lowering_platforms=(devices[0].platform,))
    flops = 2.0 * count_macs(traced.jaxpr.jaxpr) / len(devices) / count

    # Counts are taken from the program of least effort: further ones move tensors
    # between memory and the chip ahead of their use, and XLA counts that twice over.
    start = time.perf_counter()
    plain, overflow = _compile(lowered, _QUICK)
    program, seconds = plain, time.perf_counter() - start
    if not quick:
        start = time.perf_counter()
        program, overflow = _compile(lowered, {})
        seconds = time.perf_counter() - start

    counted, bytes_accessed = _costs(plain or program)
    if bytes_accessed is not None and counted:
        # XLA counts the body of a loop once, whatever its length.
        bytes_accessed *= max(1.0, flops / counted)
    return Report(
        device_kind=devices[0].device_kind,
        num_devices=len(devices),
        chips=_count_chips(devices),
        mesh={str(axis): size for axis, size in run.parallel.mesh.shape.items()},
        batch_size=run.batch_size,
        accum_steps=run.parallel.accum_steps,
        memory=_memory(run, program, overflow, limit),
        flops=max(flops, counted),
        bytes_accessed=bytes_accessed,
        collectives={} if program is None else count_collectives(program.as_text()),
        compile_seconds=seconds,
    )


def parse_overflow(message: str) -> tuple[int, int]:
    """(bytes needed, bytes there are), from XLA's error for a program too large.

    Raises:
      UserError: with what the message says, where it does not say that.

    >>> parse_overflow('RESOURCE_EXHAUSTED: ... memory required for HLO temporaries '
    ...                '(97.50G) exceeds available HBM (15.75G). HLO module: f.')
    (104689827840, 16911433728)
    """
    size = r'([\d.]+)([KMGT]?)'
    found = re.search(rf'\({size}\) exceeds available HBM \({size}\)', message)
    found = found or re.search(rf'Used {size} of {size} hbm', message)
    if found is None:
        raise UserError(f'the compiler stopped: {" ".join(message.split())[:300]}')
    needed, needed_unit, available, available_unit = found.groups()
    return _bytes(needed, needed_unit), _bytes(available, available_unit)


def count_collectives(text: str) -> dict[str, int]:
    """Bytes that messages bring to each device, by kind, from a program's text.

    >>> count_collectives('  %a = (f32[2,3]{1,0}, bf16[5]) all-reduce(%x, %y), to=%f')
    {'all-reduce': 34}
    """
    kinds = 'all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute'
    pattern = rf'^\s*(?:ROOT )?%\S+ = (.*?) ({kinds})(-start)?\('
    total: Counter[str] = Counter()
    for types, kind, start in re.findall(pattern, text, re.MULTILINE):
        sizes = [
            _bits(dtype) * math.prod(int(n) for n in shape.split(',') if n) // 8
            for dtype, shape in re.findall(r'\b([a-z]\w*)\[([\d,]*)\]', types)
        ]
        if start and kind != 'all-reduce':  # gives (operands, results, ...)
            sizes = [max(sizes)]
        total[kind] += sum(sizes)
    return dict(total)


def _make_batch(run: Run) -> MakeBatch | None:
    """Which examples on the device a step takes; None where batches come to it."""
    make_batch = run.feed.keywords.get('make_batch')  # type: ignore[attr-defined]
    if make_batch is None:
        return None
    # Of another batch size, see `with_batch_size`.
    order = dataclasses.replace(make_batch.order, batch_size=run.batch_size)
    return dataclasses.replace(make_batch, order=order)


def _steps(run: Run) -> tuple[Callable, dict[str, Any], int]:
    """What `train` compiles: the function, shapes of its feed, steps that it makes.

    With the data on the device, that is as many steps as the first call makes.
    """
    make_batch = _make_batch(run)
    if make_batch is None:
        return run.train_step, run.batch_shape, 1
    periods = run.periods
    if periods.call == 1:  # as `build` has it for the CPU of this machine
        periods = dataclasses.replace(periods, call=None)
    count = next(periods.calls(0, run.num_steps))
    feed = {'data': _data_shape(run, make_batch), 'first': make_batch.first(0, count)}
    return scan_steps(run.train_step, make_batch, run.parallel.rows), feed, count


def _data_shape(run: Run, make_batch: MakeBatch) -> dict[str, jax.ShapeDtypeStruct]:
    count = make_batch.order.num_examples
    return {
        key: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype)
        for key, x in run.batch_shape.items()
    }


def _trace(run: Run, function: Callable, feed: dict[str, Any]) -> Any:
    """The run's own step, traced for the devices of `run.parallel`."""
    parallel = run.parallel
    feed_sharding = parallel.rows if feed is run.batch_shape else parallel.replicated

    def place(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state = jax.tree.map(
        place, run.state_shape, parallel.state_sharding(run.state_shape)
    )
    feed = jax.tree.map(lambda x: place(x, feed_sharding), feed)
    with _for_devices(run):
        step: Any = parallel.train_step(function, run.state_shape)
        return step.trace(state, feed)


def _for_devices(run: Run) -> contextlib.AbstractContextManager:
    """What is traced within is for the run's devices, whatever this machine has."""
    return jax.sharding.use_abstract_mesh(run.parallel.mesh.abstract_mesh)


def _compile(lowered: Any, options: dict) -> tuple[Any, tuple[int, int] | None]:
    """(the program, None), or (None, bytes needed and there) where it does not fit."""
    try:
        return lowered.compile(compiler_options=options), None
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return None, parse_overflow(str(error))


def _memory(
    run: Run, program: Any, overflow: tuple[int, int] | None, limit: int | None
) -> Memory:
    arguments = _arguments(run)
    if program is None:
        assert overflow is not None
        needed, available = overflow
        rest = max(needed - sum(arguments.values()), 0)
        return Memory(arguments, 0, 0, rest, 0, needed, available)
    stats = program.memory_analysis()
    parts = {
        'padding': max(stats.argument_size_in_bytes - sum(arguments.values()), 0),
        'outputs': max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0),
        'temporaries': stats.temp_size_in_bytes,
        'code': stats.generated_code_size_in_bytes,
    }
    total = sum(arguments.values()) + sum(parts.values())
    return Memory(arguments, **parts, total=total, limit=limit)


def _arguments(run: Run) -> dict[str, int]:
    """Bytes of state and batch, or data, on one device, by kind, without padding."""
    names = {'variables': 'parameters', 'opt_state': 'optimizer'}
    sharding = run.parallel.state_sharding(run.state_shape)
    sizes = {
        names.get(field.name, field.name): bytes_per_device(
            getattr(run.state_shape, field.name), getattr(sharding, field.name)
        )
        for field in dataclasses.fields(run.state_shape)  # type: ignore[arg-type]
    }
    sizes.pop('step')  # four bytes
    make_batch = _make_batch(run)
    if make_batch is None:
        rows = dict.fromkeys(run.batch_shape, run.parallel.rows)
        sizes['batch'] = bytes_per_device(run.batch_shape, rows)
    else:
        data = _data_shape(run, make_batch)
        whole = dict.fromkeys(data, run.parallel.replicated)
        sizes['data'] = bytes_per_device(data, whole)
    return {name: size for name, size in sizes.items() if size}


def _costs(program: Any) -> tuple[float, float | None]:
    """(operations, bytes accessed) of one device, as XLA counts them."""
    costs = None if program is None else program.cost_analysis()
    if not costs:
        return 0.0, None
    return costs.get('flops', 0.0), costs.get('bytes accessed')


def _count_chips(devices: tuple[jax.Device, ...]) -> int:
    """Devices that share coordinates are cores of one chip."""
    return len({tuple(getattr(d, 'coords', (d.id,))) for d in devices})


def _bytes(number: str, unit: str) -> int:
    powers = {'': 0, 'K': 1, 'M': 2, 'G': 3, 'T': 4}
    return round(float(number) * 1024 ** powers[unit])


def _bits(dtype: str) -> int:
    """Of an element: 'bf16', 's4', 'pred', 'f8e4m3fn'."""
    digits = re.search(r'\d+', dtype)
    return int(digits[0]) if digits else 8
