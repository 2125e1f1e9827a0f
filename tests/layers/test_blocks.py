from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from vit_jax.errors import UserError
from vit_jax.layers.attention import MultiHeadAttention
from vit_jax.layers.blocks import DecoderBlock, EncoderBlock, drop_path_rates

B, T, D, F = 3, 5, 6, 7


class Keep(nn.Module):
    """An attention without attention: returns its input, scaled."""

    scale: float = 1.0

    @nn.compact
    def __call__(self, x, *, train=False):
        return self.scale * x


def make_block(attention=None, shape=(B, T, D), **kwargs):
    attention = attention or partial(MultiHeadAttention, num_heads=3)
    block = EncoderBlock(attention, F, **kwargs)
    (x,) = reference.random_arrays(0, shape)
    return block, reference.random_params(block, x), x


@pytest.mark.parametrize(
    'kwargs',
    [{}, {'layer_norm_eps': 0.5}, {'activation': 'gelu_tanh'}, {'layer_scale': 0.1}],
)
def test_block_is_attention_then_mlp_each_with_norm_and_residual(kwargs):
    block, params, x = make_block(**kwargs)
    out = reference.apply(block, params, x)
    eps = kwargs.get('layer_norm_eps', 1e-6)
    variant = kwargs.get('activation', 'gelu')
    expected = reference.encoder_block(
        reference.float64(params), x, eps=eps, variant=variant
    )
    reference.assert_close(out, expected)


@pytest.mark.parametrize(('variant', 'start'), [('gelu', None), ('relu', 0.1)])
def test_norms_after_the_sums(variant, start):
    block, params, x = make_block(
        norm_first=False, activation=variant, layer_scale=start
    )
    assert ('layer_scale2' in params) == (start is not None)
    out = reference.apply(block, params, x)
    expected = reference.post_norm_block(reference.float64(params), x, variant=variant)
    reference.assert_close(out, expected)


def test_mask_reaches_the_attention():
    block, params, x = make_block()
    mask = np.ones((B, 1, 1, T), bool)
    mask[1, ..., 2:] = False
    out = reference.apply(block, params, x, mask=mask)
    attend = partial(reference.multi_head_attention, mask=mask)
    expected = reference.encoder_block(reference.float64(params), x, attend=attend)
    reference.assert_close(out, expected)


def make_decoder(**kwargs):
    block = DecoderBlock(partial(MultiHeadAttention, num_heads=3), F, **kwargs)
    x, encoded = reference.random_arrays(0, (B, T, D), (B, 11, 13))
    return block, reference.random_params(block, x, encoded), x, encoded


@pytest.mark.parametrize(
    ('norm_first', 'start'), [(True, None), (False, None), (True, 0.1)]
)
def test_decoder_block_is_two_attentions_then_mlp(norm_first, start):
    block, params, x, encoded = make_decoder(norm_first=norm_first, layer_scale=start)
    assert ('layer_scale3' in params) == (start is not None)
    rng = np.random.default_rng(0)
    masks = {
        'self_mask': rng.random((B, 1, 1, T)) < 0.6,
        'cross_mask': rng.random((B, 1, T, 11)) < 0.6,
    }
    for given in ({}, masks):
        out = reference.apply(block, params, x, encoded, **given)
        expected = reference.decoder_block(
            reference.float64(params), x, encoded, **given, norm_first=norm_first
        )
        reference.assert_close(out, expected)


def test_decoder_block_drops_each_of_its_branches():
    plain, params, x, encoded = make_decoder()
    out = reference.apply(plain, params, x, encoded)
    rng = jax.random.key(0)
    for fields in (
        {'dropout_rate': 0.5},
        {'drop_path_rate': 0.5},
    ):
        block = make_decoder(**fields)[0]
        np.testing.assert_array_equal(reference.apply(block, params, x, encoded), out)
        for branch in ('self_attention', 'cross_attention', 'mlp'):
            off = {'self_attention', 'cross_attention', 'mlp'} - {branch}
            alone = {
                **params,
                **{k: jax.tree.map(jnp.zeros_like, params[k]) for k in off},
            }
            args = alone, x, encoded
            kept = reference.apply(block, *args)
            trained = reference.apply(block, *args, train=True, rng=rng)
            assert np.any(kept != trained), branch


@pytest.mark.parametrize('start', [0.0, 0.25])
def test_factors_of_the_branches_start_where_told(start):
    block, _, x = make_block(Keep, layer_scale=start)
    params = reference.init(block, x)
    names = {name for name in params if 'layer_scale' in name}
    assert names == {'layer_scale1', 'layer_scale2'}
    for name in names:
        np.testing.assert_array_equal(params[name]['scale'], np.full(D, start))
        assert params[name]['scale'].dtype == jnp.float32
    out = reference.apply(block, params, x)
    assert np.array_equal(out, np.float32(x)) == (start == 0)


def test_without_factors_there_are_no_parameters_of_them():
    assert set(make_block()[1]) == {'norm1', 'attention', 'norm2', 'mlp'}


def test_factors_keep_bfloat16():
    block, params, x = make_block(Keep, layer_scale=0.1, dtype=jnp.bfloat16)
    out = reference.apply(block, params, jnp.asarray(x, jnp.bfloat16))
    assert out.dtype == jnp.bfloat16


def test_drop_path_with_the_norms_after_the_sums():
    block, params, x = make_block(Keep, norm_first=False, drop_path_rate=0.5)
    plain = reference.apply(block, params, x)
    dropped = reference.apply(block, params, x, train=True, rng=jax.random.key(0))
    assert np.any(dropped != plain)


def test_any_attention_serves():
    block, params, x = make_block(Keep)
    out = reference.apply(block, params, x)
    assert set(params) == {'norm1', 'norm2', 'mlp'}
    params = {**reference.float64(params), 'attention': {}}
    expected = reference.encoder_block(params, x, attend=lambda params, x: x)
    reference.assert_close(out, expected)


class TrainOnly(nn.Module):
    """An attention that returns its input in training and nothing else."""

    @nn.compact
    def __call__(self, x, *, train):
        return x if train else jnp.zeros_like(x)


def test_attention_is_told_whether_it_trains():
    block, params, x = make_block(TrainOnly)
    params = zero_mlp(params)
    reference.assert_close(reference.apply(block, params, x), x)
    expected = x + reference.layer_norm(reference.float64(params['norm1']), x)
    out = reference.apply(block, params, x, train=True)
    reference.assert_close(out, expected)


def zero_mlp(params):
    return {**params, 'mlp': jax.tree.map(jnp.zeros_like, params['mlp'])}


@pytest.mark.parametrize('branch', ['attention', 'mlp'])
def test_drop_path_drops_each_branch_of_whole_examples(branch):
    scale = 1.0 if branch == 'attention' else 0.0
    block, params, x = make_block(
        partial(Keep, scale=scale), shape=(67, T, D), drop_path_rate=0.5
    )
    if branch == 'attention':
        params = zero_mlp(params)
    x = np.float32(x)
    plain = reference.apply(block, params, x) - x
    rng = jax.random.key(0)
    out = np.asarray(reference.apply(block, params, x, train=True, rng=rng)) - x
    dropped = np.all(out == 0.0, axis=(1, 2))
    assert 20 < dropped.sum() < 47
    reference.assert_close(out[~dropped], 2 * plain[~dropped])


def test_drop_path_of_the_branches_is_independent():
    def dropped(zero):
        block, params, x = make_block(Keep, shape=(67, T, D), drop_path_rate=0.5)
        if zero == 'mlp':
            params = zero_mlp(params)
        else:
            params['norm1'] = jax.tree.map(jnp.zeros_like, params['norm1'])
        rng = jax.random.key(0)
        out = reference.apply(block, params, x, train=True, rng=rng)
        return np.all(out == np.float32(x), axis=(1, 2))

    assert np.any(dropped('mlp') != dropped('attention'))


@pytest.mark.parametrize('silent', ['mlp', 'norm1'])
def test_dropout_after_the_attention_and_in_the_mlp(silent):
    block, params, x = make_block(Keep, dropout_rate=0.25, shape=(7, 11, 13))
    params[silent] = jax.tree.map(jnp.zeros_like, params[silent])
    rng = jax.random.key(0)
    out = reference.apply(block, params, x, train=True, rng=rng)
    assert 0.2 < np.mean(out == np.float32(x)) < 0.3


@pytest.mark.parametrize('make', [make_block, make_decoder])
def test_hidden_units_have_a_dropout_of_their_own(make):
    plain, params, *args = make()
    block = make(dropout_rate=0.5, hidden_dropout_rate=0.0)[0]
    hidden = make(hidden_dropout_rate=0.5)[0]
    # Without the second linear map nothing of the hidden units shows.
    silent = {**params, 'mlp': {**params['mlp'], 'fc2': zeros(params['mlp']['fc2'])}}
    rng = jax.random.key(0)
    for module, shows in ((block, True), (hidden, False)):
        out = reference.apply(module, silent, *args, train=True, rng=rng)
        assert np.any(out != reference.apply(plain, silent, *args)) == shows
    out = reference.apply(hidden, params, *args, train=True, rng=rng)
    assert np.any(out != reference.apply(plain, params, *args))


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


@pytest.mark.parametrize('remat', ['dots', 'full'])
@pytest.mark.parametrize('make', [make_block, make_decoder])
def test_what_is_computed_again_is_the_same(make, remat):
    block, params, *args = make(dropout_rate=0.5)
    mask = {} if make is make_block else {'cross_mask': np.tri(T, 11, 6, bool)}

    def gradients(block):
        def loss(params, args):
            rngs = {'dropout': jax.random.key(0)}
            out = block.apply({'params': params}, *args, **mask, train=True, rngs=rngs)
            return jnp.sum(out**2)

        return jax.grad(loss, argnums=(0, 1))

    args = [jnp.float32(x) for x in args]
    expected = jax.jit(gradients(block))(params, args)
    again = gradients(make(dropout_rate=0.5, remat=remat)[0])
    reference.assert_gradients_close(jax.jit(again)(params, args), expected)
    traced = jax.make_jaxpr(again)(params, args)
    assert 'remat2' in {eqn.primitive.name for eqn in traced.eqns}


@pytest.mark.parametrize('make', [make_block, make_decoder])
def test_an_unknown_remat_offers_the_nearest(make):
    with pytest.raises(UserError, match="unknown remat 'ful'; did you mean 'full'"):
        make(remat='ful')


@pytest.mark.parametrize(
    ('rate', 'depth', 'expected'),
    [(0.5, 3, [0, 0.25, 0.5]), (0.1, 2, [0, 0.1]), (0.3, 1, [0]), (0, 4, [0] * 4)],
)
def test_drop_path_rates_grow_linearly_from_zero(rate, depth, expected):
    np.testing.assert_allclose(drop_path_rates(rate, depth), expected)
