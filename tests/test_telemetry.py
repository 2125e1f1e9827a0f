"""What a run says of its speed."""

import glob
import itertools
import time

import jax
import numpy as np
import pytest
from test_train import small_config

import vit_jax.telemetry
from vit_jax.build import build
from vit_jax.hardware import find_hardware
from vit_jax.summary import step_flops
from vit_jax.telemetry import Clock, Profile, warn_of_cpu, warn_of_waiting


@pytest.fixture(scope='module')
def run():
    return build(small_config())


def test_rates_of_the_time_there_was(run):
    def slow():
        while True:
            time.sleep(0.02)
            yield 'batch'

    clock, batches = Clock(run), slow()
    start = time.perf_counter()
    for steps in (1, 3):
        assert clock.wait_for(batches, steps) == 'batch'
        time.sleep(0.02)
        clock.called({'loss': (np.ones(steps), np.full(steps, 7.0))})
    rates = clock.rates()
    seconds = time.perf_counter() - start
    assert 0.08 <= 4 * rates['step_seconds'] <= seconds
    product = rates['images_per_second'] * rates['step_seconds']
    np.testing.assert_allclose(product, 7, rtol=0.2)  # images a step, as counted
    assert 0.0 < rates['data_wait'] < 1.0
    assert 'flops_utilisation' not in rates  # nobody knows a CPU's peak


@pytest.mark.parametrize(('working', 'idle'), [(0.0, 1.0), (0.1, 0.5), (0.5, 0.0)])
def test_devices_wait_only_when_they_have_nothing_to_do(run, working, idle):
    """A batch takes 0.2 s; the device is busy for the first part of it."""

    class Metrics:  # a leaf that `jax.block_until_ready` waits for
        def __init__(self):
            self.ready = time.perf_counter() + working

        def block_until_ready(self):
            time.sleep(max(0.0, self.ready - time.perf_counter()))

    def slow():
        while True:
            time.sleep(0.2)
            yield 'batch'

    clock, batches = Clock(run), slow()
    for _ in range(3):
        clock.called({'loss': (Metrics(), np.ones(()))})
        clock.wait_for(batches)
    np.testing.assert_allclose(clock.rates()['data_wait'], idle, atol=0.2)


def test_no_steps_have_no_rates(run):
    clock = Clock(run)
    clock.wait_for(itertools.repeat('batch'))
    clock.start()
    assert clock.rates() == {}


def test_utilisation_is_the_steps_operations_over_the_peak(run, monkeypatch):
    hardware = find_hardware('TPU v5 lite')
    monkeypatch.setattr(vit_jax.telemetry, 'find_hardware', lambda kind: hardware)
    clock = Clock(run)
    clock.wait_for(itertools.repeat('batch'), steps=5)
    clock.called({'loss': (np.ones(5), np.full(5, 8.0))})
    rates = clock.rates()
    # Eight images a step, on eight devices.
    of_image = step_flops(run) / 8
    expected = of_image * rates['images_per_second'] / (8 * hardware.flops)
    np.testing.assert_allclose(rates['flops_utilisation'], expected, rtol=1e-6)


@pytest.mark.parametrize(('share', 'warns'), [(0.1, False), (0.42, True)])
def test_waiting_for_data_is_told(share, warns):
    message = warn_of_waiting({'data_wait': share})
    assert (message is not None) == warns
    if warns:
        assert '42% of the time goes into waiting for data' in message


def test_a_cpu_beside_an_accelerator_is_told(monkeypatch):
    devices = {'/dev/nvidia[0-9]*': ['/dev/nvidia0']}
    monkeypatch.setattr(glob, 'glob', lambda pattern: devices.get(pattern, []))
    assert warn_of_cpu() is None  # asked for, by JAX_PLATFORMS
    monkeypatch.delenv('JAX_PLATFORMS')
    assert '/dev/nvidia0 is there, but JAX runs on the CPU' in warn_of_cpu()
    devices.clear()
    assert warn_of_cpu() is None
    devices['/dev/vfio/[0-9]*'] = ['/dev/vfio/0']
    assert "pip install -e '.[tpu]'" in warn_of_cpu()


def test_a_profile_has_the_steps_that_were_asked_for(tmp_path):
    with Profile(tmp_path, (2, 3)) as profile:
        for step in range(1, 6):
            profile.before(step)
            assert profile._tracing == (step in (2, 3))
            x = jax.numpy.ones(3) * step
            profile.after(step, x)
    assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def test_a_profile_ends_with_an_error(tmp_path):
    def interrupted():
        with Profile(tmp_path, (1, 9)) as profile:
            profile.before(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    jax.profiler.start_trace(tmp_path / 'again')  # raises if one is running
    jax.profiler.stop_trace()
