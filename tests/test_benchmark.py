import itertools

import jax
import jax.numpy as jnp
import pytest

from vit_jax import benchmark
from vit_jax.benchmark import compare


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
