from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from vit_jax.errors import UserError
from vit_jax.layers.relative import (
    check_tokens,
    conv_init,
    offset_logits,
    positional_factors,
    positional_logits,
    positional_weights,
    relative_positions,
)

N = 4


def test_relative_positions_by_hand():
    features = relative_positions((2, 3))
    assert features.shape == (6, 6, 3)
    np.testing.assert_array_equal(features[0, 5], [2, 1, 5])
    np.testing.assert_array_equal(features[5, 0], [-2, -1, 5])
    np.testing.assert_array_equal(features[1, 3], [-1, 1, 2])
    np.testing.assert_array_equal(features, reference.relative_positions((2, 3)))


def test_neighbours_on_a_rectangular_grid_are_one_apart():
    features = relative_positions((4, 9))
    for token in range(27):
        np.testing.assert_array_equal(features[token, token + 9], [0, 1, 1])
    for token in range(36 - 1):
        row_end = token % 9 == 8
        expected = [-8, 1, 65] if row_end else [1, 0, 1]
        np.testing.assert_array_equal(features[token, token + 1], expected)


@pytest.mark.parametrize('grid', [(1, 1), (2, 3), (4, 9), (7, 1)])
def test_positional_weights_and_factors_equal_the_loops(grid):
    kernel, bias = reference.random_arrays(0, (3, N), (N,))
    kernel = np.float64(np.float32(kernel / max(grid)))  # not all on a single key
    expected = reference.position_weights(kernel, grid)
    for given in (None, bias):
        weights = jax.jit(partial(positional_weights, grid=grid))(kernel, given)
        reference.assert_close(weights, expected)
    rows, cols = jax.jit(partial(positional_factors, grid=grid))(kernel)
    assert rows.shape == (N, grid[0], grid[0])
    assert cols.shape == (N, grid[1], grid[1])
    reference.assert_close(rows.sum(axis=-1), np.ones((N, grid[0])), 1e-6)
    reference.assert_close(cols.sum(axis=-1), np.ones((N, grid[1])), 1e-6)
    product = np.stack([np.kron(r, c) for r, c in zip(rows, cols)])
    reference.assert_close(product, expected)


def test_offset_logits_give_each_pair_the_score_of_its_offset():
    rows, cols = grid = (3, 5)
    (scores,) = reference.random_arrays(1, (2 * rows - 1, 2 * cols - 1, N))
    logits = jax.jit(partial(offset_logits, grid=grid))(scores)
    assert logits.shape == (N, 15, 15)
    for i, j in np.ndindex(15, 15):
        dx, dy, _ = map(int, reference.relative_position(i, j, grid))
        expected = scores[rows - 1 + dy, cols - 1 + dx]
        reference.assert_close(logits[:, i, j], expected, 1e-6)


def test_positional_logits_are_offset_logits_of_the_features():
    rows, cols = grid = (3, 5)
    kernel, bias = map(np.float32, reference.random_arrays(2, (3, N), (N,)))
    scores = np.zeros((2 * rows - 1, 2 * cols - 1, N), np.float32)
    for y, x in np.ndindex(scores.shape[:2]):
        dy, dx = y - (rows - 1), x - (cols - 1)
        scores[y, x] = np.array([dx, dy, dx**2 + dy**2]) @ kernel + bias
    reference.assert_close(
        positional_logits(kernel, bias, grid), offset_logits(jnp.array(scores), grid)
    )


def neighbours(num_heads):
    """The offset (dy, dx) that each head is centred on: head h1 + k h2."""
    side = round(num_heads**0.5)
    centre = (side - 1) / 2
    heads = range(num_heads)
    return [(head % side - centre, head // side - centre) for head in heads]


@pytest.mark.parametrize('num_heads', [4, 9, 16])
def test_conv_init_attends_to_the_nearest_of_each_neighbour(num_heads):
    grid = (5, 7)
    kernel = conv_init(num_heads, locality_strength=50.0)
    assert kernel.dtype == np.float32
    weights = np.asarray(positional_weights(kernel, None, grid))
    for head, (dy, dx) in enumerate(neighbours(num_heads)):
        for query, key_offsets in enumerate(reference.relative_positions(grid)):
            far = (key_offsets[:, 0] - dx) ** 2 + (key_offsets[:, 1] - dy) ** 2
            nearest = far == far.min()  # several for an even side, and at no border
            expected = nearest / nearest.sum()
            np.testing.assert_allclose(weights[head, query], expected, atol=1e-5)


def test_conv_init_by_hand():
    # Nine heads, head 1 + 3 * 2: dy = 0, dx = 1. Twice the centre, then -1.
    np.testing.assert_array_equal(conv_init(9)[:, 7], [2, 0, -1])
    np.testing.assert_array_equal(conv_init(9, 0.5)[:, 3], [0, -1, -0.5])
    # Four heads, head 1 + 2 * 0: dy = 1/2, dx = -1/2.
    np.testing.assert_array_equal(conv_init(4)[:, 1], [-1, 1, -1])


@pytest.mark.parametrize(
    ('shape', 'grid', 'message'),
    [
        ((2, 35, 8), (4, 9), '35 tokens do not fill a grid of 4x9 = 36'),
        ((2, 4, 9, 8), (4, 9), r'takes tokens \[B, T, D\]; got \(2, 4, 9, 8\)'),
        ((36, 8), (4, 9), r'takes tokens \[B, T, D\]; got \(36, 8\)'),
        ((2, 36, 8), (36,), r'is \(rows, columns\) of the tokens, not \(36,\)'),
        ((2, 36, 8), 36, r'is \(rows, columns\) of the tokens, not 36'),
    ],
)
def test_tokens_that_do_not_fill_the_grid_are_told(shape, grid, message):
    check_tokens(jnp.zeros((2, 36, 8)), (4, 9))
    with pytest.raises(UserError, match=message):
        check_tokens(jnp.zeros(shape), grid)


@pytest.mark.parametrize('num_heads', [-4, 0])
def test_no_heads_are_no_square(num_heads):
    with pytest.raises(UserError, match='square number of heads'):
        conv_init(num_heads)


@pytest.mark.parametrize('compute', [positional_logits, positional_weights])
def test_no_constant_of_all_pairs_is_compiled(compute):
    grid = (17, 19)
    jaxpr = jax.make_jaxpr(lambda kernel: compute(kernel, None, grid))(np.ones((3, N)))
    assert max([const.size for const in jaxpr.consts], default=0) < 1000
    scores = np.ones((33, 37, N), np.float32)
    jaxpr = jax.make_jaxpr(lambda scores: offset_logits(scores, grid))(scores)
    assert max([const.size for const in jaxpr.consts], default=0) < 1000
