import math

import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from vit_jax.errors import UserError
from vit_jax.layers.position import PositionEmbedding, sincos, sincos_grid

B, D = 2, 12


def loop_sincos(positions, width, max_wavelength=10_000.0):
    """Sines in the first half of the features, cosines in the second."""
    half = width // 2
    out = np.zeros((len(positions), width))
    for t, position in enumerate(positions):
        for i in range(half):
            angle = position / max_wavelength ** (i / half)
            out[t, i], out[t, half + i] = math.sin(angle), math.cos(angle)
    return out


@pytest.mark.parametrize('kwargs', [{}, {'max_wavelength': 100.0}])
def test_sincos_equals_the_loop(kwargs):
    positions = [0, 1, 2.5, -3, 2**24 + 1]  # the last one is no float32
    out = sincos(np.array(positions), 10, **kwargs)
    assert out.dtype == np.float32
    reference.assert_close(out, loop_sincos(positions, 10, **kwargs), 1e-6)


@pytest.mark.parametrize('delta', [1, 4, -7.5])
def test_a_step_rotates_each_pair_whatever_the_position(delta):
    half = 5
    step = np.zeros((2 * half, 2 * half))
    for i in range(half):
        angle = delta / 10_000.0 ** (i / half)
        cos, sin = math.cos(angle), math.sin(angle)
        step[np.ix_([i, half + i], [i, half + i])] = [[cos, sin], [-sin, cos]]
    positions = np.arange(23)
    moved = sincos(positions, 2 * half) @ step.T
    reference.assert_close(sincos(positions + delta, 2 * half), moved, 1e-6)


def test_sincos_needs_an_even_width():
    with pytest.raises(UserError, match='need an even width, not 7'):
        sincos(np.arange(3), 7)


@pytest.mark.parametrize('grid', [(5,), (3, 5), (2, 3, 5)])
def test_sincos_grid_gives_each_axis_its_share_of_the_features(grid):
    out = sincos_grid(grid, D)
    assert out.shape == (math.prod(grid), D)
    share = D // len(grid)
    for axis in range(len(grid)):
        positions = [cell[axis] for cell in np.ndindex(grid)]
        features = out[:, axis * share : (axis + 1) * share]
        reference.assert_close(features, loop_sincos(positions, share), 1e-6)


def test_sincos_grid_needs_a_width_that_can_be_shared():
    with pytest.raises(UserError, match='on 2 axes need a width divisible by 4, not 6'):
        sincos_grid((3, 5), 6)


def embed(kind, grid, num_prefix, dtype=jnp.float32):
    """(tokens, tokens with positions, parameters)"""
    module = PositionEmbedding(kind)
    (x,) = reference.random_arrays(0, (B, num_prefix + math.prod(grid), D))
    params = {}
    if kind == 'learned':
        params = reference.random_params(module, x, grid=grid)
    out = reference.apply(module, params, jnp.asarray(x, dtype), grid=grid)
    return x, out, params


@pytest.mark.parametrize(
    ('grid', 'num_prefix'), [((7,), 0), ((3, 5), 0), ((3, 5), 1), ((2, 3, 5), 2)]
)
def test_learned_positions_are_added_row_by_row_after_those_of_the_prefix(
    grid, num_prefix
):
    x, out, params = embed('learned', grid, num_prefix)
    shapes = {name: leaf.shape for name, leaf in params.items()}
    expected_shapes = {'grid': (*grid, D), 'prefix': (num_prefix, D)}
    if not num_prefix:
        del expected_shapes['prefix']
    assert shapes == expected_shapes
    out, params = np.asarray(out), reference.float64(params)
    for t in range(num_prefix):
        reference.assert_close(out[:, t], x[:, t] + params['prefix'][t])
    for t, cell in enumerate(np.ndindex(grid), start=num_prefix):
        reference.assert_close(out[:, t], x[:, t] + params['grid'][cell])


@pytest.mark.parametrize('num_prefix', [0, 2])
@pytest.mark.parametrize('kind', ['sincos1d', 'sincos2d'])
def test_fixed_positions_leave_the_prefix_alone(kind, num_prefix):
    grid = (3, 5)
    x, out, _ = embed(kind, grid, num_prefix)
    expected = x.copy()
    if kind == 'sincos1d':
        expected[:, num_prefix:] += loop_sincos(range(15), D)
    else:
        rows, cols = zip(*np.ndindex(grid))
        halves = [loop_sincos(rows, D // 2), loop_sincos(cols, D // 2)]
        expected[:, num_prefix:] += np.concatenate(halves, axis=1)
    reference.assert_close(out, expected)


def test_none_changes_nothing():
    x, out, _ = embed('none', (3, 5), 1)
    np.testing.assert_array_equal(out, np.float32(x))


@pytest.mark.parametrize('kind', ['learned', 'sincos1d', 'sincos2d', 'none'])
def test_dtype_is_that_of_the_tokens(kind):
    assert embed(kind, (3, 5), 1, jnp.bfloat16)[1].dtype == jnp.bfloat16


def test_learned_positions_start_near_zero():
    module = PositionEmbedding()
    x = jnp.zeros((1, 16, 997))
    params = reference.init(module, x, grid=(3, 5))
    for leaf in params.values():
        assert 0.015 < np.std(leaf) < 0.025


@pytest.mark.parametrize('grid', [(4, 9), (9, 4), (36,)])
def test_a_grid_of_as_many_tokens_is_another_grid(grid):
    module = PositionEmbedding('learned')
    x = jnp.zeros((1, 36, D))
    params = reference.random_params(module, x, grid=(6, 6))
    given = 'x'.join(map(str, grid))
    with pytest.raises(UserError, match=f'grid of 6x6 patches; this input has {given}'):
        module.apply({'params': params}, x, grid)


def test_unknown_kind_offers_the_nearest():
    with pytest.raises(UserError, match=r"'sincos'; did you mean 'sincos[123]d'"):
        reference.init_shapes(
            PositionEmbedding('sincos'), jnp.zeros((1, 6, 8)), grid=(2, 3)
        )
