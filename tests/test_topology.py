"""What a compiled step costs: on the CPU's own devices, and for TPUs with libtpu."""

import functools
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import pytest

from vit_jax.build import build
from vit_jax.config import default_config
from vit_jax.errors import UserError
from vit_jax.layers.attention import auto_impl
from vit_jax.slices import slice_devices
from vit_jax.topology import (
    compile_for,
    count_collectives,
    memory_limit,
    parse_overflow,
    run_on,
    with_batch_size,
)

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason='needs libtpu'
)
GIB = 2**30


def make_run(**values):
    """A perceptron of 3 * 5 * 5 pixels, 64 hidden units and 7 classes."""
    config = default_config()
    config.model.name = 'MLP'
    config.model.kwargs = {'widths': (64,)}
    config.dataset.name = 'synthetic:size=5,channels=3,num_examples=37,num_classes=7'
    config.batch_size = 16
    config.num_steps = 3
    for key, value in values.items():
        config.update_from_flattened_dict({key: value})
    return build(config)


PARAMS = 75 * 64 + 64 + 64 * 7 + 7
# The forward pass, and the gradients of both kernels and of the hidden layer.
MACS_PER_IMAGE = 2 * 75 * 64 + 3 * 64 * 7


def cpus(count=8):
    return tuple(jax.devices('cpu')[:count])


@functools.cache
def make_report(num_devices=8):
    return compile_for(make_run(), cpus(num_devices), quick=True)


# --- On the devices of this machine -------------------------------------------


def test_report_of_data_parallelism():
    report = make_report()
    assert (report.num_devices, report.chips) == (8, 8)
    assert report.mesh == {'data': 8, 'fsdp': 1, 'tensor': 1}
    assert (report.batch_size, report.accum_steps) == (16, 1)
    arguments = report.memory.arguments
    assert list(arguments) == ['parameters', 'optimizer', 'batch']
    assert arguments['parameters'] == 4 * PARAMS
    assert 0 <= arguments['optimizer'] - 2 * 4 * PARAMS <= 16  # two moments, counters
    assert arguments['batch'] == 2 * (75 + 4 + 4)  # uint8 image, label, weight
    memory = report.memory
    assert memory.fits
    assert memory.limit is None
    assert memory.temporaries > 4 * PARAMS  # the gradients
    parts = memory.padding + memory.outputs + memory.temporaries + memory.code
    assert memory.total == sum(arguments.values()) + parts
    # Each device sums the gradients, and the metrics.
    assert 4 * PARAMS <= report.collectives['all-reduce'] <= 4 * PARAMS + 100
    assert report.roofline() == {}


def test_operations_are_those_of_a_devices_rows():
    of_one, of_eight = make_report(1), make_report(8)
    products = 2 * 16 * MACS_PER_IMAGE
    # XLA counts the other operations too; the update of the parameters, and whether
    # it is finite, is each device's own.
    assert products <= of_one.flops <= products + 45 * PARAMS + 20_000
    assert products / 8 <= of_eight.flops <= products / 8 + 45 * PARAMS + 20_000


def test_micro_batches_are_all_counted():
    whole = compile_for(make_run(batch_size=2048), cpus(), quick=True)
    run = make_run(batch_size=2048, accum_steps=4)
    parts = compile_for(run, cpus(), quick=True)
    assert parts.accum_steps == 4
    assert parts.flops >= 2 * 256 * MACS_PER_IMAGE
    # A part of the parameters' size is moved for each micro-batch.
    assert 0.9 < parts.bytes_accessed / whole.bytes_accessed < 2


def test_fsdp_divides_the_state():
    values = {'model.kwargs': {'widths': (64, 128)}, 'parallel.fsdp': 8}
    report = compile_for(make_run(**values), cpus(), quick=True)
    assert report.mesh == {'data': 1, 'fsdp': 8, 'tensor': 1}
    # The large kernels are divided; the head and the biases are not.
    part = (75 * 64 + 64 * 128) // 8 + 128 * 7 + 64 + 128 + 7
    arguments = report.memory.arguments
    assert arguments['parameters'] == 4 * part
    assert 0 <= arguments['optimizer'] - 2 * 4 * part <= 16
    assert arguments['batch'] == 2 * (75 + 4 + 4)
    assert report.collectives['all-gather'] >= 4 * 75 * 64


def test_averages_are_told_apart():
    report = compile_for(make_run(**{'optim.ema_decay': 0.9}), cpus(1), quick=True)
    assert report.memory.arguments['average'] == 4 * PARAMS


@pytest.mark.parametrize('num_devices', [1, 8])
def test_data_on_the_device_is_counted(num_devices):
    """What is compiled is the scan over steps, with all 37 examples everywhere."""
    run = make_run(**{'dataset.placement': 'device'})
    report = compile_for(run, cpus(num_devices), quick=True)
    arguments = report.memory.arguments
    assert 'batch' not in arguments
    assert arguments['data'] == 37 * (75 + 4 + 4)
    assert report.batch_size == 16
    # Three steps a call; the numbers are of one.
    of_host = make_report(num_devices)
    assert 0.9 < report.flops / of_host.flops < 1.3
    sized = compile_for(with_batch_size(run, 64), cpus(num_devices), quick=True)
    assert sized.flops >= 2 * 64 * MACS_PER_IMAGE / num_devices
    assert sized.memory.arguments['data'] == arguments['data']


def test_the_run_itself_is_untouched():
    run = make_run()
    other = run_on(run, cpus(4))
    assert len(other.parallel.devices) == 4
    assert len(run.parallel.devices) == 8


def test_batches_and_modes_that_do_not_fit():
    with pytest.raises(UserError, match=r'batch_size 16 cannot be split over 3 dev'):
        run_on(make_run(), cpus(3))
    with pytest.raises(UserError, match=r"needs parallel.mode='jit'"):
        run_on(make_run(**{'parallel.mode': 'pmap'}), cpus())


def test_json():
    report = make_report()._replace(device_kind='TPU v4')
    values = json.loads(json.dumps(report.to_json()))
    assert values['memory']['fits'] is True
    assert values['memory']['arguments']['parameters'] == 4 * PARAMS
    assert values['roofline_seconds']['compute'] == report.flops / 275e12
    assert values['roofline_seconds']['memory'] == report.bytes_accessed / 1200e9


# --- Texts ------------------------------------------------------


def test_overflow_is_read():
    old = 'Ran out of memory in memory space hbm. Used 23.10G of 512.00M hbm. Exceeded'
    assert parse_overflow(old) == (round(23.1 * GIB), GIB // 2)
    new = 'memory required for arguments (1.50T) exceeds available HBM (94.74G). HLO'
    assert parse_overflow(new) == (1536 * GIB, round(94.74 * GIB))
    with pytest.raises(UserError, match=r'^the compiler stopped: out of luck$'):
        parse_overflow('out\nof luck')


def test_collectives_are_read():
    text = """
  %a.1 = (f32[3,5]{1,0:T(8,128)S(1)}, bf16[7]{0}) all-reduce(%x, %y), channel_id=1
  ROOT %b = s8[11]{0} all-gather(%z), dimensions={0}
  %c = (bf16[2]{0}, bf16[16]{0}) all-gather-start(%z), dimensions={0}
  %d = f32[13]{0} all-reduce-done(%a.1)
  %e = pred[] reduce-scatter(%q), metadata={op_name="x all-to-all(f32[1000])"}
"""
    expected = {'all-reduce': 60 + 14, 'all-gather': 11 + 32, 'reduce-scatter': 1}
    assert count_collectives(text) == expected


def test_attention_is_chosen_for_the_devices_that_are_compiled_for():
    query = jnp.ones((1, 900, 2, 8), jnp.bfloat16)
    assert auto_impl(query, query) == 'chunked'  # here
    for platform, kind in (('tpu', 'TPU v4'), ('gpu', 'NVIDIA H200')):
        device = jax.sharding.AbstractDevice(kind, num_cores=None, platform=platform)
        mesh = jax.sharding.AbstractMesh((8,), ('data',), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert auto_impl(query, query) == 'xla'


# --- For TPUs that are not here -----------------------------------------------


@needs_libtpu
def test_step_for_a_tpu():
    devices = slice_devices('v5e:2x2')
    limit = memory_limit(devices[0])
    report = compile_for(make_run(), devices, limit=limit)
    assert report.device_kind == 'TPU v5 lite'
    assert report.memory.fits
    assert report.memory.arguments['parameters'] == 4 * PARAMS
    assert report.memory.padding > 0  # rows of 7 classes lie in tiles of 128
    assert report.memory.code > 0
    quick = compile_for(make_run(), devices, limit=limit, quick=True)
    assert quick.memory.code != report.memory.code  # another program
    assert quick.flops == report.flops
    assert report.flops >= 2 * 4 * MACS_PER_IMAGE
    seconds = report.roofline()
    assert seconds['compute'] == report.flops / 197e12
    assert seconds['memory'] == report.bytes_accessed / 819e9


@needs_libtpu
def test_what_does_not_fit_is_a_report_too():
    devices = slice_devices('v5e:1x1')
    run = make_run(batch_size=2**24, **{'model.kwargs': {'widths': (512,)}})
    report = compile_for(run, devices, limit=memory_limit(devices[0]), quick=True)
    memory = report.memory
    assert not memory.fits
    # The hidden layer alone has 2**24 rows of 512 numbers of 4 bytes.
    assert memory.total > 2**24 * 512 * 4 > memory.limit
    assert memory.arguments['batch'] == 2**24 * (75 + 4 + 4)
    assert report.flops == 2 * 2**24 * (2 * 75 * 512 + 3 * 512 * 7)
    assert report.bytes_accessed is None
    assert math.isclose(memory.limit, 15.75 * GIB)
