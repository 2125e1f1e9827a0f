import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import benchmark, telemetry
from vit_jax.benchmark import (
    WARMUP,
    compare,
    make_batch,
    measure_training,
    time_steps,
)
from vit_jax.build import build
from vit_jax.config import default_config
from vit_jax.errors import UserError
from vit_jax.hardware import Hardware


def small(x, y):
    return x + y


def large(x, y):
    """Holds a product of 512 x 512 on the way."""
    return jnp.sum(jnp.sort(jnp.outer(x, y), axis=0), axis=1) + x


ARGS = (jnp.ones(512), jnp.arange(512.0))


def test_every_function_is_measured():
    measured = compare({'small': small, 'large': large}, ARGS, rounds=3)
    assert list(measured) == ['small', 'large']
    for seconds, temp_bytes in measured.values():
        assert 0 < seconds < 10
        assert isinstance(temp_bytes, int)
    assert measured['large'].temp_bytes >= 512 * 512 * 4
    assert measured['small'].temp_bytes < 512 * 4


def test_rounds_are_in_turns_and_the_median_counts(monkeypatch):
    """A clock that shows how many reads there were, cubed: each run takes longer.

    Three rounds of two functions read the clock twelve times, in pairs; the median
    of a function is that of its run of the second round.
    """
    reads = itertools.count()
    calls = []

    def read():
        calls.append(next(reads))
        return float(calls[-1] ** 3)

    monkeypatch.setattr(benchmark.time, 'perf_counter', read)
    measured = compare({'a': small, 'b': small}, ARGS, rounds=3)
    assert len(calls) == 12
    # The runs of the second round last 5**3 - 4**3 and 7**3 - 6**3.
    assert sorted(m.seconds for m in measured.values()) == [61.0, 127.0]


def test_functions_see_the_arguments_in_order():
    with pytest.raises(TypeError, match='missing'):
        compare({'a': lambda x, y, z: x}, ARGS, rounds=1)
    seen = []

    def record(x, y):
        seen.append((x.shape, y.dtype))
        return x

    compare({'a': record}, (jnp.ones(3), jax.numpy.ones(5, jnp.int32)), rounds=2)
    assert seen == [((3,), jnp.int32)]  # traced once


# --- Steps of training --------------------------------------------------------


def make_run(**values):
    """A small CNN on 8 devices; `values` by dotted key."""
    config = default_config()
    config.model.name = 'CNN'
    config.model.kwargs = {'widths': (8,), 'strides': (2,), 'num_groups': 1}
    config.dataset.name = 'synthetic:size=6,channels=3,num_examples=37,num_classes=7'
    config.batch_size = 16
    config.num_steps = 11
    for key, value in values.items():
        config.update_from_flattened_dict({key: value})
    return build(config)


METRICS = {'loss': (np.ones(()), np.ones(()))}


class Telling:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(benchmark.time, 'perf_counter', lambda: self.now)

    def work(self, seconds, result):
        self.now += seconds
        return result


def test_steps_are_timed_after_those_of_the_warm_up(monkeypatch):
    """Batches take 1 s, steps 3 s, but the first of either takes 100 s."""
    clock = Telling(monkeypatch)
    seen = []

    def step(state, batch):
        seen.append((state, batch))
        return clock.work(3.0 if state else 100.0, (state + 1, METRICS))

    batches = (clock.work(1.0 if i else 100.0, f'batch {i}') for i in range(99))
    counting = telemetry.Clock(make_run())
    state, seconds = time_steps(step, 0, batches, 5, counting)
    assert state == len(seen) == WARMUP + 5 + 1
    assert seen[-1] == (WARMUP + 5, f'batch {WARMUP + 5}')
    assert seconds.tolist() == [4.0] * 5
    assert counting.rates()['step_seconds'] == 4.0


def test_a_call_of_several_steps(monkeypatch):
    clock = Telling(monkeypatch)

    def step(state, batch):
        return clock.work(6.0, (state, METRICS))

    counting = telemetry.Clock(make_run())
    _, seconds = time_steps(step, 0, itertools.repeat(None), 3, counting, size=2)
    assert seconds.tolist() == [3.0, 3.0, 3.0]
    assert counting.rates()['step_seconds'] == 3.0


def test_a_batch_is_like_those_of_the_run():
    run = make_run()
    batch = make_batch(run)
    shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch.items()}
    assert shapes == run.batch_shape
    assert set(batch['label']) <= set(range(7))
    assert len(set(batch['label'])) > 3
    assert batch['image'].max() > 250
    assert (batch['weight'] == 1.0).all()


@pytest.mark.parametrize(
    'values',
    [
        {},
        {'parallel.mode': 'pmap'},
        {'dataset.placement': 'device'},
        {'dataset.placement': 'device', 'dataset.steps_per_call': 2},
    ],
)
def test_a_run_is_measured(values):
    measured = measure_training(make_run(**values), steps=2, data=True)
    assert 0 < measured.compile_seconds < 100
    assert measured.memory_bytes > 16 * 6 * 6 * 3 // 8
    for pace in (measured.batch, measured.data):
        low, high = pace.quartiles
        assert 0 < low <= pace.step_seconds <= high
        assert pace.per_second == pytest.approx(16 / pace.step_seconds)
        assert pace.per_second_per_device * 8 == pace.per_second
        assert 0 <= pace.data_wait < 1
        assert pace.flops_utilisation is None  # of a CPU


def test_without_data_none_is_read(tmp_path):
    values = {'dataset.name': 'cifar10', 'dataset.data_dir': str(tmp_path)}
    run = make_run(**values)
    assert measure_training(run, steps=1).data is None
    with pytest.raises(UserError, match=r'cifar10.* is not prepared'):
        measure_training(run, steps=1, data=True)


def test_utilisation_is_of_what_a_step_needs(monkeypatch):
    """Two operations per multiply-add, on 8 devices of 1 GFLOP/s.

    A convolution 3 -> 8 of 3 x 3 positions, forward and the gradient of its kernel; the
    head, and its input's gradient too.
    """
    peak = Hardware('CPU', 1e9, 1.0, 1, '')
    monkeypatch.setattr('vit_jax.telemetry.find_hardware', lambda kind: peak)
    run = make_run()
    pace = measure_training(run, steps=1).batch
    macs = 2 * (3 * 3 * 3 * 3 * 3 * 8) + 3 * (8 * 7)
    expected = 2 * macs * pace.per_second / 8e9
    assert pace.flops_utilisation == pytest.approx(expected)
    assert not math.isclose(expected, 0.0)
    assert np.isfinite(expected)
