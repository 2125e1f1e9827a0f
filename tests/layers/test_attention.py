import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from vit_jax.errors import UserError
from vit_jax.layers import attention
from vit_jax.layers.attention import (
    MultiHeadAttention,
    apply_weights,
    attention_weights,
    causal_mask,
    dot_product_attention,
    padding_mask,
)

IMPLS = ('xla', 'chunked', 'dense')
B, T, S, N, H = 2, 11, 5, 3, 7
LONG = 521  # three blocks of queries, the last one almost empty


def qkv(length=T, source=S, seed=0):
    return reference.random_arrays(
        seed, (B, length, N, H), (B, source, N, H), (B, source, N, H)
    )


def random_mask(*shape):
    """Boolean; the last row of the first example, where it has one, keeps no key."""
    mask = np.random.default_rng(3).random(shape) < 0.6
    mask[(0,) * (len(shape) - 2) + (-1,)] = False
    return mask


PADDING = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]], bool).reshape(B, 1, 1, S)
CAUSAL = np.tril(np.ones((T, S), bool))[None, None]
TERMS = {
    'plain': {},
    'bias': {'bias': (B, N, T, S)},
    'key padding': {'mask': PADDING},
    'full mask': {'mask': random_mask(B, N, T, S)},
    'mask by query': {'mask': random_mask(T, 1)},
    'bias shared by queries, causal': {'bias': (N, 1, S), 'mask': CAUSAL},
    'bias of two axes, key padding': {'bias': (T, S), 'mask': PADDING},
    'causal': {'causal': True},
    'causal, bias, key padding': {'bias': (N, T, S), 'mask': PADDING, 'causal': True},
    'causal, full mask': {'mask': random_mask(B, N, T, S), 'causal': True},
}


def make_terms(name):
    terms = dict(TERMS[name])
    if 'bias' in terms:
        (terms['bias'],) = reference.random_arrays(4, terms['bias'])
    return terms


def check_against_reference(impl, arrays, terms, dtype=np.float32):
    """The output, and the gradients of query, key, value and bias."""
    cotangent = np.random.default_rng(5).normal(size=arrays[0].shape).astype(dtype)
    mask, causal = terms.get('mask', True), terms.get('causal', False)
    if causal:
        mask = mask & np.tril(np.ones((arrays[0].shape[1], arrays[1].shape[1]), bool))
    bias = terms.get('bias', 0.0)
    out, weights = reference.attention(*arrays, bias=bias, mask=mask)
    grads = reference.attention_gradients(*arrays, weights, np.float64(cotangent))
    expected = dict(zip(('query', 'key', 'value'), grads))
    inputs = dict(zip(('query', 'key', 'value'), arrays))
    if 'bias' in terms:
        inputs['bias'] = terms['bias']
        expected['bias'] = sum_to(grads[3], terms['bias'].shape)

    @jax.jit
    def run(inputs, cotangent):
        def attend(inputs):
            return dot_product_attention(**{**terms, **inputs}, impl=impl)

        actual, vjp = jax.vjp(attend, inputs)
        return actual, *vjp(cotangent)

    inputs = {name: jnp.asarray(x, dtype) for name, x in inputs.items()}
    actual, grads = run(inputs, cotangent)
    assert actual.dtype == dtype
    reference.assert_close(actual, out, 1e-5 if dtype == np.float32 else 1e-10)
    reference.assert_gradients_close(grads, expected)


def sum_to(x, shape):
    """Sums the axes that broadcasting made longer."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return x.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)


@pytest.mark.parametrize('terms', TERMS)
@pytest.mark.parametrize('impl', IMPLS)
def test_output_and_gradients_equal_the_loops(impl, terms):
    check_against_reference(impl, qkv(), make_terms(terms))


@pytest.mark.parametrize(
    ('impl', 'length'), [('xla', 1), ('dense', 1), ('chunked', 1), ('chunked', LONG)]
)
def test_any_number_of_queries(impl, length):
    (bias,) = reference.random_arrays(4, (B, 1, length, S))
    terms = {'bias': bias, 'mask': random_mask(1, N, length, S)}
    check_against_reference(impl, qkv(length), terms)
    check_against_reference(impl, qkv(length), {'causal': True})


@pytest.mark.parametrize('terms', ['bias', 'full mask'])
@pytest.mark.parametrize('impl', ['chunked', 'dense'])  # 'xla' has a float32 softmax
def test_float64_is_float64_throughout(impl, terms):
    with jax.enable_x64(True):
        check_against_reference(impl, qkv(), make_terms(terms), np.float64)


@pytest.mark.parametrize('impl', IMPLS)
def test_row_that_keeps_no_key_is_zero_with_zero_gradient(impl):
    query, key, value = map(jnp.float32, qkv())
    value = value + 100.0  # an average of values would show
    mask = np.ones((B, N, T, S), bool)
    mask[1, 2, 3] = False

    def row(query, key, value):
        out = dot_product_attention(query, key, value, mask=mask, impl=impl)
        return jnp.sum(out[1, 3, 2])

    grad = jax.jit(jax.value_and_grad(row, argnums=(0, 1, 2)))
    total, grads = grad(query, key, value)
    assert total == 0.0
    for grad in grads:
        np.testing.assert_array_equal(grad, np.zeros_like(grad))


def test_row_that_keeps_no_key_is_not_even_nan_on_the_way():
    x = jnp.ones((1, 1, 1, H))
    with jax.debug_nans(True):  # looks at each operation
        weights = attention_weights(x, x, mask=jnp.zeros((1, 1), bool))
    assert weights == 0.0


@pytest.mark.parametrize('impl', IMPLS)
def test_bfloat16_has_a_float32_softmax(impl):
    # Logits of 100 and 100.25: equal in bfloat16, whose steps there are 0.5.
    query = jnp.bfloat16([16.0, 0.5, 0.0, 0.0]).reshape(1, 1, 1, 4)
    key = jnp.bfloat16([[12.5, 0, 0, 0], [12.5, 1, 0, 0]]).reshape(1, 2, 1, 4)
    value = jnp.bfloat16([[0] * 4, [1] * 4]).reshape(1, 2, 1, 4)
    attend = jax.jit(partial(dot_product_attention, impl=impl))
    out = attend(query, key, value)
    assert out.dtype == jnp.bfloat16
    expected = 1 / (1 + math.exp(-0.25))
    np.testing.assert_allclose(np.float32(out), expected, atol=0.004)


def test_weights_are_float32_and_apply_to_the_values():
    arrays = qkv()
    query, key, _ = map(jnp.bfloat16, arrays)
    weights = jax.jit(attention_weights)(query, key, mask=PADDING)
    assert weights.dtype == jnp.float32
    sums = np.broadcast_to([[[1.0]], [[0.0]]], (B, N, T))
    reference.assert_close(weights.sum(axis=-1), sums, 1e-6)
    expected, weights = reference.attention(*arrays)
    out = apply_weights(jnp.float32(weights), jnp.float32(arrays[2]))
    reference.assert_close(out, expected)


def test_bias_of_bfloat16_attention_stays_float32():
    # 100 and 100.25 are equal in bfloat16; both queries and keys are zero.
    x = jnp.zeros((1, 2, 1, 4), jnp.bfloat16)
    bias = jnp.float32([100.0, 100.25]).reshape(1, 1, 1, 2)
    weights = jax.jit(attention_weights)(x, x, bias=bias)
    expected = 1 / (1 + math.exp(-0.25))
    np.testing.assert_allclose(weights[0, 0, :, 1], expected, atol=1e-6)


@pytest.mark.parametrize('impl', ['auto', *IMPLS])
def test_the_result_has_the_dtype_of_the_query(impl):
    query, key, value = map(jnp.float32, qkv())
    attend = jax.jit(partial(dot_product_attention, impl=impl))
    assert attend(jnp.bfloat16(query), key, value).dtype == jnp.bfloat16
    out = attend(query, jnp.bfloat16(key), jnp.bfloat16(value))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, attend(query, key, value), atol=0.05)


@pytest.mark.parametrize('impl', ['auto', 'chunked', 'dense'])
def test_values_may_be_larger_than_keys(impl):
    query, key, _ = qkv()
    (value,) = reference.random_arrays(9, (B, S, N, 13))
    out = jax.jit(partial(dot_product_attention, impl=impl))(query, key, value)
    weights = reference.attention(query, key, key)[1]
    expected = np.einsum('bnts,bsnh->btnh', weights, value)
    reference.assert_close(out, expected)


def test_values_larger_than_keys_are_not_for_the_library():
    query, key, _ = map(jnp.float32, qkv())
    with pytest.raises(UserError, match=r"'xla' needs values as large as keys, not"):
        dot_product_attention(query, key, jnp.zeros((B, S, N, 13)), impl='xla')


class Gpu:
    def __init__(self, compute_capability):
        self.compute_capability = compute_capability


def pretend_gpu(monkeypatch, compute_capability):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(jax, 'devices', lambda: [Gpu(compute_capability)])


@pytest.mark.parametrize(
    ('capability', 'impl'), [('8.0', 'cudnn'), ('12.0', 'cudnn'), ('7.5', 'xla')]
)
def test_auto_takes_cudnn_where_it_runs(monkeypatch, capability, impl):
    pretend_gpu(monkeypatch, capability)
    x = jax.ShapeDtypeStruct((2, 3, 5, 64), jnp.bfloat16)
    assert attention.auto_impl(x, x) == impl


def test_an_amd_gpu_has_no_cudnn(monkeypatch):
    pretend_gpu(monkeypatch, 'gfx90a')
    x = jnp.zeros((B, T, N, 64), jnp.bfloat16)
    assert attention.auto_impl(x, x) == 'xla'
    with pytest.raises(UserError, match=r"'cudnn' needs an NVIDIA GPU .* use 'auto'"):
        dot_product_attention(x, x, x, impl='cudnn')


def test_cudnn_is_given_every_term(monkeypatch):
    """What jax.nn would be called with on a GPU, computed by its other kernel."""
    pretend_gpu(monkeypatch, '9.0')
    called, real = [], jax.nn.dot_product_attention

    def spy(*args, implementation, **kwargs):
        called.append(implementation)
        return real(*args, **kwargs, implementation='xla')

    monkeypatch.setattr(jax.nn, 'dot_product_attention', spy)
    arrays = [jnp.float32(x) for x in qkv()]
    for terms in ({'bias': (B, N, T, S), 'mask': PADDING}, {'causal': True}):
        given = dict(terms)
        if 'bias' in given:
            (given['bias'],) = map(
                jnp.float32, reference.random_arrays(4, given['bias'])
            )
        out = dot_product_attention(*arrays, **given, impl='cudnn')
        expected = dot_product_attention(*arrays, **given, impl='dense')
        reference.assert_close(out, expected)
    assert called == ['cudnn', 'cudnn']


def test_what_cudnn_does_not_do_is_told(monkeypatch):
    pretend_gpu(monkeypatch, '9.0')

    def refuse(*args, **kwargs):
        raise NotImplementedError('Q must be fp16/bf16')

    monkeypatch.setattr(jax.nn, 'dot_product_attention', refuse)
    x = jnp.zeros((B, T, N, H))
    with pytest.raises(UserError, match="'cudnn': Q must be fp16/bf16; use 'auto'"):
        dot_product_attention(x, x, x, impl='cudnn')


def test_cudnn_without_a_gpu_is_told():
    x = jnp.zeros((B, T, N, H), jnp.bfloat16)
    with pytest.raises(UserError, match=r"'cudnn' needs an NVIDIA GPU"):
        dot_product_attention(x, x, x, impl='cudnn')


@pytest.mark.parametrize('impl', IMPLS)
def test_no_queries_give_no_rows(impl):
    query, key, value = map(jnp.float32, qkv(length=2))
    out = dot_product_attention(query[:, :0], key, value, impl=impl)
    assert out.shape == (B, 0, N, H)


@pytest.mark.parametrize(
    ('backend', 'dtype', 'head_dim', 'source', 'terms', 'expected'),
    [
        ('cpu', 'float32', 64, 768, '', 'dense'),
        ('cpu', 'float32', 64, 769, '', 'chunked'),
        ('cpu', 'bfloat16', 64, 196, 'mask', 'dense'),
        ('tpu', 'bfloat16', 64, 1024, '', 'xla'),
        ('tpu', 'bfloat16', 64, 1025, 'mask', 'chunked'),
        ('gpu', 'bfloat16', 64, 196, '', 'cudnn'),
        ('gpu', 'float16', 128, 4096, '', 'cudnn'),
        ('gpu', 'bfloat16', 136, 196, '', 'xla'),
        ('gpu', 'bfloat16', 60, 196, '', 'xla'),
        ('gpu', 'float32', 64, 1024, '', 'xla'),
        ('gpu', 'float32', 64, 1025, '', 'chunked'),
        ('gpu', 'bfloat16', 64, 196, 'bias', 'xla'),
        ('gpu', 'bfloat16', 64, 196, 'mask', 'xla'),
        ('gpu', 'bfloat16', 64, 4096, 'mask', 'chunked'),
    ],
)
def test_auto_chooses_by_platform_dtype_and_length(
    monkeypatch, backend, dtype, head_dim, source, terms, expected
):
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    monkeypatch.setattr(jax, 'devices', lambda: [Gpu('9.0')])
    query = jax.ShapeDtypeStruct((2, 3, 5, head_dim), dtype)
    key = jax.ShapeDtypeStruct((2, source, 5, head_dim), dtype)
    term = jax.ShapeDtypeStruct((1, 1, 1, source), dtype)
    kwargs = {terms: term} if terms else {}
    assert attention.auto_impl(query, key, **kwargs) == expected


@pytest.mark.parametrize(('source', 'blocks'), [(768, False), (769, True)])
def test_auto_is_what_runs(source, blocks):
    shapes = [jax.ShapeDtypeStruct(x, jnp.float32) for x in [(1, 2, 3, 5)]]
    shapes += [jax.ShapeDtypeStruct((1, source, 3, 5), jnp.float32)] * 2
    jaxpr = str(jax.make_jaxpr(dot_product_attention)(*shapes))
    assert ('scan[' in jaxpr) == blocks


def test_chunked_never_holds_all_the_weights():
    source = 523
    query = jax.ShapeDtypeStruct((B, LONG, N, H), jnp.float32)
    key = jax.ShapeDtypeStruct((B, source, N, H), jnp.float32)
    mask = jax.ShapeDtypeStruct((B, 1, 1, source), jnp.bool_)

    def loss(query, key, value, mask, impl):
        out = dot_product_attention(query, key, value, mask=mask, impl=impl)
        return jnp.sum(out**2)

    def largest(impl):
        grad = jax.grad(lambda *args: loss(*args, impl), argnums=(0, 1, 2))
        jaxpr = str(jax.make_jaxpr(grad)(query, key, key, mask))
        shapes = re.findall(r'\w\[([\d,]+)\]', jaxpr)
        return max(math.prod(map(int, shape.split(','))) for shape in shapes)

    assert largest('dense') == B * N * LONG * source
    assert largest('chunked') <= B * N * 256 * source


ERRORS = {
    'query of three axes': (
        {'query': (B, T, H)},
        r'takes query \[B, T, N, H\].*got \(2, 11, 7\)',
    ),
    'key of three axes': ({'key': (S, N, H)}, r'takes query \[B, T, N, H\]'),
    'value of five axes': ({'value': (1, B, S, N, H)}, r'takes query \[B, T, N, H\]'),
    'other batch': (
        {'key': (1, S, N, H), 'value': (1, S, N, H)},
        r'shape \(2, S, 3, 7\); got \(1, 5, 3, 7\) and \(1, 5, 3, 7\)',
    ),
    'other heads': ({'key': (B, S, 1, H)}, r'needs key and value of shape'),
    'other head size': ({'key': (B, S, N, 1)}, r'needs key and value of shape'),
    'more keys than values': (
        {'value': (B, 1, N, H)},
        r'needs key and value of shape.*and \(2, 1, 3, 7\)',
    ),
    'fewer heads of values': ({'value': (B, S, 1, H)}, r'and \(2, 5, 1, 7\)'),
    'bias': (
        {'bias': (B, N, S, T)},
        r'bias of shape \(2, 3, 5, 11\) does not broadcast to .* \(2, 3, 11, 5\)',
    ),
    'bias of five axes': ({'bias': (1, B, N, T, S)}, 'bias of shape'),
    'mask': ({'mask': (B, S)}, r'mask of shape \(2, 5\) does not broadcast'),
}


@pytest.mark.parametrize('case', ERRORS)
def test_shapes_that_do_not_fit_are_told(case):
    wrong, message = ERRORS[case]
    shapes = {'query': (B, T, N, H), 'key': (B, S, N, H), 'value': (B, S, N, H)}
    dtypes = {'mask': bool}
    inputs = {
        name: jnp.zeros(shape, dtypes.get(name, jnp.float32))
        for name, shape in {**shapes, **wrong}.items()
    }
    with pytest.raises(UserError, match=message):
        dot_product_attention(**inputs)


def test_padding_mask_keeps_keys_for_every_head_and_query():
    keep = jnp.asarray(PADDING.reshape(B, S))
    np.testing.assert_array_equal(padding_mask(keep), PADDING)


def test_causal_mask_counts_from_the_offset():
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    np.testing.assert_array_equal(causal_mask(2, 5, offset=2), np.array(expected, bool))


def test_mask_must_be_boolean():
    x = jnp.zeros((B, T, N, H))
    with pytest.raises(UserError, match=r'must be boolean, True = keep; got int32'):
        dot_product_attention(x, x, x, mask=jnp.ones((T, T), jnp.int32))


def test_unknown_impl_offers_the_nearest():
    x = jnp.zeros((B, T, N, H))
    with pytest.raises(UserError, match=r"attention impl 'chunk'.*mean 'chunked'\?"):
        dot_product_attention(x, x, x, impl='chunk')


MODULES = {
    'self': (MultiHeadAttention(N), (B, T, N * H), None),
    'cross': (MultiHeadAttention(N), (B, T, N * H), (B, S, 13)),
    'head_dim': (MultiHeadAttention(N, head_dim=H), (B, T, 17), None),
    'no bias': (MultiHeadAttention(N, qkv_bias=False), (B, T, N * H), (B, S, 13)),
}


def module_inputs(x_shape, kv_shape):
    shapes = [shape for shape in (x_shape, kv_shape) if shape is not None]
    return reference.random_arrays(6, *shapes)


@pytest.mark.parametrize('case', MODULES)
def test_module_equals_the_loops(case):
    module, *shapes = MODULES[case]
    inputs = module_inputs(*shapes)
    params = reference.random_params(module, *inputs)
    out = reference.apply(module, params, *inputs)
    expected = reference.multi_head_attention(reference.float64(params), *inputs)
    reference.assert_close(out, expected)


def test_causal_module_equals_the_loops():
    module = MultiHeadAttention(N, causal=True)
    (x,) = module_inputs((B, T, N * H), None)
    params = reference.random_params(module, x)
    out = reference.apply(module, params, x)
    mask = np.tril(np.ones((T, T), bool))
    expected = reference.multi_head_attention(reference.float64(params), x, mask=mask)
    reference.assert_close(out, expected)
    sown, _ = reference.apply(module, params, x, mutable='intermediates')
    reference.assert_close(sown, expected)


def test_head_size_is_width_by_heads_unless_given():
    x = jnp.zeros((B, T, N * H))
    params = reference.random_params(MultiHeadAttention(N), x)
    assert params['query']['kernel'].shape == (N * H, N, H)
    params = reference.random_params(MultiHeadAttention(N, head_dim=5), x)
    assert params['query']['kernel'].shape == (N * H, N, 5)
    assert params['out']['kernel'].shape == (N, 5, N * H)


def test_qkv_bias_leaves_the_output_its_bias():
    module = MultiHeadAttention(N, qkv_bias=False)
    params = reference.random_params(module, jnp.zeros((B, T, N * H)))
    assert [name for name in params if 'bias' in params[name]] == ['out']


def test_sown_weights_reproduce_the_output():
    module, *shapes = MODULES['cross']
    inputs = module_inputs(*shapes)
    (bias,) = reference.random_arrays(7, (N, T, S))
    terms = {'bias': bias, 'mask': PADDING}
    params = reference.random_params(module, *inputs)
    plain = reference.apply(module, params, *inputs, **terms)
    out, sown = reference.apply(
        module, params, *inputs, **terms, mutable='intermediates'
    )
    (weights,) = sown['intermediates']['attention_weights']
    assert weights.shape == (B, N, T, S)
    reference.assert_close(weights.sum(axis=-1), PADDING.any(-1) * np.ones((B, N, T)))
    reference.assert_close(out, plain)
    params = reference.float64(params)
    value = reference.heads(params['value'], inputs[1])
    mixed = reference.apply_weights(np.float64(weights), value)
    reference.assert_close(out, reference.merge(params['out'], mixed))
    expected = reference.multi_head_attention(params, *inputs, **terms)
    reference.assert_close(plain, expected)


def test_dropout_drops_weights_and_scales_the_others_in_training_only():
    # One head whose values and output are the identity on one-hot tokens: the
    # output is the rows of weights, uniform where queries are zero.
    size = 211
    module = MultiHeadAttention(1, dropout_rate=0.25)
    x = jnp.eye(size)[None]
    params = jax.tree.map(jnp.zeros_like, reference.random_params(module, x))
    params['value']['kernel'] = jnp.eye(size).reshape(size, 1, size)
    params['out']['kernel'] = jnp.eye(size).reshape(1, size, size)
    uniform = np.full((1, size, size), 1 / size)
    reference.assert_close(reference.apply(module, params, x), uniform)
    out = reference.apply(module, params, x, train=True, rng=jax.random.key(1))
    dropped = np.asarray(out) == 0
    reference.assert_close(out[~dropped] * size, np.full(np.sum(~dropped), 4 / 3))
    assert abs(dropped.mean() - 0.25) < 0.01


def test_module_passes_its_impl_on():
    x = jnp.zeros((B, T, N * H))
    with pytest.raises(UserError, match="'dens'; did you mean 'dense'"):
        reference.init_shapes(MultiHeadAttention(N, impl='dens'), x)


@pytest.mark.parametrize('fields', [{'num_heads': 0}, {'head_dim': 0}])
def test_sizes_of_nothing_are_told(fields):
    module = MultiHeadAttention(**{'num_heads': N, **fields})
    with pytest.raises(UserError, match=f'{next(iter(fields))} must be above 0, not 0'):
        reference.init_shapes(module, jnp.zeros((B, T, N * H)))


def test_weights_are_sown_before_dropout():
    module = MultiHeadAttention(N, dropout_rate=0.5)
    (x,) = module_inputs((B, T, N * H), None)
    params = reference.random_params(module, x)
    kwargs = {'train': True, 'rng': jax.random.key(1), 'mutable': 'intermediates'}
    _, sown = reference.apply(module, params, x, **kwargs)
    (weights,) = sown['intermediates']['attention_weights']
    reference.assert_close(weights.sum(axis=-1), np.ones((B, N, T)))


def test_heads_that_do_not_divide_the_width_are_told():
    message = 'num_heads 3 does not divide the width 20'
    with pytest.raises(UserError, match=message):
        reference.init_shapes(MultiHeadAttention(3), jnp.zeros((B, T, 20)))
