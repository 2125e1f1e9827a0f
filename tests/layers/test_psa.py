import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from vit_jax.errors import UserError
from vit_jax.layers.psa import (
    GPSA,
    conv_init,
    gated_positional_attention,
    gpsa_weights,
    positional_factors,
    positional_weights,
    relative_positions,
)

IMPLS = ('factored', 'split', 'dense')
B, N, H = 2, 4, 3
NAMES = ('query', 'key', 'value', 'kernel', 'bias', 'gating')


def random_inputs(grid, seed=0):
    tokens = (B, grid[0] * grid[1], N, H)
    arrays = reference.random_arrays(seed, tokens, tokens, tokens, (3, N), (N,), (N,))
    # Squared distances grow with the grid: keep the softmax from a single key.
    arrays[3] = np.float64(np.float32(arrays[3] / max(grid)))
    return dict(zip(NAMES, arrays))


def output_and_gradients(inputs, cotangent, grid, impl, attention_impl='auto'):
    @jax.jit
    def run(inputs, cotangent):
        def attend(inputs):
            return gated_positional_attention(
                **inputs, grid=grid, impl=impl, attention_impl=attention_impl
            )

        out, vjp = jax.vjp(attend, inputs)
        return out, *vjp(cotangent)

    return run(inputs, cotangent)


def reference_output_and_gradients(inputs, cotangent, grid):
    query, key, value, kernel, _, gating = inputs.values()
    gate = reference.sigmoid(gating)
    content, weights = reference.attention(query, key, value)
    position_weights = reference.position_weights(kernel, grid)
    position = reference.apply_weights(np.stack([position_weights] * B), value)
    out = (1 - gate)[:, None] * content + gate[:, None] * position

    to_content = (1 - gate)[:, None] * cotangent
    dquery, dkey, dvalue, _ = reference.attention_gradients(
        query, key, value, weights, to_content
    )
    dkernel = np.zeros_like(kernel)
    for n in range(N):
        to_position = gate[n] * cotangent[:, :, n]
        dweights = sum(to_position[b] @ value[b, :, n].T for b in range(B))
        dlogits = reference.softmax_gradient(position_weights[n], dweights)
        for f in range(3):
            features = reference.relative_positions(grid)[..., f]
            dkernel[f, n] = np.sum(features * dlogits)
        for b in range(B):
            dvalue[b, :, n] += position_weights[n].T @ to_position[b]
    dgate = np.sum(cotangent * (position - content), axis=(0, 1, 3))
    dgating = dgate * gate * (1 - gate)
    grads = (dquery, dkey, dvalue, dkernel, np.zeros(N), dgating)
    return out, dict(zip(NAMES, grads))


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
    inputs = random_inputs(grid)
    kernel = inputs['kernel']
    expected = reference.position_weights(kernel, grid)
    for bias in (None, inputs['bias']):
        weights = jax.jit(partial(positional_weights, grid=grid))(kernel, bias)
        reference.assert_close(weights, expected)
    rows, cols = jax.jit(partial(positional_factors, grid=grid))(kernel)
    assert rows.shape == (N, grid[0], grid[0])
    assert cols.shape == (N, grid[1], grid[1])
    reference.assert_close(rows.sum(axis=-1), np.ones((N, grid[0])), 1e-6)
    reference.assert_close(cols.sum(axis=-1), np.ones((N, grid[1])), 1e-6)
    product = np.stack([np.kron(r, c) for r, c in zip(rows, cols)])
    reference.assert_close(product, expected)


@pytest.mark.parametrize('impl', IMPLS)
def test_output_and_gradients_equal_the_loops(impl):
    inputs, grid = random_inputs((4, 9)), (4, 9)
    (cotangent,) = reference.random_arrays(1, inputs['query'].shape)
    expected, expected_grads = reference_output_and_gradients(inputs, cotangent, grid)
    out, grads = output_and_gradients(inputs, cotangent, grid, impl)
    reference.assert_close(out, expected)
    reference.assert_gradients_close(grads, expected_grads)


@pytest.mark.parametrize('impl', IMPLS)
def test_output_and_gradients_equal_the_loops_in_float64(impl):
    inputs, grid = random_inputs((2, 3)), (2, 3)
    (cotangent,) = reference.random_arrays(1, inputs['query'].shape)
    expected, expected_grads = reference_output_and_gradients(inputs, cotangent, grid)
    with jax.enable_x64(True):
        out, grads = output_and_gradients(inputs, cotangent, grid, impl, 'dense')
    assert out.dtype == np.float64
    reference.assert_close(out, expected, 1e-10)
    reference.assert_gradients_close(grads, expected_grads)


@pytest.mark.parametrize('grid', [(1, 1), (14, 14), (7, 31)])  # above: (4, 9)
def test_impls_agree(grid):
    inputs = random_inputs(grid)
    (cotangent,) = reference.random_arrays(1, inputs['query'].shape)
    expected, expected_grads = output_and_gradients(inputs, cotangent, grid, 'dense')
    for impl in ('factored', 'split'):
        out, grads = output_and_gradients(inputs, cotangent, grid, impl)
        reference.assert_close(out, expected)
        reference.assert_gradients_close(grads, expected_grads)


def test_weights_mix_content_and_position():
    inputs, grid = random_inputs((4, 9)), (4, 9)
    query, key, _, kernel, _, gating = inputs.values()
    del inputs['value']
    weights = jax.jit(partial(gpsa_weights, grid=grid))(**inputs)
    reference.assert_close(weights.sum(axis=-1), np.ones((B, N, 36)), 1e-6)
    expected = reference.gpsa_weights(query, key, kernel, gating, grid)
    reference.assert_close(weights, expected)


def test_position_matrix_is_not_formed_where_it_need_not_be():
    grid = (4, 9)
    inputs = random_inputs(grid)

    def position_matrices(impl):
        attend = partial(gated_positional_attention, grid=grid, impl=impl)
        jaxpr = str(jax.make_jaxpr(lambda inputs: attend(**inputs))(inputs))
        return len(re.findall(r'f32\[4,36,36\]', jaxpr))

    assert position_matrices('factored') == 0
    assert position_matrices('auto') == 0
    assert position_matrices('split') > 0


@pytest.mark.parametrize('impl', IMPLS)
def test_bfloat16_tokens_with_float32_gates(impl):
    grid = (4, 9)
    inputs = random_inputs(grid)
    expected, _ = reference_output_and_gradients(inputs, inputs['query'], grid)
    tokens = {name: jnp.bfloat16(inputs[name]) for name in NAMES[:3]}
    attend = partial(gated_positional_attention, grid=grid, impl=impl)
    out = jax.jit(attend)(**{**inputs, **tokens})
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), expected, atol=0.03)


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


@pytest.mark.parametrize('num_heads', [2, 3, 12, 15])
def test_conv_init_needs_a_square_number_of_heads(num_heads):
    message = f'needs a square number of heads.*not {num_heads}; .*local_init=False'
    with pytest.raises(UserError, match=message):
        conv_init(num_heads)
    x = jnp.zeros((1, 6, num_heads))
    with pytest.raises(UserError, match=message):
        reference.init_shapes(GPSA(num_heads, (2, 3)), x)
    reference.init_shapes(GPSA(num_heads, (2, 3), local_init=False), x)


def test_local_init_has_open_gates_identity_values_and_conv_positions():
    params = reference.init(
        GPSA(9, (2, 3), locality_strength=2.0), jnp.zeros((1, 6, 18))
    )
    np.testing.assert_array_equal(params['gating'], np.ones(9))
    np.testing.assert_array_equal(params['position_kernel'], conv_init(9, 2.0))
    np.testing.assert_array_equal(params['position_bias'], np.zeros(9))
    value = params['value']['kernel'].reshape(18, 18)
    np.testing.assert_array_equal(value, np.eye(18))
    assert set(params['value']) == {'kernel'}


def test_without_local_init_all_kernels_are_random():
    init = jax.nn.initializers.constant(0.25)
    module = GPSA(3, (2, 3), local_init=False, qkv_bias=True, kernel_init=init)
    params = reference.init(module, jnp.zeros((1, 6, 15)))
    for name in ('query', 'key', 'value', 'out'):
        assert np.all(np.asarray(params[name]['kernel']) == 0.25)
    np.testing.assert_array_equal(params['position_kernel'], np.full((3, 3), 0.25))
    np.testing.assert_array_equal(params['gating'], np.ones(3))
    np.testing.assert_array_equal(params['value']['bias'], np.zeros((3, 5)))


@pytest.mark.parametrize('impl', ['factored', 'dense'])
def test_nine_sharp_heads_are_a_convolution(impl):
    (rows, cols), width = (5, 7), 18
    module = GPSA(9, (rows, cols), locality_strength=100.0, impl=impl)
    (x,) = reference.random_arrays(2, (B, rows * cols, width))
    params = reference.init(module, x)
    params['gating'] = jnp.full(9, 30.0)
    out = reference.apply(module, params, x)

    image = x.reshape(B, rows, cols, 9, 2)
    kernel = np.float64(params['out']['kernel'])  # [9, 2, D]
    out = np.asarray(out).reshape(B, rows, cols, width)
    for row in range(1, rows - 1):
        for col in range(1, cols - 1):
            expected = 0.0
            for head, (dy, dx) in enumerate(neighbours(9)):
                neighbour = image[:, row + int(dy), col + int(dx), head]
                expected = expected + neighbour @ kernel[head]
            reference.assert_close(out[:, row, col], expected)


GRID = (3, 5)


def random_module(**kwargs):
    module = GPSA(N, GRID, **kwargs)
    (x,) = reference.random_arrays(3, (B, 15, N * H))
    return module, reference.random_params(module, x), x


@pytest.mark.parametrize('qkv_bias', [False, True])
def test_module_equals_the_loops(qkv_bias):
    module, params, x = random_module(qkv_bias=qkv_bias)
    out = reference.apply(module, params, x)
    expected = reference.gpsa(reference.float64(params), x, GRID)
    reference.assert_close(out, expected)


def test_sown_weights_reproduce_the_output():
    module, params, x = random_module()
    plain = reference.apply(module, params, x)
    out, sown = reference.apply(module, params, x, mutable='intermediates')
    (weights,) = sown['intermediates']['attention_weights']
    assert weights.shape == (B, N, 15, 15)
    reference.assert_close(weights.sum(axis=-1), np.ones((B, N, 15)), 1e-6)
    reference.assert_close(out, plain)
    params = reference.float64(params)
    value = reference.heads(params['value'], x)
    mixed = reference.apply_weights(np.float64(weights), value)
    reference.assert_close(plain, reference.merge(params['out'], mixed))


def test_dropout_of_the_weights_is_for_training_only():
    module, params, x = random_module(dropout_rate=0.5)
    plain = reference.apply(module, params, x)
    dropped, sown = reference.apply(
        module,
        params,
        x,
        train=True,
        rng=jax.random.key(1),
        mutable='intermediates',
    )
    assert np.all(np.isfinite(dropped))
    assert np.mean(dropped != plain) > 0.9
    (weights,) = sown['intermediates']['attention_weights']  # those before dropout
    reference.assert_close(weights.sum(axis=-1), np.ones((B, N, 15)), 1e-6)


def test_tokens_that_do_not_fill_the_grid_are_told():
    message = '35 tokens do not fill a grid of 4x9 = 36'
    inputs = random_inputs((5, 7))
    with pytest.raises(UserError, match=message):
        gated_positional_attention(**inputs, grid=(4, 9))
    del inputs['value']
    with pytest.raises(UserError, match=message):
        gpsa_weights(**inputs, grid=(4, 9))
    with pytest.raises(UserError, match=message):
        reference.init_shapes(GPSA(4, (4, 9)), jnp.zeros((1, 35, 8)))


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'impl': 'factord'}, "GPSA impl 'factord'; did you mean 'factored'"),
        ({'attention_impl': 'dens'}, "attention impl 'dens'; did you mean 'dense'"),
    ],
)
def test_unknown_impls_offer_the_nearest(kwargs, message):
    x = jnp.zeros((1, 6, 8))
    with pytest.raises(UserError, match=message):
        reference.init_shapes(GPSA(4, (2, 3), **kwargs), x)


def test_heads_that_do_not_divide_the_width_are_told():
    with pytest.raises(UserError, match='num_heads 4 does not divide the width 10'):
        reference.init_shapes(GPSA(4, (2, 3)), jnp.zeros((1, 6, 10)))
