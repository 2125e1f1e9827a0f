"""TPU slices by name, and as the compiler knows them."""

import importlib.util
import re

import pytest
from test_topology import GIB, needs_libtpu

from vit_jax.errors import UserError
from vit_jax.hardware import find_hardware
from vit_jax.slices import GENERATIONS, parse_slice, slice_devices
from vit_jax.topology import memory_limit


@pytest.mark.parametrize(
    ('name', 'chips', 'num_devices'),
    [('v5e:16x16', 256, 256), ('v4:4x4x8', 128, 128), ('TPU7x:2x2x2', 8, 16)],
)
def test_slices(name, chips, num_devices):
    assert parse_slice(name) == (name.lower(), chips, num_devices)


def test_all_slices_have_up_to_256_chips():
    for kind, generation in GENERATIONS.items():
        chips = [parse_slice(f'{kind}:{shape}').chips for shape in generation.slices]
        assert max(chips) == 256, kind


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('v5:2x2', r"unknown TPU generation 'v5'; did you mean 'v5[ep]'\?"),
        ('v5e', r"no v5e slice .* shape ''; choose one of: 1x1, 2x2, 2x4"),
        ('v5e:3x3', r"'3x3'; choose one of: 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ('v4:4x4', r"'4x4'; choose one of: 2x2x1, 2x2x2"),
        ('v5e:32x32', r"'32x32'; choose one of"),
    ],
)
def test_names_of_no_slice(name, message):
    with pytest.raises(UserError, match=message):
        parse_slice(name)


def test_libtpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    message = "compiling for TPUs needs libtpu: pip install 'vit_jax[tpu]'"
    with pytest.raises(UserError, match=re.escape(message)):
        slice_devices('v5e:2x2')


@needs_libtpu
@pytest.mark.parametrize('kind', GENERATIONS)
def test_devices_are_counted_as_the_compiler_does(kind):
    shape = GENERATIONS[kind].slices[-1]
    devices = slice_devices(f'{kind}:{shape}')
    place = parse_slice(f'{kind}:{shape}')
    assert len(devices) == place.num_devices
    assert len({tuple(device.coords) for device in devices}) == place.chips
    hardware = find_hardware(devices[0].device_kind)
    assert hardware.cores == GENERATIONS[kind].cores
    # The compiler keeps a little of the memory that a chip is published to have.
    published = {'v4': 32, 'v5e': 16, 'v5p': 95, 'v6e': 32, 'tpu7x': 192}[kind]
    limit = memory_limit(devices[0]) * hardware.cores
    assert 0.95 <= limit / (published * GIB) <= 1.01


@needs_libtpu
@pytest.mark.parametrize('kind', GENERATIONS)
def test_the_compiler_knows_every_slice(kind):
    for shape in GENERATIONS[kind].slices:
        name = f'{kind}:{shape}'
        assert len(slice_devices(name)) == parse_slice(name).num_devices
