import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_jax.data.order import MAX_EXAMPLES, MAX_POSITION, Order, permute
from vit_jax.errors import UserError


def epochs(num_examples, count, seed=3):
    """`[count, num_examples]`: the first epochs."""
    order = Order(num_examples, seed)
    return order.example_at(np.arange(count * num_examples)).reshape(count, -1)


# --- The definition, once more -------------------------------------------------


def mix(x):
    """MurmurHash3's fmix32, in integers of any length."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return x ^ (x >> 16)


def reference(position, num_examples, seed):
    """The example at a position, in Python's integers."""
    epoch, place = divmod(position, num_examples)
    keys = []
    for lane in (1, 2):
        key = 0
        for word in (lane, seed, seed >> 32, epoch, epoch >> 32):
            key = mix(key ^ (word % 2**32) ^ 0x9E3779B9)
        keys.append(key)
    rows = math.ceil(math.sqrt(num_examples))
    rows += rows % 2
    columns = math.ceil(num_examples / rows)
    while True:
        left, right = divmod(place, columns)
        for i in range(16):
            half = left if i % 2 else right
            number = mix(mix((half + keys[0] + i * 0x9E3779B9) % 2**32) ^ keys[1])
            if i % 2:
                right = (right + number % columns) % columns
            else:
                left = (left + number % rows) % rows
        place = left * columns + right
        if place < num_examples:
            return place


SIZES = (1, 2, 3, 13, 97, 1797, 65537, 1_281_167, MAX_EXAMPLES)


@pytest.mark.parametrize('n', SIZES)
@pytest.mark.parametrize('seed', [0, 7, 2**40 + 3])
def test_order_is_what_it_is_defined_as(n, seed):
    """A run that is resumed by another version must find the same order."""
    rng = np.random.default_rng(n)
    positions = np.concatenate(
        [np.arange(20), rng.integers(0, min(50 * n, MAX_POSITION), 20), [2**53 - 1]]
    )
    expected = [reference(int(p), n, seed) for p in positions]
    assert Order(n, seed).example_at(positions).tolist() == expected
    assert int(Order(n, seed).example_at(int(positions[-1]))) == expected[-1]


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 2**40))
@settings(deadline=None, max_examples=60)
def test_every_epoch_is_a_permutation(n, seed, epoch):
    words = [np.full(n, word, np.uint32) for word in (epoch % 2**32, epoch >> 32)]
    out = permute(np.arange(n, dtype=np.uint32), tuple(words), n, seed)
    assert np.array_equal(np.sort(out), np.arange(n))


def test_a_long_epoch_is_a_permutation():
    (epoch,) = epochs(100_003, 1)
    assert np.array_equal(np.sort(epoch), np.arange(100_003))


# --- What it looks like ----------------------------------------------------------


def deviation(counts, expected):
    """Chi-square as a number of standard deviations, for many cells."""
    chi2 = np.sum((counts - expected) ** 2 / expected)
    return (chi2 - counts.size) / math.sqrt(2 * counts.size)


@pytest.mark.parametrize('n', [2, 3, 4, 5])
def test_all_orders_of_few_examples_are_equally_frequent(n):
    orders = list(itertools.permutations(range(n)))
    found = epochs(n, 9000)
    codes = [int((found == order).all(axis=1).sum()) for order in orders]
    assert sum(codes) == 9000
    assert abs(deviation(np.array(codes), 9000 / len(orders))) < 4


@pytest.mark.parametrize('n', [13, 97, 256])
def test_each_example_is_equally_often_at_each_place(n):
    found = epochs(n, 2000)
    counts = np.stack([np.bincount(place, minlength=n) for place in found.T])
    assert abs(deviation(counts, 2000 / n)) < 4


@pytest.mark.parametrize('n', [13, 97, 256])
def test_neighbours_and_epochs_have_no_fixed_structure(n):
    """Differences between places, epochs and seeds are all equally frequent."""
    found = epochs(n, 2000)
    across = (found[:, 1:] - found[:, :-1]) % n
    counts = np.bincount(across.ravel(), minlength=n)
    assert counts[0] == 0
    assert abs(deviation(counts[1:], across.size / (n - 1))) < 4
    for other in (np.roll(found, 1, axis=0), epochs(n, 2000, seed=4)):
        counts = np.bincount(((found - other) % n).ravel(), minlength=n)
        assert abs(deviation(counts, found.size / n)) < 4


def test_a_long_epoch_has_no_correlations():
    n = 50_021
    first, second = epochs(n, 2)
    limit = 4 / math.sqrt(n)
    places = np.arange(n)
    for a, b in [
        (first[1:], first[:-1]),
        (first[223:], first[:-223]),  # 224 rows in the cipher's rectangle
        (first, places),
        (first, second),
    ]:
        assert abs(np.corrcoef(a, b)[0, 1]) < limit
    assert (first == second).sum() < 8  # 1 on average


# --- On the device ----------------------------------------------------------------


@pytest.mark.parametrize('n', SIZES)
def test_device_and_host_agree_bit_for_bit(n):
    """Batches that begin anywhere and, of few examples, hold several epochs."""
    order, size = Order(n, 2**33 + 5, batch_size=501), 501
    examples_of = jax.jit(order.examples_of)
    rows = jnp.arange(size, dtype=jnp.uint32)
    for start in (0, n - 1, 3 * n + n // 2, 10**9):
        expected = order.example_at(start + np.arange(size))
        found = examples_of(order.first_of(start), rows)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, expected)


def test_runs_of_too_many_epochs_for_the_device():
    with pytest.raises(UserError, match='fewer than 4,294,967,295 epochs'):
        Order(3, 0).first_of(3 * 2**32)


# --- Repeated augmentation ----------------------------------------------------------


@pytest.mark.parametrize(('batch', 'repeats'), [(8, 3), (6, 3), (7, 2), (5, 4), (2, 1)])
def test_repeats(batch, repeats):
    """Row r of a step is image r modulo ceil(batch / repeats) of the step."""
    n, steps = 11, 9
    order = Order(n, 5, batch, repeats)
    plain = iter(Order(n, 5).example_at(np.arange(steps * batch)))
    found = order.example_at(np.arange(steps * batch)).reshape(steps, batch)
    distinct = math.ceil(batch / repeats)
    for row in found:
        drawn = [next(plain) for _ in range(distinct)]
        assert row.tolist() == [drawn[r % distinct] for r in range(batch)]


@pytest.mark.parametrize(('batch', 'repeats'), [(8, 3), (512, 3), (12, 6), (7, 2)])
def test_copies_are_never_neighbours(batch, repeats):
    order = Order(10**6, 5, batch, repeats)
    found = order.example_at(np.arange(20 * batch)).reshape(20, batch)
    assert (found[:, 1:] != found[:, :-1]).all()
    counts = np.unique(found[0], return_counts=True)[1]
    assert len(counts) == math.ceil(batch / repeats)
    assert counts.max() <= repeats


@pytest.mark.parametrize(('batch', 'repeats'), [(8, 3), (7, 2)])
def test_repeats_on_the_device(batch, repeats):
    order = Order(11, 5, batch, repeats)
    starts = batch * np.arange(9)
    first = order.first_of(starts)
    rows = jnp.arange(batch, dtype=jnp.uint32)
    found = jax.vmap(order.examples_of, in_axes=(0, None))(first, rows)
    expected = order.example_at(np.arange(9 * batch)).reshape(9, batch)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(UserError, match=f'no multiple of batch_size {batch}'):
        order.first_of(starts + 1)


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ((0, 0), '1 to 2,147,483,647 examples, not 0'),
        ((2**31, 0), 'not 2,147,483,648'),
        ((9, 0, 4, 0), 'repeats must be at least 1, not 0'),
        ((9, 0, 4, 4), 'repeats 4 fills the batch of 4 with one image; .* at most 3'),
        ((9, 0, 1, 2), 'with one image; it can be at most 1'),
    ],
)
def test_impossible_orders(args, message):
    with pytest.raises(UserError, match=message):
        Order(*args)
