import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_jax.data.order import (
    MAX_EXAMPLES,
    MAX_POSITION,
    Order,
    draw_words,
    permute,
    shift_of,
)
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


def make_key(*words):
    key = 0
    for word in words:
        key = mix(key ^ (word % 2**32) ^ 0x9E3779B9)
    return key


def reference(position, num_examples, seed):
    """The example at a position, in Python's integers."""
    epoch, place = divmod(position, num_examples)
    keys = [make_key(i, seed, seed >> 32, epoch, epoch >> 32) for i in (1, 2)]
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


# --- Random words of positions ----------------------------------------------------


def reference_words(position, seed):
    """Those of a position, in Python's integers."""
    first, second = (make_key(i, seed, seed >> 32, position >> 32) for i in (3, 4))
    steps = (i * 0x9E3779B9 for i in range(3))
    return [mix(mix((position + first + step) % 2**32) ^ second) for step in steps]


def shifts(positions, seed=3, pad=2):
    """`[n, 3]`: first row, first column, mirrored."""
    words = Order(1, seed).words_at(positions)
    return np.stack(shift_of(tuple(words.T), pad), axis=-1)


@pytest.mark.parametrize('seed', [0, 7, 2**40 + 3])
def test_words_are_what_they_are_defined_as(seed):
    rng = np.random.default_rng(seed)
    positions = np.concatenate(
        [np.arange(9), rng.integers(0, 2**53, 9), [2**32 - 1, 2**32, 2**53 - 1]]
    )
    expected = [reference_words(int(p), seed) for p in positions]
    found = Order(1, seed).words_at(positions)
    assert found.dtype == np.uint32
    assert found.tolist() == expected
    for pad in (0, 4):
        for shift, (a, b, c) in zip(shifts(positions, seed, pad), expected):
            places = 2 * pad + 1
            assert shift.tolist() == [a % places, b % places, c >= 2**31]


@pytest.mark.parametrize('start', [0, 2**32 - 20_000])
def test_all_shifts_and_mirrors_are_equally_frequent(start):
    """All fifty together too, so that none of the three depends on another."""
    drawn = shifts(start + np.arange(40_000))
    assert drawn.max(axis=0).tolist() == [4, 4, 1]
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert abs(deviation(counts, 40_000 / 50)) < 4
    for column, places in zip(drawn.T, (5, 5, 2)):
        counts = np.bincount(column, minlength=places)
        assert abs(deviation(counts, 40_000 / places)) < 4


@pytest.mark.parametrize('apart', [1, 2, 3, 64, 1438, 2**16, 2**32])
def test_shifts_of_other_positions_and_seeds_are_independent(apart):
    positions = np.arange(40_000)
    one = shifts(positions)
    for other in (shifts(positions + apart), shifts(positions, seed=3 + apart)):
        for a, b, places in zip(one.T, other.T, (5, 5, 2)):
            counts = np.bincount(a * places + b, minlength=places**2)
            assert abs(deviation(counts, 40_000 / places**2)) < 4


@pytest.mark.parametrize('start', [0, 2**32 - 8, 2**32, 2**53 - 16])
def test_device_and_host_draw_the_same_words(start):
    positions = start + np.arange(16)
    host = Order(1, 2**33 + 5).words_at(positions)
    low, high = (jnp.uint32(x) for x in (positions & (2**32 - 1), positions >> 32))
    found = jax.jit(draw_words, static_argnums=1)((low, high), 2**33 + 5)
    np.testing.assert_array_equal(np.stack(found, axis=-1), host)


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
