"""vit_jax compile"""

import contextlib
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vit_jax.commands import options

if TYPE_CHECKING:
    from vit_jax.topology import Report

EPILOG = f"""\
{options.CONFIG_HELP}
Nothing but a CPU and libtpu is needed, not even the dataset where its size is known.
Exit code 1 when the step does not fit. docs/scaling.md reads the table line by line.

  vit_jax compile --config=configs/imagenet_convit.py --topology=v5e:4x4
  vit_jax compile --config=configs/imagenet_convit.py --topology=v4:2x2x4 \\
      --config.model.name=ConViT-B/16 --config.parallel.fsdp=4 --max_batch --quick
"""


def main(argv: Sequence[str]) -> int:
    parser = options.make_parser(
        'compile',
        'Compiles the train step for TPUs that are not here: memory, FLOPs, bytes.',
        epilog=EPILOG,
    )
    options.add_config(parser)
    parser.add_argument(
        '--topology',
        required=True,
        metavar='KIND:SHAPE',
        help='slice of v4, v5e, v5p, v6e or tpu7x, such as v5e:16x16 or v4:4x4x8',
    )
    parser.add_argument(
        '--max_batch',
        action='store_true',
        help='look for the largest batch that fits too: two or more further compiles',
    )
    parser.add_argument(
        '--quick',
        action='store_true',
        help='compile with the least effort: sooner, and for somewhat more memory',
    )
    parser.add_argument('--json', action='store_true', help='JSON instead of a table')
    args, overrides = options.parse(parser, argv)
    config = options.read_config(args.config, overrides)

    options.quiet()
    from vit_jax.slices import parse_slice, slice_devices

    place = parse_slice(args.topology)
    _pretend(place.num_devices)
    devices = slice_devices(place.name)

    from vit_jax.build import build
    from vit_jax.largest_batch import largest_batch
    from vit_jax.topology import compile_for, memory_limit, run_on

    run = run_on(build(config, named=options.keys(overrides) or None), devices)
    limit = memory_limit(devices[0])
    report = compile_for(run, devices, limit=limit, quick=args.quick)
    if not args.json:
        print(
            f'{config.model.name}, {config.dtype}, on {place.name}: {place.chips} chips'
        )
        print(run.parallel.describe(run.batch_size, run.units.rows))
        print('\n'.join(describe(report, run.units.rows)), flush=True)
    largest = None
    if args.max_batch:
        largest = largest_batch(run, devices, report, quick=args.quick)
    if args.json:
        about = {'topology': place.name, 'versions': _versions(), 'quick': args.quick}
        tables: dict[str, Any] = {'report': report.to_json()}
        if args.max_batch:
            tables['largest_batch'] = largest.to_json() if largest else None
        print(json.dumps({**about, **tables}, indent=2))
    else:
        if largest is not None:
            print(f'\nlargest batch that fits: {largest.batch_size}')
            print('\n'.join(describe(largest, run.units.rows)))
        elif args.max_batch:
            print('\nno batch fits')
        words = ', '.join(f'{name} {version}' for name, version in _versions().items())
        print(f'compiled{" with the least effort" * args.quick}: {words}')
    return 0 if report.memory.fits else 1


def describe(report: 'Report', unit: str = 'images') -> Iterator[str]:
    """A report, for people; `unit` is what a batch has."""
    from vit_jax.hardware import GIB, find_hardware

    memory = report.memory
    yield 'memory per device, GiB'
    rows = {
        **memory.arguments,
        'padding': memory.padding,
        'outputs': memory.outputs,
        'temporaries': memory.temporaries,
        'program': memory.code,
        'total': memory.total,
    }
    for name, size in rows.items():
        if size:
            yield f'  {name:12} {size / GIB:9.3f}'
    if memory.limit is not None:
        of = f'{memory.total / GIB:.2f} GiB of {memory.limit / GIB:.2f} GiB'
        yield f'  {"fits" if memory.fits else "does not fit"}: needs {of}'
    yield f'per step and device, batch {report.batch_size}'
    hardware, seconds = find_hardware(report.device_kind), report.roofline()
    flops, peak = f'{report.flops / 1e12:9.3f} TFLOP', ''
    if hardware is not None:
        peak = f', {1000 * seconds["compute"]:.1f} ms at {hardware.flops / 1e12:.0f}'
        peak += ' TFLOP/s'
    yield f'  compute      {flops}{peak}'
    if report.bytes_accessed is not None:
        moved, peak = f'{report.bytes_accessed / 1e9:9.3f} GB', ''
        if hardware is not None:
            bandwidth = hardware.hbm_bandwidth / 1e9
            peak = f', {1000 * seconds["memory"]:.1f} ms at {bandwidth:.0f} GB/s'
        yield f'  memory       {moved}{peak}'
    for kind, size in report.collectives.items():
        yield f'  {kind:12} {size / 1e9:9.3f} GB'
    if seconds:
        rates = {name: report.batch_size / least for name, least in seconds.items()}
        words = f'at most {rates["compute"]:,.0f} by compute'
        if 'memory' in rates:  # an estimate, see `Report.roofline`
            words += f', about {rates["memory"]:,.0f} by memory'
        yield f'  {f"{unit}/s":12} {words}'


def _pretend(num_devices: int) -> None:
    """Makes this process count as many devices as the slice has, all of them its CPU.

    So the config is built, and its mesh and batch are checked, as they would be there.
    """
    import jax

    jax.config.update('jax_platforms', 'cpu')
    # JAX that has started keeps the devices it has.
    with contextlib.suppress(RuntimeError):
        jax.config.update('jax_num_cpu_devices', num_devices)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ('jax', 'libtpu')}
