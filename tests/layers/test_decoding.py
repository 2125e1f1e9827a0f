"""Decoding with a cache gives what one pass over all tokens gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from vit_jax.errors import UserError
from vit_jax.layers.attention import MultiHeadAttention
from vit_jax.layers.blocks import DecoderBlock

B, T, S, N, D = 2, 7, 5, 3, 12


def make_attention(**kwargs):
    module = MultiHeadAttention(N, causal=True, cache_length=T, **kwargs)
    x, bias = reference.random_arrays(0, (B, T, D), (N, T, T))
    return module, reference.random_params(module, x), np.float32(x), np.float32(bias)


def decode(module, params, parts, *args, **kwargs):
    """Outputs of calls that each take the next tokens, and the cache."""
    variables, outs = {'params': params}, []
    step = jax.jit(partial(module.apply, decode=True, mutable=['cache'], **kwargs))
    for part in parts:
        out, cache = step(variables, part, *args)
        variables = {'params': params, **cache}
        outs.append(out)
    return np.concatenate(outs, axis=1), cache['cache']


@pytest.mark.parametrize('lengths', [(1,) * T, (T,), (3, 1, 1, 1, 1), (2, 5), (1, 4)])
def test_any_prompt_length_equals_the_full_pass(lengths):
    module, params, x, _ = make_attention()
    used = sum(lengths)
    parts = np.split(x[:, :used], np.cumsum(lengths)[:-1], axis=1)
    out, cache = decode(module, params, parts)
    whole = reference.apply(module, params, x[:, :used])
    reference.assert_close(out, whole, 1e-6)
    assert cache['cache_index'] == used
    assert cache['cached_key'].shape == (B, T, N, D // N)
    np.testing.assert_array_equal(cache['cached_key'][:, used:], 0.0)


def test_mask_and_bias_are_those_of_the_cache():
    module, params, x, bias = make_attention()
    keep = np.ones((B, 1, 1, T), bool)
    keep[1, ..., :2] = False  # a prompt padded on the left
    whole = reference.apply(module, params, x, bias=bias, mask=keep)
    for t in range(T):
        # The rows of the new token, the columns of the whole cache.
        if t == 0:
            variables = {'params': params}
        out, cache = module.apply(
            variables,
            x[:, t : t + 1],
            bias=bias[:, t : t + 1],
            mask=keep,
            decode=True,
            mutable=['cache'],
        )
        variables = {'params': params, **cache}
        reference.assert_close(out, whole[:, t : t + 1], 1e-6)


def test_init_makes_an_empty_cache():
    module, params, x, _ = make_attention()
    cache = module.init(jax.random.key(0), x[:, :3], decode=True)['cache']
    assert cache['cache_index'] == 0
    np.testing.assert_array_equal(cache['cached_value'], 0.0)
    out, _ = module.apply(
        {'params': params, 'cache': cache}, x[:, :3], decode=True, mutable=['cache']
    )
    reference.assert_close(out, reference.apply(module, params, x[:, :3]), 1e-6)


def test_the_cache_has_the_dtype_of_the_computation():
    module, params, x, _ = make_attention(dtype=jnp.bfloat16)
    _, cache = decode(module, params, [x[:, :2]])
    assert cache['cached_key'].dtype == jnp.bfloat16


def test_weights_are_sown_while_decoding():
    module, params, x, _ = make_attention()
    _, cache = module.apply({'params': params}, x[:, :2], decode=True, mutable='cache')
    _, sown = module.apply(
        {'params': params, **cache},
        x[:, 2:4],
        decode=True,
        mutable=['cache', 'intermediates'],
    )
    (weights,) = sown['intermediates']['attention_weights']
    assert weights.shape == (B, N, 2, T)
    reference.assert_close(weights.sum(-1), np.ones((B, N, 2)))
    np.testing.assert_array_equal(weights[:, :, 0, 3:], 0.0)
    assert np.all(weights[:, :, 1, :4] > 0)


def test_tokens_past_the_cache_are_nan_not_wrong():
    module, params, x, _ = make_attention()
    out, _ = decode(module, params, [x[:, :5], x[:, :1], x[:, :1], x[:, :1]])
    assert np.all(np.isfinite(out[:, :T]))
    assert np.all(np.isnan(out[:, T:]))


def test_a_prompt_longer_than_the_cache_is_told():
    module, params, x, _ = make_attention()
    with pytest.raises(UserError, match='14 tokens do not fit cache_length 7'):
        decode(module, params, [np.tile(x, (1, 2, 1))])


@pytest.mark.parametrize('fields', [{'causal': True}, {'cache_length': 5}])
def test_decoding_without_causal_or_length_is_told(fields):
    module, x = MultiHeadAttention(N, **fields), jnp.zeros((B, T, D))
    with pytest.raises(UserError, match='needs causal=True and cache_length'):
        module.init(jax.random.key(0), x, decode=True)


def test_a_cache_of_another_batch_is_told():
    module, params, x, _ = make_attention()
    _, cache = decode(module, params, [x[:, :2]])
    variables = {'params': params, 'cache': cache}
    with pytest.raises(UserError, match=r'the cache has shape \(2, 7, 3, 4\)'):
        module.apply(variables, x[:1, :2], decode=True, mutable=['cache'])


def test_a_mask_of_another_shape_is_told():
    module, params, x, _ = make_attention()
    mask = np.ones((B, 1, 1, 5), bool)
    message = r'mask of shape \(2, 1, 1, 5\) does not broadcast.* \(2, 3, 2, 7\)'
    with pytest.raises(UserError, match=message):
        decode(module, params, [x[:, :2]], mask=mask)


def test_source_of_cross_attention_is_projected_at_the_first_call_only():
    module = MultiHeadAttention(N)
    x, source = reference.random_arrays(1, (B, T, D), (B, S, 11))
    params = reference.random_params(module, x, source)
    whole = reference.apply(module, params, x, source)
    out, cache = module.apply(
        {'params': params}, x[:, :3], source, decode=True, mutable=['cache']
    )
    variables = {'params': params, **cache}
    rest, _ = module.apply(
        variables, x[:, 3:], np.full_like(source, np.nan), decode=True, mutable='cache'
    )
    reference.assert_close(np.concatenate([out, rest], axis=1), whole, 1e-6)


def test_init_remembers_no_source():
    module = MultiHeadAttention(N)
    x, source = reference.random_arrays(1, (B, T, D), (B, S, 11))
    params = reference.random_params(module, x, source)
    dummy = np.zeros_like(source)
    made = module.init(jax.random.key(0), x, dummy, decode=True)
    variables = {**made, 'params': params}
    out, _ = module.apply(variables, x, source, decode=True, mutable=['cache'])
    reference.assert_close(out, reference.apply(module, params, x, source), 1e-6)


def test_a_source_of_another_size_is_told():
    module = MultiHeadAttention(N)
    x, source = reference.random_arrays(1, (B, T, D), (B, S, 11))
    params = reference.random_params(module, x, source)
    _, cache = module.apply(
        {'params': params}, x, source, decode=True, mutable=['cache']
    )
    variables = {'params': params, **cache}
    with pytest.raises(UserError, match=r'\(2, 5\); this one has \(2, 4\)'):
        module.apply(variables, x, source[:, :4], decode=True, mutable=['cache'])


def test_causal_is_for_self_attention_only():
    module = MultiHeadAttention(N, causal=True, cache_length=T)
    x, source = reference.random_arrays(1, (B, T, D), (B, S, 11))
    params = reference.random_params(module, x, source)
    whole = reference.apply(module, params, x, source)
    expected = reference.multi_head_attention(reference.float64(params), x, source)
    reference.assert_close(whole, expected)
    out, _ = decode(module, params, [x[:, :3], x[:, 3:]], source)
    reference.assert_close(out, whole, 1e-6)


@pytest.mark.parametrize('norm_first', [True, False])
@pytest.mark.parametrize('lengths', [(1,) * T, (4, 2, 1)])
def test_decoder_block_decodes_as_in_one_pass(norm_first, lengths):
    attention = partial(MultiHeadAttention, num_heads=N, cache_length=T)
    block = DecoderBlock(attention, 13, norm_first=norm_first)
    x, encoded = reference.random_arrays(2, (B, T, D), (B, S, 11))
    cross_mask = np.ones((B, 1, 1, S), bool)
    cross_mask[0, ..., 3:] = False
    params = reference.random_params(block, x, encoded)
    whole = reference.apply(block, params, x, encoded, cross_mask=cross_mask)
    parts = np.split(x, np.cumsum(lengths)[:-1], axis=1)
    out, cache = decode(block, params, parts, encoded, cross_mask=cross_mask)
    assert set(cache) == {'self_attention', 'cross_attention'}
    reference.assert_close(out, whole, 2e-6)


def test_decoding_computes_nothing_again():
    attention = partial(MultiHeadAttention, num_heads=N, cache_length=T)
    block = DecoderBlock(attention, 13, remat='full')
    x, encoded = reference.random_arrays(2, (B, T, D), (B, S, 11))
    params = reference.random_params(block, x, encoded)
    whole = reference.apply(block, params, x, encoded)
    parts = np.split(x, [3, 4], axis=1)
    out, cache = decode(block, params, parts, encoded)
    reference.assert_close(out, whole, 2e-6)
    step = partial(block.apply, decode=True, mutable=['cache'])
    traced = jax.make_jaxpr(step)({'params': params, 'cache': cache}, x, encoded)
    assert 'remat2' not in {eqn.primitive.name for eqn in traced.eqns}


def test_decoder_block_takes_a_cache_from_init():
    attention = partial(MultiHeadAttention, num_heads=N, cache_length=T)
    block = DecoderBlock(attention, 13)
    x, encoded = reference.random_arrays(2, (B, T, D), (B, S, 11))
    params = reference.random_params(block, x, encoded)
    dummies = np.zeros_like(x), np.zeros_like(encoded)
    made = block.init(jax.random.key(0), *dummies, decode=True)
    variables = {**made, 'params': params}
    out, _ = block.apply(variables, x, encoded, decode=True, mutable=['cache'])
    reference.assert_close(out, reference.apply(block, params, x, encoded), 2e-6)
