import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.averaging import ema_update, init_average, mean_of
from vit_jax.errors import UserError


def variables(seed):
    """Parameters, running statistics, and a counter, which has no average."""
    rng = np.random.default_rng(seed)
    return {
        'params': {'kernel': jnp.float32(rng.normal(size=(3, 5)))},
        'batch_stats': {
            'mean': jnp.bfloat16(rng.normal(size=7)),
            'count': jnp.int32(seed),
        },
    }


def floats(tree):
    """Float64 arrays of the two leaves that are averaged."""
    leaves = tree['params']['kernel'], tree['batch_stats']['mean']
    return [np.float64(leaf) for leaf in leaves]


def test_ema_by_hand():
    """From 2, towards 4, 4 and 0, a quarter of the way each."""
    average = init_average({'x': jnp.float32(2)})
    values = []
    for new in (4, 4, 0):
        average = ema_update(average, {'x': jnp.float32(new)}, 0.75)
        values.append(float(average['x']))
    assert values == [2.5, 2.875, 2.15625]


def test_ema_of_everything():
    average = init_average(variables(0))
    expected = floats(variables(0))
    update = jax.jit(ema_update, static_argnums=2)
    for seed in (1, 2, 3):
        average = update(average, variables(seed), 0.9)
        expected = [
            0.9 * x + 0.1 * y for x, y in zip(expected, floats(variables(seed)))
        ]
    for x, y in zip(floats(average), expected):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
    assert average['batch_stats']['count'] == 3
    assert average['batch_stats']['mean'].dtype == jnp.float32


def test_ema_of_what_stays_is_exact():
    """A weighted sum of the two would drift: 0.99996 is no float32."""
    still = variables(0)
    average = init_average(still)
    update = jax.jit(ema_update, static_argnums=2)
    for _ in range(100):
        average = update(average, still, 0.99996)
    for x, y in zip(floats(average), floats(still)):
        np.testing.assert_array_equal(x, y)


def test_ema_of_a_long_run_follows_its_formula():
    """With DeiT's decay, 4e-5 of a float32 a step adds up."""
    steps, decay = 20_000, 0.99996
    average = init_average({'x': jnp.float32(1)})

    def step(average, _):
        return ema_update(average, {'x': jnp.float32(3)}, decay), None

    average, _ = jax.lax.scan(step, average, length=steps)
    assert float(average['x']) == pytest.approx(3 - 2 * decay**steps, rel=1e-3)


def test_an_average_shares_no_memory_with_the_state():
    """Or a step could not give away the memory of both."""
    state = variables(0)
    average = init_average(state)
    step = jax.jit(lambda x, y: (x, ema_update(y, x, 0.5)), donate_argnums=(0, 1))
    expected = floats(state)
    _, average = step(state, average)
    for x, y in zip(floats(average), expected):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('count', [1, 2, 5])
def test_mean_of_checkpoints(count):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        mean = mean_of(variables(seed) for seed in range(count))
    expected = zip(*(floats(variables(seed)) for seed in range(count)))
    for x, y in zip(floats(mean), expected):
        np.testing.assert_allclose(x, np.mean(y, axis=0), rtol=1e-6, atol=1e-7)
    assert mean['batch_stats']['count'] == count - 1


def test_mean_of_one_and_the_same_is_exact():
    mean = mean_of(variables(3) for _ in range(7))
    for x, y in zip(floats(mean), floats(variables(3))):
        np.testing.assert_array_equal(x, y)


def test_one_checkpoint_is_held_at_a_time():
    held = []

    def read():
        for seed in range(4):
            assert [x() for x in held] == [None] * seed
            tree = {'x': jnp.full(1000, float(seed))}
            held.append(weakref.ref(tree['x']))
            yield tree
            del tree

    assert mean_of(read())['x'][0] == 1.5


def test_a_mean_lies_where_the_checkpoints_do():
    mesh = jax.make_mesh((8,), ('x',))
    sharding = jax.NamedSharding(mesh, jax.P('x'))
    trees = (
        {'x': jax.device_put(jnp.arange(16.0) * seed, sharding)} for seed in (1, 3)
    )
    mean = mean_of(trees)['x']
    assert mean.sharding.is_equivalent_to(sharding, 1)
    np.testing.assert_array_equal(mean, np.arange(16) * 2)


def test_mean_of_nothing():
    with pytest.raises(UserError, match='no checkpoint to average'):
        mean_of([])
