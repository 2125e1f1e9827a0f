import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError
from vit_jax.layers.psa import (
    GPSA,
    PSA,
    gated_positional_attention,
    gpsa_weights,
)
from vit_jax.layers.relative import conv_init

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


def test_gates_start_as_they_are_told():
    module = GPSA(3, (2, 3), local_init=False, gating_init=0.0)
    params = reference.init(module, jnp.zeros((1, 6, 15)))
    np.testing.assert_array_equal(params['gating'], np.zeros(3))


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


# Scores of 0, 100 and 100.25 from the first of three tokens in a row: the last two are
# equal in bfloat16.
CLOSE_SCORES = np.float32([[149.875], [0.0], [-49.875]])


@pytest.mark.parametrize('impl', IMPLS)
def test_bfloat16_rounds_neither_gates_nor_positions(impl):
    tokens = jnp.zeros((1, 3, 1, 8), jnp.bfloat16)
    value = tokens.at[:, 2].set(1.0)
    attend = jax.jit(partial(gated_positional_attention, grid=(1, 3), impl=impl))
    open_gate = jnp.float32([30.0])
    out = attend(tokens, tokens, value, CLOSE_SCORES, None, open_gate)[0, 0, 0]
    np.testing.assert_allclose(np.float32(out), 1 / (1 + math.exp(-0.25)), rtol=0.005)

    # By position the first token sees itself only, so all that comes is content: the
    # small rest of a gate near one, which bfloat16 would round by a third.
    kernel, gating = jnp.float32([[0.0], [0.0], [-100.0]]), jnp.float32([5.0])
    out = attend(tokens, tokens, value, kernel, None, gating)[0, 0, 0]
    np.testing.assert_allclose(np.float32(out), 1 / 3 / (1 + math.exp(5)), rtol=0.005)


@pytest.mark.parametrize('impl', IMPLS)
def test_devices_that_share_a_batch_gather_none_of_it(impl):
    mesh = jax.make_mesh((8,), ('batch',), axis_types=(AxisType.Auto,))
    module = GPSA(N, GRID, impl=impl)
    x = jax.ShapeDtypeStruct((16, 15, N * H), jnp.float32)
    params = reference.init_shapes(module, x)

    def loss(params, x):
        return jnp.sum(module.apply({'params': params}, x) ** 2)

    shardings = [NamedSharding(mesh, spec) for spec in (P(), P('batch'))]
    grad = jax.jit(jax.grad(loss), in_shardings=shardings, out_shardings=shardings[0])
    program = grad.lower(params, x).compile().as_text()
    assert 'all-reduce' in program  # the gradients are summed
    assert 'all-gather' not in program


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


def test_sown_gates_are_those_after_the_sigmoid():
    module, params, x = random_module()
    _, sown = reference.apply(module, params, x, mutable='intermediates')
    (gates,) = sown['intermediates']['gates']
    expected = reference.sigmoid(np.float64(params['gating']))
    reference.assert_close(gates, expected, 1e-6)


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
    ('name', 'shape', 'message'),
    [
        ('gating', (3,), r'gating of 4 heads has shape \(4,\); got \(3,\)'),
        ('kernel', (3, 1), r'kernel of 4 heads has shape \(3, 4\); got \(3, 1\)'),
        ('bias', (1,), r'bias of 4 heads has shape \(4,\); got \(1,\)'),
        ('value', (B, 15, N, 5), 'query, key and value of one shape'),
        ('query', (15, N, H), 'query, key and value of one shape'),
    ],
)
def test_shapes_that_would_broadcast_are_told(name, shape, message):
    inputs = {**random_inputs(GRID), name: np.ones(shape)}
    for impl in IMPLS:
        with pytest.raises(UserError, match=message):
            gated_positional_attention(**inputs, grid=GRID, impl=impl)


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


PSA_FIELDS = {
    'quadratic': {'qkv_bias': True},
    'own sizes': {'head_dim': 7, 'out_dim': 11},
    'table': {'encoding': 'table', 'table_dim': 5},
}


def psa_reference(params, x):
    """Attention with the score v r of each offset added to the logits."""
    kernel = params['position_kernel']
    if 'position_table' in params:
        scores = np.zeros((15, 15, N))
        for i, j in np.ndindex(15, 15):
            dx, dy, _ = map(int, reference.relative_position(i, j, GRID))
            row = params['position_table'][GRID[0] - 1 + dy, GRID[1] - 1 + dx]
            scores[i, j] = row @ kernel
    else:
        scores = reference.relative_positions(GRID) @ kernel
    bias = np.moveaxis(scores, -1, 0)
    return reference.multi_head_attention(params, x, bias=bias)


@pytest.mark.parametrize('impl', ['xla', 'chunked', 'dense'])
@pytest.mark.parametrize('case', PSA_FIELDS)
def test_psa_equals_the_loops(case, impl):
    fields = PSA_FIELDS[case]
    module = PSA(N, GRID, impl=impl, **fields)
    (x,) = reference.random_arrays(3, (B, 15, N * H))
    params = reference.random_params(module, x)
    out = reference.apply(module, params, x)
    assert out.shape == (B, 15, fields.get('out_dim', N * H))
    reference.assert_close(out, psa_reference(reference.float64(params), x))
    sown_out, sown = reference.apply(module, params, x, mutable='intermediates')
    reference.assert_close(sown_out, out)
    (weights,) = sown['intermediates']['attention_weights']
    reference.assert_close(weights.sum(axis=-1), np.ones((B, N, 15)), 1e-6)


@pytest.mark.parametrize('impl', ['xla', 'chunked', 'dense'])
def test_psa_in_bfloat16_keeps_its_positions_in_float32(impl):
    module = PSA(N, GRID, dtype=jnp.bfloat16, impl=impl)
    (x,) = reference.random_arrays(3, (B, 15, N * H))
    params = reference.random_params(module, x)
    out = reference.apply(module, params, jnp.bfloat16(x))
    assert out.dtype == jnp.bfloat16
    expected = psa_reference(reference.float64(params), x)
    np.testing.assert_allclose(np.float32(out), expected, atol=0.05)


@pytest.mark.parametrize('impl', ['xla', 'chunked', 'dense'])
def test_psa_in_bfloat16_does_not_round_its_scores(impl):
    module = PSA(1, (1, 3), dtype=jnp.bfloat16, impl=impl)
    x = jnp.bfloat16([[[0.0], [0.0], [1.0]]])
    params = jax.tree.map(jnp.zeros_like, reference.random_params(module, x))
    params['value']['kernel'] = params['out']['kernel'] = jnp.ones((1, 1, 1))
    params['position_kernel'] = CLOSE_SCORES
    out = reference.apply(module, params, x)[0, 0]
    np.testing.assert_allclose(np.float32(out), 1 / (1 + math.exp(-0.25)), rtol=0.005)


def test_psa_dropout_of_the_weights_is_for_training_only():
    module = PSA(N, GRID, dropout_rate=0.5)
    (x,) = reference.random_arrays(3, (B, 15, N * H))
    params = reference.random_params(module, x)
    plain = reference.apply(module, params, x)
    reference.assert_close(plain, psa_reference(reference.float64(params), x))
    rng = jax.random.key(1)
    assert (
        np.mean(reference.apply(module, params, x, train=True, rng=rng) != plain) > 0.9
    )


def test_psa_starts_local_when_asked():
    x = jnp.zeros((1, 15, 36))
    params = reference.init(PSA(9, GRID, local_init=True, locality_strength=2.0), x)
    np.testing.assert_array_equal(params['position_kernel'], conv_init(9, 2.0))
    params = reference.init(PSA(9, GRID), x)
    assert np.any(params['position_kernel'] != conv_init(9))


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'encoding': 'tabel'}, "PSA encoding 'tabel'; did you mean 'table'"),
        ({'local_init': True, 'encoding': 'table'}, "needs encoding='quadratic'"),
        ({'local_init': True, 'num_heads': 6}, 'a square number of heads.*not 6'),
        ({'num_heads': 5}, 'num_heads 5 does not divide the width 12'),
        ({'grid': (4, 4)}, '15 tokens do not fill a grid of 4x4'),
    ],
)
def test_psa_tells_what_does_not_fit(fields, message):
    module = PSA(**{'num_heads': N, 'grid': GRID, **fields})
    with pytest.raises(UserError, match=message):
        reference.init_shapes(module, jnp.zeros((1, 15, 12)))


def test_psa_table_of_another_grid_is_told():
    x = jnp.zeros((1, 15, 12))
    params = reference.init(PSA(N, (3, 5), encoding='table'), x)
    message = '8 features on a grid of 3x5 tokens; this layer has 8 on 5x3'
    with pytest.raises(UserError, match=message):
        PSA(N, (5, 3), encoding='table').apply({'params': params}, x)
