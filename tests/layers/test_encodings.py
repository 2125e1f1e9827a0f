"""The argument for sines and cosines: each property of each encoding, computed."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from PIL import Image

from vit_jax.errors import UserError
from vit_jax.layers import position
from vit_jax.layers.position import (
    binary,
    integer,
    normalized,
    resize_learned,
    shift_matrix,
    sincos,
    sincos_grid,
    sine,
)

D = 16
MANY = 3001  # positions, many more than features


def number(length):
    return integer(np.arange(length), D)


def fraction(length):
    return normalized(np.arange(length), D)


def digits(length):
    return binary(np.arange(length), D)


def one_sine(length):
    return sine(np.arange(length), D)


def pairs(length):
    return sincos(np.arange(length), D)


def is_bounded(encode):
    return np.abs(encode(MANY)).max() <= 1.0


def is_the_same_at_any_length(encode):
    return np.array_equal(encode(7), encode(MANY)[:7])


def has_equal_steps(encode):
    """Neighbours are equally far apart, everywhere and at any length."""
    steps = [np.diff(np.float64(encode(n)), axis=0) for n in (13, MANY)]
    distances = np.linalg.norm(np.concatenate(steps), axis=1)
    return np.ptp(distances) <= 1e-3 * distances.mean()


def shifts_by_a_linear_map(encode):
    """The T that fits PE(x + delta) = T PE(x) best, fits all positions."""
    code = np.float64(encode(MANY))
    for delta in (1, 5):
        before, after = code[:-delta], code[delta:]
        fitted = np.linalg.lstsq(before, after, rcond=1e-9)[0]
        # The codes of some encodings grow, so a miss counts next to nothing there.
        if np.abs(before @ fitted - after).max() > 1e-4:
            return False
    return True


@pytest.mark.parametrize(
    ('encode', 'bounded', 'any_length', 'equal_steps', 'linear_shift'),
    [
        (number, False, True, True, False),
        (fraction, True, False, False, False),
        (digits, True, True, False, False),
        (one_sine, True, True, False, False),
        (pairs, True, True, True, True),
    ],
)
def test_only_pairs_have_every_property(
    encode, bounded, any_length, equal_steps, linear_shift
):
    assert is_bounded(encode) == bounded
    assert is_the_same_at_any_length(encode) == any_length
    assert has_equal_steps(encode) == equal_steps
    assert shifts_by_a_linear_map(encode) == linear_shift


def test_digits_are_one_then_the_root_of_two_apart():
    distances = np.linalg.norm(np.diff(digits(5), axis=0), axis=1)
    np.testing.assert_allclose(distances, [1, math.sqrt(2), 1, math.sqrt(3)])


def test_a_single_sine_gives_two_places_one_code():
    # sin has the same value on both sides of a crest; one wave shows it.
    left, right = sine(np.array([math.pi / 2 - 1, math.pi / 2 + 1]), 1)
    assert left == pytest.approx(right, abs=1e-6)
    left, right = sincos(np.array([math.pi / 2 - 1, math.pi / 2 + 1]), 2)
    assert np.abs(left - right).max() > 1


def test_integer_and_normalized_fill_the_first_feature():
    np.testing.assert_array_equal(integer(np.array([3, -1]), 2), [[3, 0], [-1, 0]])
    np.testing.assert_array_equal(
        normalized(np.array([3, 1]), 2, length=4), [[0.75, 0], [0.25, 0]]
    )


def test_binary_is_the_digits_of_the_position():
    positions = [0, 1, 2, 11, 2**40 + 1]
    expected = [[int(d) for d in reversed(f'{p:071b}')] for p in positions]
    np.testing.assert_array_equal(binary(np.array(positions), 71), expected)


def test_binary_tells_a_width_too_small():
    assert binary(np.array([7]), 3).sum() == 3
    with pytest.raises(UserError, match='position 8 has 4 binary digits; a width of 3'):
        binary(np.array([1, 8]), 3)


@pytest.mark.parametrize('positions', [[0, -1], [2.5]])
def test_binary_tells_what_has_no_digits(positions):
    with pytest.raises(UserError, match='whole numbers from 0'):
        binary(np.array(positions), 4)


@pytest.mark.parametrize('delta', [np.int64(2), np.float32(2), jnp.float32(2), [2]])
def test_shift_matrix_takes_any_number(delta):
    np.testing.assert_array_equal(shift_matrix(delta, 4), shift_matrix(2, 4))


def test_sine_equals_the_loop():
    expected = np.zeros((5, 3))
    for t, i in np.ndindex(expected.shape):
        expected[t, i] = math.sin(t / 100.0 ** (i / 3))
    reference.assert_close(sine(np.arange(5), 3, max_wavelength=100.0), expected, 1e-6)


@pytest.mark.parametrize('delta', [0, 1, -4.5, 31])
def test_shift_matrix_moves_any_position(delta):
    positions = np.array([-3.0, 0, 0.25, 17, 101])
    for width, longest in ((2, 10_000.0), (10, 50.0)):
        matrix = shift_matrix(delta, width, longest)
        moved = sincos(positions, width, longest) @ matrix.T
        expected = sincos(positions + delta, width, longest)
        reference.assert_close(moved, expected, 1e-5)
        reference.assert_close(matrix @ matrix.T, np.eye(width), 1e-6)  # a rotation


@pytest.mark.parametrize(('grid', 'delta'), [((3, 5), (1, 2)), ((4, 3, 2), (2, 1, 1))])
def test_shift_matrix_moves_each_axis_of_a_grid(grid, delta):
    width = 4 * len(grid)
    code = sincos_grid(grid, width).reshape(*grid, width)
    start = code[tuple(slice(0, n - d) for n, d in zip(grid, delta))]
    end = code[tuple(slice(d, None) for d in delta)]
    reference.assert_close(start @ shift_matrix(delta, width).T, end, 1e-6)


@pytest.mark.parametrize(
    ('delta', 'width', 'message'),
    [
        (1, 7, 'need an even width, not 7'),
        ((1, 2), 6, 'on 2 axes need a width divisible by 4, not 6'),
    ],
)
def test_shift_matrix_needs_a_width_that_can_be_shared(delta, width, message):
    with pytest.raises(UserError, match=message):
        shift_matrix(delta, width)


def learned(grid, num_prefix=2, width=3):
    shapes = {'grid': (*grid, width), 'prefix': (num_prefix, width)}
    arrays = reference.random_arrays(0, *shapes.values())
    return {name: jnp.float32(x) for name, x in zip(shapes, arrays)}


@pytest.mark.parametrize('grid', [(7,), (4, 9), (2, 3, 5)])
def test_resize_to_the_same_grid_is_the_identity(grid):
    params = learned(grid)
    resized = resize_learned(params, grid)
    for name, leaf in params.items():
        np.testing.assert_array_equal(resized[name], leaf)


@pytest.mark.parametrize('new', [(8, 18), (9, 4), (6, 6), (2, 5), (3, 13)])
def test_resize_equals_pillow_plane_by_plane(new):
    """Pillow's bicubic filter, by rows and columns, widened where it shrinks."""
    params = learned((4, 9))
    resized = resize_learned(params, new)
    assert resized['grid'].shape == (*new, 3)
    for i in range(3):
        plane = Image.fromarray(np.asarray(params['grid'][..., i]))
        expected = plane.resize(new[::-1], Image.Resampling.BICUBIC)
        reference.assert_close(resized['grid'][..., i], np.asarray(expected), 1e-5)


@pytest.mark.parametrize('num_prefix', [0, 1, 2, 5])
def test_resize_keeps_any_number_of_prefix_tokens(num_prefix):
    params = learned((3, 5), num_prefix)
    if not num_prefix:
        del params['prefix']
    resized = resize_learned(params, (5, 3))
    assert set(resized) == set(params)
    if num_prefix:
        np.testing.assert_array_equal(resized['prefix'], params['prefix'])


def test_resize_reaches_the_module():
    params = learned((3, 5), num_prefix=1, width=4)
    (x,) = reference.random_arrays(1, (2, 1 + 4 * 7, 4))
    module = position.PositionEmbedding('learned')
    resized = resize_learned(params, (4, 7), 'nearest')
    out = reference.apply(module, resized, x, grid=(4, 7))
    # The nearest row of three to the middle of each of four, and so on.
    rows = [min(2, int((r + 0.5) * 3 / 4)) for r in range(4)]
    cols = [min(4, int((c + 0.5) * 5 / 7)) for c in range(7)]
    expected = np.asarray(params['grid'])[np.ix_(rows, cols)].reshape(1, 28, 4)
    reference.assert_close(out[:, 1:], x[:, 1:] + expected)


def test_resize_between_ranks_is_told():
    with pytest.raises(UserError, match='a grid 4x9 cannot be resized to 36: the axes'):
        resize_learned(learned((4, 9)), (36,))


@pytest.mark.parametrize('grid', [(0, 7), (-2, 7)])
def test_resize_to_nothing_is_told(grid):
    with pytest.raises(UserError, match='a grid has lengths above 0'):
        resize_learned(learned((4, 9)), grid)


@pytest.mark.parametrize('kind', ['learned', 'sincos2d', 'none'])
@pytest.mark.parametrize('shape', [(2, 14, 12), (15, 12), (2, 3, 5, 12)])
def test_tokens_that_have_no_places_are_told(kind, shape):
    module, x = position.PositionEmbedding(kind), jnp.zeros(shape)
    with pytest.raises(UserError, match=r'\[B, P \+ T, D\], T those of a grid of 3x5'):
        module.init(jax.random.key(0), x, (3, 5))


@pytest.mark.parametrize(('trained', 'given'), [(1, 2), (1, 0), (0, 1)])
def test_other_prefix_tokens_are_told(trained, given):
    module = position.PositionEmbedding('learned')
    x = jnp.zeros((1, 15 + trained, 8))
    params = reference.random_params(module, x, grid=(3, 5))
    message = f'positions for {trained} tokens before the grid; this input has {given}'
    with pytest.raises(UserError, match=message):
        module.apply({'params': params}, jnp.zeros((1, 15 + given, 8)), (3, 5))


def test_every_name_is_tried_by_the_module():
    module_kinds = {'learned', 'none', *position._BY_NUMBER, *position._BY_AXIS}
    assert set(position.POSEMBS) == module_kinds
    for kind, encode in (
        ('integer', number),
        ('normalized', fraction),
        ('binary', digits),
        ('sine', one_sine),
        ('sincos1d', pairs),
    ):
        out = position.PositionEmbedding(kind).apply({}, jnp.zeros((2, 17, D)), (3, 5))
        np.testing.assert_array_equal(out[0, :2], 0.0)  # prefix tokens
        reference.assert_close(out[1, 2:], encode(15), 1e-6)


@pytest.mark.parametrize(
    ('kind', 'grid', 'right'),
    [('sincos2d', (5,), 'sincos1d'), ('sincos3d', (3, 5), 'sincos2d')],
)
def test_a_grid_of_other_axes_is_told(kind, grid, right):
    module, x = position.PositionEmbedding(kind), jnp.zeros((1, math.prod(grid), 12))
    with pytest.raises(UserError, match=f'{kind!r} is for grids of .* use {right!r}'):
        module.apply({}, x, grid)
