import math

import jax
import jax.numpy as jnp
import model_checks
import numpy as np
import numpy_reference as reference
import pytest
import spatial_reference

from vit_jax.errors import UserError
from vit_jax.layers.local_attention import (
    AttentionStem,
    LocalAttention,
    dense_local_weights,
    local_attention,
    local_weights,
    mixture_weights,
)

B, N, H = 2, 3, 6
NAMES = ('query', 'key', 'value', 'row_table', 'column_table')


def random_inputs(grid, kernel_size, seed=0):
    tokens, table = (B, *grid, N, H), (kernel_size, N, H // 2)
    arrays = reference.random_arrays(seed, tokens, tokens, tokens, table, table)
    return dict(zip(NAMES, arrays))


@pytest.mark.parametrize(
    ('grid', 'kernel_size'),
    [((3, 5), 3), ((4, 9), 5), ((7, 2), 7), ((4, 9), 1), ((1, 1), 3)],
)
def test_output_and_weights_equal_the_loops(grid, kernel_size):
    inputs = random_inputs(grid, kernel_size)
    expected, expected_weights = spatial_reference.local_attention(*inputs.values())
    reference.assert_close(jax.jit(local_attention)(**inputs), expected)
    del inputs['value']
    weights = jax.jit(local_weights)(**inputs)
    assert weights.shape == (kernel_size**2, B, N, *grid)
    reference.assert_close(weights.sum(axis=0), np.ones((B, N, *grid)), 1e-6)
    reference.assert_close(dense_local_weights(weights), expected_weights)


def test_neighbourhood_of_the_whole_map_is_global_attention():
    """By other loops: one table entry an offset, a sum over all positions."""
    (rows, cols), kernel_size = (3, 5), 9
    inputs = random_inputs((rows, cols), kernel_size)
    query, key, value, row_table, column_table = inputs.values()
    expected = np.zeros(query.shape)
    for b, n, row, col in np.ndindex(B, N, rows, cols):
        q = query[b, row, col, n]
        logits = np.zeros((rows, cols))
        for i, j in np.ndindex(rows, cols):
            by_row = q[: H // 2] @ row_table[4 + i - row, n]
            by_col = q[H // 2 :] @ column_table[4 + j - col, n]
            logits[i, j] = q @ key[b, i, j, n] + by_row + by_col
        weights = reference.softmax(logits)
        expected[b, row, col, n] = np.einsum('ij,ijh->h', weights, value[b, :, :, n])
    reference.assert_close(jax.jit(local_attention)(**inputs), expected)


def test_gradients_are_those_of_differences():
    """In float64, along a random direction of all inputs at once."""
    inputs, direction = (random_inputs((3, 5), 3, seed) for seed in (0, 1))
    (cotangent,) = reference.random_arrays(2, inputs['query'].shape)

    def along(step):
        moved = [x + step * d for x, d in zip(inputs.values(), direction.values())]
        return np.sum(cotangent * spatial_reference.local_attention(*moved)[0])

    with jax.enable_x64(True):

        @jax.jit
        def slope(inputs, direction):
            def loss(inputs):
                return jnp.sum(cotangent * local_attention(**inputs))

            grads = jax.grad(loss)(inputs)
            return {name: jnp.vdot(grads[name], direction[name]) for name in NAMES}

        slopes = jax.tree.map(float, slope(inputs, direction))
    assert all(abs(part) > 1e-3 for part in slopes.values())
    difference = (along(1e-5) - along(-1e-5)) / 2e-5
    np.testing.assert_allclose(sum(slopes.values()), difference, rtol=1e-7)


@pytest.mark.parametrize('backward', [False, True])
def test_no_array_has_an_entry_for_every_pair_of_positions(backward):
    grid, kernel_size = (16, 17), 3
    inputs = random_inputs(grid, kernel_size)
    pairs = math.prod(grid) ** 2

    def run(inputs):
        return jnp.sum(local_attention(**inputs))

    sizes = spatial_reference.array_sizes(
        jax.make_jaxpr(jax.grad(run) if backward else run)(inputs)
    )
    assert max(sizes) >= B * N * kernel_size**2 * math.prod(grid)  # the logits
    assert max(sizes) < pairs
    # Nor does one have k^2 maps: neighbours are not gathered.
    assert max(sizes) < kernel_size**2 * inputs['query'].size


def random_module(grid=(4, 9), channels=5, **kwargs):
    module = LocalAttention(**{'features': N * H, 'num_heads': N, **kwargs})
    (x,) = reference.random_arrays(3, (B, *grid, channels))
    return module, reference.random_params(module, x), x


@pytest.mark.parametrize(('strides', 'grid'), [(1, (3, 5)), (2, (4, 9)), (3, (7, 2))])
def test_module_equals_the_loops(strides, grid):
    module, params, x = random_module(grid, strides=strides, kernel_size=5)
    expected, expected_weights = spatial_reference.local(
        reference.float64(params), x, strides
    )
    assert expected.shape[1:3] == tuple(-(-n // strides) for n in grid)
    reference.assert_close(reference.apply(module, params, x), expected)
    out, sown = reference.apply(module, params, x, mutable='intermediates')
    reference.assert_close(out, expected)
    (weights,) = sown['intermediates']['attention_weights']
    reference.assert_close(weights, expected_weights)


def test_shifting_the_map_shifts_the_output_away_from_borders():
    module, params, x = random_module((7, 11), kernel_size=3)
    out = np.asarray(reference.apply(module, params, x))
    moved = np.roll(x, (1, 2), axis=(1, 2))
    moved_out = np.asarray(reference.apply(module, params, moved))
    reference.assert_close(moved_out[:, 2:-1, 3:-1], out[:, 1:-2, 1:-3])
    assert np.abs(moved_out[:, 1:, 2:] - out[:, :-1, :-2]).max() > 0.01  # borders


def test_parameters_do_not_depend_on_the_size_of_the_map():
    module, params, x = random_module((4, 9), kernel_size=3)
    (larger,) = reference.random_arrays(4, (B, 7, 11, 5))
    larger[:, :4, :9] = x
    out, larger_out = (reference.apply(module, params, y) for y in (x, larger))
    reference.assert_close(larger_out[:, :3, :8], out[:, :3, :8])
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == {
        'query': {'kernel': (5, N, H)},
        'key': {'kernel': (5, N, H)},
        'value': {'kernel': (5, N, H)},
        'rows': (3, N, H // 2),
        'columns': (3, N, H // 2),
    }


def test_resnet50_of_local_attention_has_the_published_parameters():
    """25.6M with 3x3 convolutions, 18.0M with attention in their places."""
    count = 25_557_032
    for width, blocks in {64: 3, 128: 4, 256: 6, 512: 3}.items():
        params = reference.init_shapes(
            LocalAttention(width), jnp.zeros((1, 3, 5, width))
        )
        attention = sum(leaf.size for leaf in jax.tree.leaves(params))
        count += blocks * (attention - 9 * width**2)
    assert round(count / 1e6, 1) == 18.0


STEMS = {'even': (4, (8, 12)), 'odd': (3, (6, 15)), 'pixel': (1, (2, 3))}


@pytest.mark.parametrize('stem', STEMS)
def test_stem_equals_the_loops(stem):
    side, size = STEMS[stem]
    module = AttentionStem(N * 5, kernel_size=side, num_heads=N, num_mixtures=2)
    (x,) = reference.random_arrays(5, (B, *size, 7))
    params = reference.random_params(module, x, scale=0.7)
    expected = spatial_reference.attention_stem(reference.float64(params), x, side, N)
    reference.assert_close(reference.apply(module, params, x), expected)
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes['value'] == {
        'kernel': (2, 7, N * 5),
        'rows': (side, 5),
        'columns': (side, 5),
        'mixtures': (2, 5),
    }


def test_mixtures_of_the_stem_equal_the_loops():
    rows, columns, mixtures = reference.random_arrays(6, (4, 5), (4, 5), (3, 5))
    weights = mixture_weights(rows, columns, mixtures)
    params = {'rows': rows, 'columns': columns, 'mixtures': mixtures}
    expected = [
        [spatial_reference.mixture(params, a, b) for b in range(4)] for a in range(4)
    ]
    reference.assert_close(weights, np.array(expected))


MODULES = (
    LocalAttention(16, num_heads=2, kernel_size=3),
    AttentionStem(16, 2, num_heads=2),
)


@pytest.mark.parametrize('module', MODULES)
def test_bfloat16_is_that_of_the_output_not_of_parameters(module):
    (x,) = reference.random_arrays(7, (B, 4, 6, 3))
    params = reference.random_params(module, x)
    expected = reference.apply(module, params, x)
    module = module.clone(dtype=jnp.bfloat16)
    for leaf in jax.tree.leaves(reference.init_shapes(module, x)):
        assert leaf.dtype == jnp.float32
    out, sown = reference.apply(module, params, x, mutable='intermediates')
    assert out.dtype == jnp.bfloat16
    for weights in jax.tree.leaves(sown):
        assert weights.dtype == jnp.float32
    reference.assert_close(np.float32(out), expected, 0.1)


@pytest.mark.parametrize('module', MODULES)
def test_every_gradient_is_finite_and_some(module):
    (x,) = reference.random_arrays(8, (B, 4, 6, 3))
    params = reference.random_params(module, x)

    def loss(params, x):
        return jnp.sum(jnp.sin(module.apply({'params': params}, x)))

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(params, x)):
        assert np.all(np.isfinite(leaf))
        assert np.any(leaf != 0.0)


INIT = {'kernel_init': model_checks.half_zeros, 'dtype': jnp.bfloat16}


@pytest.mark.parametrize(
    ('module', 'others'),
    [
        (
            MODULES[0],
            {'features': 8, 'strides': 2, 'num_heads': 4, 'kernel_size': 5, **INIT},
        ),
        (
            MODULES[1],
            {
                'features': 8,
                'kernel_size': 4,
                'num_heads': 4,
                'num_mixtures': 3,
                **INIT,
            },
        ),
    ],
)
def test_every_field_matters(module, others):
    model_checks.check_every_field_matters(module.clone, (1, 4, 8, 3), others)


@pytest.mark.parametrize(
    ('module', 'message'),
    [
        (LocalAttention(16, kernel_size=4), 'an odd kernel_size above 0, .* not 4'),
        (LocalAttention(16, kernel_size=0), 'an odd kernel_size above 0, .* not 0'),
        (LocalAttention(16, kernel_size=-1), 'an odd kernel_size above 0, .* not -1'),
        (LocalAttention(10), 'num_heads 8 does not divide the width 10'),
        (LocalAttention(9, num_heads=3), 'it must be even, not 3'),
        (LocalAttention(16, strides=0), 'LocalAttention takes strides above 0, not 0'),
        (AttentionStem(16, 5), '5x5 blocks does not divide the image 4x10'),
        (AttentionStem(16, 4), '4x4 blocks does not divide the image 4x10'),
        (AttentionStem(16, 0), '0x0 blocks does not divide the image 4x10'),
        (AttentionStem(10, 2), 'num_heads 8 does not divide the width 10'),
    ],
)
def test_fields_that_do_not_fit_are_told(module, message):
    with pytest.raises(UserError, match=message):
        reference.init_shapes(module, jnp.zeros((1, 4, 10, 3)))


@pytest.mark.parametrize('module', MODULES)
def test_wrong_rank_is_told(module):
    name = type(module).__name__
    with pytest.raises(
        UserError, match=rf'{name} takes a map .* got shape \(2, 4, 8\)'
    ):
        reference.init_shapes(module, jnp.zeros((2, 4, 8)))


def test_tables_that_do_not_suit_the_queries_are_told():
    inputs = random_inputs((3, 5), 3)
    inputs['column_table'] = inputs['column_table'][:1]
    message = r'3 heads of size 6 needs tables of shape \(3, 3, 3\); .* and \(1, 3, 3\)'
    with pytest.raises(UserError, match=message):
        local_attention(**inputs)


@pytest.mark.parametrize(
    ('name', 'shape'),
    [
        ('key', (B, 5, 3, N, H)),
        ('key', (B, 3, 5, 1, H)),
        ('value', (B, 3, 4, N, H)),
        ('value', (1, 3, 5, N, H)),
        ('value', (3, 5, N, H)),
        ('query', (3, 5, N, H)),
    ],
)
def test_maps_of_other_shapes_are_told(name, shape):
    inputs = random_inputs((3, 5), 3)
    inputs[name] = np.zeros(shape)
    message = r'query, key and value of one shape \[B, R, C, N, H\]; got '
    with pytest.raises(UserError, match=message):
        local_attention(**inputs)
    if name == 'key':
        del inputs['value']
        with pytest.raises(UserError, match=message):
            local_weights(**inputs)


@pytest.mark.parametrize('source', ['content', 'rows', 'columns'])
def test_logits_of_bfloat16_stay_float32(source):
    """Logits of 200 and 200.5: equal in bfloat16, whose steps there are 1."""
    grid = (1, 2) if source == 'columns' else (2, 1)
    ends = ([12.5, 0.0], [12.5, 1.0])  # of the position itself, and of the next
    half = [0.0, 0.0]
    query = [*half, 16, 0.5] if source == 'columns' else [16, 0.5, *half]
    query, key = np.broadcast_to(query, (1, *grid, 1, 4)), np.zeros((1, *grid, 1, 4))
    tables = {name: np.zeros((3, 1, 2)) for name in ('rows', 'columns')}
    if source == 'content':
        key[..., :2] = np.reshape(ends, (1, *grid, 1, 2))
    else:
        tables[source][1:, 0] = ends
    value = np.arange(2.0).reshape(1, *grid, 1, 1) + np.zeros(4)
    arrays = (jnp.bfloat16(x) for x in (query, key, value))
    out = jax.jit(local_attention)(*arrays, *map(jnp.float32, tables.values()))
    assert out.dtype == jnp.bfloat16
    expected = 1 / (1 + math.exp(-0.5))
    np.testing.assert_allclose(np.float32(out)[0, 0, 0], expected, atol=0.004)


def test_relative_tables_start_with_the_size_of_a_head():
    module = LocalAttention(512, num_heads=8)
    params = reference.init(module, jnp.ones((1, 2, 3, 5)))
    for name in ('rows', 'columns'):
        assert params[name].shape == (7, 8, 32)
        np.testing.assert_allclose(np.std(params[name]), 64**-0.5, rtol=0.05)
    assert not np.array_equal(params['rows'], params['columns'])


def test_mixtures_of_the_stem_start_unlike():
    module = AttentionStem(64, num_heads=1, num_mixtures=11)
    params = reference.init(module, jnp.ones((1, 4, 4, 3)))['value']
    for name in ('rows', 'columns', 'mixtures'):
        np.testing.assert_allclose(np.std(params[name]), 64**-0.25, rtol=0.15)
    kernel = params['kernel']
    assert not np.allclose(kernel[0], kernel[1], atol=0.1)


def test_channels_that_are_not_those_of_the_stem_are_told():
    module = MODULES[1]
    params = reference.random_params(module, jnp.zeros((1, 4, 8, 3)))
    with pytest.raises(UserError, match='images of 3 channels; got 1'):
        module.apply({'params': params}, jnp.zeros((1, 4, 8, 1)))
