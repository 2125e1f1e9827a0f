import math
from functools import partial

import jax
import jax.numpy as jnp
import model_checks
import numpy as np
import numpy_reference as reference
import pytest
import spatial_reference

from vit_jax.errors import UserError
from vit_jax.layers.conv_attention import (
    AugmentedConv,
    GlobalAttention,
    SAGANAttention,
    apply_global_weights,
    average_pool,
    global_attention,
    global_weights,
    relative_logits,
)

B = 2
GRIDS = ((3, 5), (4, 9), (7, 2))


def module_and_map(module, grid, channels, seed=0):
    (x,) = reference.random_arrays(seed, (B, *grid, channels))
    return reference.random_params(module, x), x


def check_against_loops(module, loops, grid, channels, **kwargs):
    """The output, with weights and without, and the sown weights."""
    params, x = module_and_map(module, grid, channels)
    expected, expected_weights = loops(reference.float64(params), x, **kwargs)
    assert expected.shape[1:3] == tuple(-(-n // module.strides) for n in grid)
    out = reference.apply(module.clone(impl='chunked'), params, x)
    reference.assert_close(out, expected)
    out, sown = reference.apply(module, params, x, mutable='intermediates')
    reference.assert_close(out, expected)
    (weights,) = sown['intermediates']['attention_weights']
    reference.assert_close(weights, expected_weights)


@pytest.mark.parametrize('impl', ['auto', 'chunked'])
@pytest.mark.parametrize('positions', [True, False])
def test_global_attention_of_maps_equals_the_loops(positions, impl):
    """Values have another size than keys, and keys without positions another map."""
    grid, key_grid = (3, 5), (3, 5) if positions else (2, 7)
    query, key, value, *tables = reference.random_arrays(
        0, (B, *grid, 3, 7), (B, *key_grid, 3, 7), (B, *key_grid, 3, 2), (5, 7), (9, 7)
    )
    tables = tables if positions else None
    expected = spatial_reference.global_attention(query, key, value, *(tables or ()))
    attend = jax.jit(partial(global_attention, impl=impl))
    reference.assert_close(attend(query, key, value, tables), expected[0])
    weights = jax.jit(global_weights)(query, key, tables)
    reference.assert_close(weights, expected[1])
    out = apply_global_weights(weights, jnp.float32(value))
    reference.assert_close(out, expected[0])


def test_global_attention_tells_keys_of_another_map_than_the_positions():
    query, key, rows, columns = map(
        jnp.zeros, [(1, 3, 5, 2, 7), (1, 2, 5, 2, 7), (5, 7), (9, 7)]
    )
    with pytest.raises(UserError, match=r'bias of shape \(1, 2, 15, 15\) does not'):
        global_attention(query, key, key, (rows, columns))


@pytest.mark.parametrize('impl', ['dense', 'chunked'])
@pytest.mark.parametrize('source', ['content', 'rows', 'columns'])
def test_logits_of_bfloat16_stay_float32(source, impl):
    """Logits of 100 and 100.25: equal in bfloat16, whose steps there are 0.5."""
    grid = (1, 2) if source == 'columns' else (2, 1)
    ends = ([12.5, 0, 0, 0], [12.5, 1, 0, 0])  # the position itself, and the next
    query = np.broadcast_to([16, 0.5, 0, 0], (1, *grid, 1, 4))
    key = np.zeros((1, *grid, 1, 4))
    tables = {
        name: np.zeros((2 * n - 1, 4)) for name, n in zip(('rows', 'columns'), grid)
    }
    if source == 'content':
        key[:] = np.reshape(ends, key.shape)
    else:
        tables[source][1:] = ends
    value = np.arange(2.0).reshape(1, *grid, 1, 1) + np.zeros(4)
    query, key, value = (jnp.bfloat16(x) for x in (query, key, value))
    tables = tuple(map(jnp.float32, tables.values()))
    expected = 1 / (1 + math.exp(-0.25))
    out = jax.jit(partial(global_attention, impl=impl))(query, key, value, tables)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out)[0, 0, 0], expected, atol=0.004)
    weights = jax.jit(global_weights)(query, key, tables)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights[0, 0, 0, 0, -1, -1], expected, atol=1e-6)


@pytest.mark.parametrize('backward', [False, True])
def test_sagan_holds_no_entry_for_every_pair_of_positions_unless_asked(backward):
    module = SAGANAttention(impl='chunked')
    grid = (16, 17)
    params, x = module_and_map(module, grid, 16)
    pairs = B * math.prod(grid) ** 2

    def run(params, mutable):
        out = module.apply({'params': params}, x, mutable=mutable)
        return jnp.sum(out[0] if mutable else out)

    def largest(mutable):
        loss = partial(run, mutable=mutable)
        program = jax.make_jaxpr(jax.grad(loss) if backward else loss)(params)
        return max(spatial_reference.array_sizes(program))

    assert largest(['intermediates']) == pairs
    assert largest(False) == pairs // 2  # two blocks of queries


@pytest.mark.parametrize(
    ('make', 'kwargs'), [(AugmentedConv, {'key_ratio': 1.0}), (GlobalAttention, {})]
)
def test_relative_tables_start_with_the_size_of_a_head(make, kwargs):
    size = 32
    module = make(4 * size, num_heads=4, **kwargs)
    params = reference.init(module, jnp.ones((1, 11, 13, 3)))['relative_position']
    for name, length in (('rows', 21), ('columns', 25)):
        assert params[name].shape == (length, size)
        np.testing.assert_allclose(np.std(params[name]), size**-0.5, rtol=0.1)
    assert not np.allclose(params['rows'], params['columns'][:21], atol=0.1)


@pytest.mark.parametrize('grid', [*GRIDS, (1, 1)])
def test_relative_logits_equal_the_loops(grid):
    rows, cols = grid
    query, row_table, column_table = reference.random_arrays(
        0, (B, rows * cols, 3, 7), (2 * rows - 1, 7), (2 * cols - 1, 7)
    )
    expected = np.zeros((B, 3, rows * cols, rows * cols))
    for b, n, i, j in np.ndindex(expected.shape):
        down, right = j // cols - i // cols, j % cols - i % cols
        embedding = row_table[down + rows - 1] + column_table[right + cols - 1]
        expected[b, n, i, j] = query[b, i, n] @ embedding
    logits = jax.jit(relative_logits, static_argnums=3)
    reference.assert_close(logits(query, row_table, column_table, grid), expected)
    half = logits(jnp.asarray(query, jnp.bfloat16), row_table, column_table, grid)
    assert half.dtype == jnp.float32
    reference.assert_close(half, expected, 0.1)


def test_relative_logits_tell_what_does_not_suit_the_grid():
    query, rows, columns = (jnp.zeros(s) for s in ((1, 15, 3, 7), (5, 7), (9, 7)))
    with pytest.raises(UserError, match='15 queries do not fill a grid of 4x5'):
        relative_logits(query, rows, columns, (4, 5))
    with pytest.raises(
        UserError, match=r'need a row table of shape \(9, 7\); got \(5,'
    ):
        relative_logits(query, rows, columns, (5, 3))
    with pytest.raises(UserError, match=r'a column table of shape \(9, 7\); got \(5,'):
        relative_logits(query, rows, rows, (3, 5))


@pytest.mark.parametrize(
    ('strides', 'margin'), [(1, 0), (2, 0), (2, 1), (3, 0), (3, 2)]
)
def test_average_pooling_is_over_what_exists(strides, margin):
    (x,) = reference.random_arrays(0, (B, 7, 8, 3))
    expected = spatial_reference.pool(x, margin + strides, strides, margin)
    reference.assert_close(average_pool(jnp.float32(x), strides, margin), expected)


SAGAN = {
    'the paper': {},
    'the released code': {'value_reduction': 2, 'key_pool': 2},
    'other features': {'features': 24, 'key_pool': 3},
    'strides': {'features': 16, 'strides': 2},
}


@pytest.mark.parametrize(('kwargs', 'grid'), [*zip(SAGAN, [*GRIDS, (3, 5)])])
def test_sagan_equals_the_loops(kwargs, grid):
    module = SAGANAttention(**SAGAN[kwargs])
    check_against_loops(
        module,
        spatial_reference.sagan,
        grid,
        16,
        key_pool=module.key_pool,
        strides=module.strides,
    )


def test_sagan_starts_as_the_identity_with_one_scalar_gate():
    module = SAGANAttention(key_pool=2)
    (x,) = reference.random_arrays(0, (B, 4, 9, 16))
    params = reference.init(module, x)
    np.testing.assert_array_equal(reference.apply(module, params, x), np.float32(x))
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == {
        'query': {'kernel': (16, 2)},
        'key': {'kernel': (16, 2)},
        'value': {'kernel': (16, 2)},
        'out': {'kernel': (2, 16)},
        'gamma': (),
    }
    assert params['gamma'] == 0.0

    def loss(params):
        return jnp.sum(jnp.sin(module.apply({'params': params}, x)))

    assert jax.jit(jax.grad(loss))(params)['gamma'] != 0.0  # the gate can open


@pytest.mark.parametrize(
    ('strides', 'grid'), [(1, (3, 5)), (2, (4, 9)), (3, (7, 2)), (2, (7, 2))]
)
def test_augmented_conv_equals_the_loops(strides, grid):
    module = AugmentedConv(
        17,
        strides,
        num_heads=3,
        key_ratio=0.9,
        value_ratio=0.3,
        min_key_dim=1,
    )
    check_against_loops(
        module, spatial_reference.augmented_conv, grid, 5, strides=strides
    )


def test_augmented_conv_of_attention_alone_equals_the_loops():
    module = AugmentedConv(
        18, 2, num_heads=3, key_ratio=1.0, value_ratio=1.0, min_key_dim=1
    )
    check_against_loops(module, spatial_reference.augmented_conv, (4, 9), 5, strides=2)
    shapes = jax.tree.map(
        jnp.shape, reference.init_shapes(module, jnp.zeros((1, 4, 9, 5)))
    )
    assert shapes == {
        'query': {'kernel': (5, 3, 6)},
        'key': {'kernel': (5, 3, 6)},
        'value': {'kernel': (5, 3, 6)},
        'relative_position': {'rows': (3, 6), 'columns': (9, 6)},
        'out': {'kernel': (3, 6, 18)},
    }


@pytest.mark.parametrize(
    ('features', 'key_dim', 'value_dim'), [(128, 20, 2), (512, 20, 6), (1024, 26, 13)]
)
def test_augmented_conv_has_the_channels_of_the_paper(features, key_dim, value_dim):
    params = reference.init_shapes(AugmentedConv(features), jnp.zeros((1, 3, 5, 7)))
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == {
        'conv': {'kernel': (3, 3, 7, features - 8 * value_dim)},
        'query': {'kernel': (7, 8, key_dim)},
        'key': {'kernel': (7, 8, key_dim)},
        'value': {'kernel': (7, 8, value_dim)},
        'relative_position': {'rows': (5, key_dim), 'columns': (9, key_dim)},
        'out': {'kernel': (8, value_dim, 8 * value_dim)},
    }


@pytest.mark.parametrize(('strides', 'grid'), [(1, (4, 9)), (2, (3, 5)), (2, (7, 2))])
def test_global_attention_equals_the_loops(strides, grid):
    module = GlobalAttention(21, strides, num_heads=3)
    check_against_loops(module, spatial_reference.botnet, grid, 5, strides=strides)


@pytest.mark.parametrize(
    ('make', 'first_stage', 'expected'),
    [
        (AugmentedConv, 2, 25_781_872),  # published: 25.8M
        (GlobalAttention, 4, 20_852_008),  # published: 20.8M, beside 25.5M of ResNet-50
    ],
)
def test_resnet50_has_the_published_parameters(make, first_stage, expected):
    """Those of ResNet-50, with attention for the 3x3 convolutions from a stage on."""
    count = 25_557_032
    for stage in range(first_stage, 5):
        width, size = 64 * 2 ** (stage - 1), 56 // 2 ** (stage - 1)
        for block in range((3, 4, 6, 3)[stage - 1]):
            strides = 2 if block == 0 else 1
            x = jnp.zeros((1, strides * size, strides * size, width))
            params = reference.init_shapes(make(width, strides), x)
            count += sum(leaf.size for leaf in jax.tree.leaves(params)) - 9 * width**2
    assert count == expected


BLOCKS = (
    SAGANAttention(16),
    AugmentedConv(16, num_heads=2),
    GlobalAttention(16, num_heads=2),
)


@pytest.mark.parametrize('module', BLOCKS)
def test_every_gradient_is_finite_and_some(module):
    params, x = module_and_map(module, (3, 5), 16)

    def loss(params, x):
        return jnp.sum(jnp.sin(module.apply({'params': params}, x)))

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(params, x)):
        assert np.all(np.isfinite(leaf))
        assert np.any(leaf != 0.0)


@pytest.mark.parametrize('module', BLOCKS)
def test_bfloat16_is_that_of_the_output_not_of_parameters_and_weights(module):
    params, x = module_and_map(module, (3, 5), 16)
    expected = reference.apply(module, params, x)
    module = module.clone(dtype=jnp.bfloat16)
    for leaf in jax.tree.leaves(reference.init_shapes(module, x)):
        assert leaf.dtype == jnp.float32
    out, sown = reference.apply(module, params, x, mutable='intermediates')
    assert out.dtype == jnp.bfloat16
    assert sown['intermediates']['attention_weights'][0].dtype == jnp.float32
    reference.assert_close(np.float32(out), expected, 0.2)


INIT = {
    'impl': 'chunked',
    'kernel_init': model_checks.half_zeros,
    'dtype': jnp.bfloat16,
}


@pytest.mark.parametrize(
    ('module', 'others'),
    [
        (
            SAGANAttention(16),
            {
                'features': 8,
                'strides': 2,
                'key_reduction': 4,
                'value_reduction': 2,
                'key_pool': 2,
                **INIT,
            },
        ),
        (
            AugmentedConv(40, num_heads=2, min_key_dim=1),
            {
                'features': 41,
                'strides': 2,
                'num_heads': 3,
                'key_ratio': 0.9,
                'value_ratio': 0.5,
                'min_key_dim': 11,
                'kernel_size': 5,
                **INIT,
            },
        ),
        (
            GlobalAttention(24),
            {'features': 16, 'strides': 2, 'num_heads': 3, **INIT},
        ),
    ],
)
def test_every_field_matters(module, others):
    model_checks.check_every_field_matters(module.clone, (1, 3, 5, 16), others)


@pytest.mark.parametrize('module', BLOCKS[1:])
def test_map_of_another_size_is_told(module):
    params, _ = module_and_map(module, (4, 9), 16)
    message = 'relative positions for a map of 4x9; this input has 6x6'
    with pytest.raises(UserError, match=message):
        module.apply({'params': params}, jnp.zeros((B, 6, 6, 16)))


def test_augmented_conv_has_the_positions_of_the_pooled_map():
    module = AugmentedConv(16, strides=2, num_heads=2)
    params, _ = module_and_map(module, (7, 4), 16)
    with pytest.raises(UserError, match='map of 4x2; this input has 2x4'):
        module.apply({'params': params}, jnp.zeros((B, 4, 7, 16)))


@pytest.mark.parametrize('module', BLOCKS)
def test_bad_maps_and_strides_are_told(module):
    name = type(module).__name__
    with pytest.raises(UserError, match=rf'{name} takes a map .* got shape \(2, 15, 8'):
        reference.init_shapes(module, jnp.zeros((2, 15, 8)))
    with pytest.raises(UserError, match=f'{name} takes strides above 0, not 0'):
        reference.init_shapes(module.clone(strides=0), jnp.zeros((2, 3, 5, 8)))


@pytest.mark.parametrize(
    ('module', 'message'),
    [
        (SAGANAttention(20), 'cannot reduce 20 channels by 8'),
        (SAGANAttention(24, value_reduction=5), 'cannot reduce 24 channels by 5'),
        (SAGANAttention(24, key_reduction=0), 'cannot reduce 24 channels by 0'),
        (SAGANAttention(24, key_pool=0), 'key_pool must be above 0, not 0'),
        (
            AugmentedConv(8),
            'of 8 features leaves the convolution none: 8 are of attention',
        ),
        (
            AugmentedConv(17, num_heads=3, value_ratio=1.0),
            'of 17 features leaves the convolution none: 18 are of attention',
        ),
        (AugmentedConv(8, num_heads=0), 'num_heads must be above 0, not 0'),
        (AugmentedConv(40, value_ratio=0.0), 'value_ratio must be above 0, not 0.0'),
        (AugmentedConv(40, key_ratio=-0.1), 'key_ratio must be above 0, not -0.1'),
        (SAGANAttention(24, impl='chunk'), "impl 'chunk'; did you mean 'chunked'"),
        (GlobalAttention(10), 'num_heads 4 does not divide the width 10'),
    ],
)
def test_fields_that_do_not_fit_are_told(module, message):
    with pytest.raises(UserError, match=message):
        reference.init_shapes(module, jnp.zeros((1, 3, 5, 16)))
