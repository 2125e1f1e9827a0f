"""The encoder-decoder Transformer; its blocks are compared in tests/test_golden.py."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import model_checks
import numpy as np
import numpy_reference as reference
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.errors import UserError
from vit_jax.layers.position import sincos
from vit_jax.layers.stochastic import Dropout
from vit_jax.models.transformer import Positions, Transformer

B, S, T, V, D, F, L = 2, 7, 5, 17, 12, 13, 11
PAD = 3


def make_model(**kwargs):
    fields = {
        'num_classes': V,
        'width': D,
        'depth': 1,
        'mlp_dim': F,
        'num_heads': 3,
        'dropout_rate': 0.0,
        'max_length': L,
        'pad_id': PAD,
    }
    return Transformer(**{**fields, **kwargs})


UNSHARED = {'share_embeddings': False, 'tie_output': False}


def make_tokens():
    """Source and target; in an example no token comes twice but the padding."""
    rng = np.random.default_rng(0)
    tokens = np.delete(np.arange(V), PAD)
    source, target = (
        np.stack([rng.permutation(tokens)[:length] for _ in range(B)])
        for length in (S, T)
    )
    source[0, 4:] = source[1, 2] = PAD
    return source, target


def make(**kwargs):
    model, tokens = make_model(**kwargs), make_tokens()
    return model, reference.random_params(model, *tokens), *tokens


def gradients_of_outputs(model, params, source, target):
    """`[T, V, D]` for each table: how the outputs t depend on the token of each row."""
    rng = np.random.default_rng(1)
    cotangent = rng.normal(size=(T, V))

    def outputs(params):
        logits = model.apply({'params': params}, source[:1], target[:1])
        return jnp.sum(logits[0] * cotangent, axis=-1)

    grads = jax.jit(jax.jacrev(outputs))(params)
    return (np.asarray(grads[f'{k}_embed']['embedding']) for k in ('source', 'target'))


@pytest.mark.parametrize('norm_first', [False, True])
def test_outputs_depend_on_the_source_and_on_the_targets_tokens_so_far(norm_first):
    model, params, source, target = make(norm_first=norm_first, **UNSHARED)
    by_source, by_target = gradients_of_outputs(model, params, source, target)
    matters = np.abs(by_target[:, target[0]]).max(axis=-1) > 1e-4  # [output, token]
    np.testing.assert_array_equal(matters, np.tri(T, dtype=bool))
    for t in range(T):
        rows = np.flatnonzero(np.abs(by_source[t]).max(axis=-1) > 1e-4)
        np.testing.assert_array_equal(rows, np.sort(source[0, :4]))
    np.testing.assert_array_equal(by_source[:, PAD], 0.0)


def test_more_padding_changes_nothing():
    model, params, source, target = make()
    out = reference.apply(model, params, source, target)
    longer = np.pad(source, ((0, 0), (0, 4)), constant_values=PAD)
    reference.assert_close(reference.apply(model, params, longer, target), out, 1e-6)
    inside = np.where(np.arange(S) == 1, PAD, source)
    assert np.abs(reference.apply(model, params, inside, target) - out).max() > 1e-3


@pytest.mark.parametrize('norm_first', [False, True])
def test_a_source_of_padding_alone_is_finite(norm_first):
    model, params, source, target = make(norm_first=norm_first)
    source = np.full_like(source, PAD)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(params):
        logits = model.apply({'params': params}, source, target)
        return jnp.sum(logits**2), logits

    (_, logits), grads = run(params)
    assert np.all(np.isfinite(logits))
    for leaf in jax.tree.leaves(grads):
        assert np.all(np.isfinite(leaf))
    norms = [np.abs(leaf).max() for leaf in jax.tree.leaves(grads['target_embed'])]
    assert min(norms) > 0


def decode(model, params, source, parts):
    """The logits of calls that each take the next tokens."""
    variables, outs = {'params': params}, []
    encoded = model.apply(variables, source, method='encode')
    for part in parts:
        out, cache = decode_step(model, variables, part, encoded, source)
        variables = {'params': params, **cache}
        encoded = np.full_like(encoded, np.nan)  # it is not read again
        outs.append(out)
    return np.concatenate(outs, axis=1)


@partial(jax.jit, static_argnums=0)
def decode_step(model, variables, part, encoded, source):
    step = partial(model.apply, method='decode', cached=True, mutable=['cache'])
    return step(variables, part, encoded, source)


SPLITS = [  # all 16 of five tokens
    np.diff([0, *(i + 1 for i in range(T - 1) if cuts >> i & 1), T])
    for cuts in range(2 ** (T - 1))
]


def check_decoding(splits, **fields):
    model, params, source, target = make(**fields)
    whole = reference.apply(model, params, source, target)
    for lengths in splits:
        parts = np.split(target, np.cumsum(lengths)[:-1], axis=1)
        assert [part.shape[1] for part in parts] == list(lengths)
        out = decode(model, params, source, parts)
        reference.assert_close(out, whole, 1e-5)


def test_decoding_in_any_steps_is_the_pass_over_all_tokens():
    check_decoding(SPLITS)


@pytest.mark.parametrize(
    'fields',
    [
        {'norm_first': True, 'posemb': 'learned', **UNSHARED},
        {'remat': 'full', 'cache_length': T},
        {'posemb': 'normalized'},  # by the longest length, not that of a call
    ],
)
def test_decoding_goes_with_every_kind_of_model(fields):
    check_decoding([(1,) * T, (3, 1, 1)], **fields)


def test_a_prefix_decodes_as_in_the_whole():
    model, params, source, target = make()
    whole = reference.apply(model, params, source, target)
    for length in range(1, T):
        out = reference.apply(model, params, source, target[:, :length])
        reference.assert_close(out, whole[:, :length], 1e-5)


@pytest.mark.parametrize('posemb', ['sincos1d', 'learned'])
def test_tokens_beyond_the_cache_are_nan(posemb):
    model, params, source, target = make(posemb=posemb)
    short = model.clone(cache_length=3)
    parts = np.split(target, T, axis=1)
    out = decode(short, params, source, parts)
    whole = reference.apply(short, params, source, target)
    reference.assert_close(out[:, :3], whole[:, :3], 1e-5)
    assert np.all(np.isnan(out[:, 3:]))
    with pytest.raises(UserError, match='5 tokens do not fit cache_length 3'):
        decode(short, params, source, [target])


def test_init_makes_an_empty_cache():
    model, params, source, target = make()
    encoded = jnp.zeros((B, S, D))
    made = model.init(
        jax.random.key(0), target, encoded, source, method='decode', cached=True
    )
    cache = flatten_dict(made['cache'], sep='/')
    assert {x.dtype for name, x in cache.items() if name.endswith('index')} == {
        jnp.dtype('int32')
    }
    assert cache['decoder/block00/self_attention/cached_key'].shape == (B, L, 3, D // 3)
    for leaf in cache.values():
        np.testing.assert_array_equal(leaf, 0)
    encoded = model.apply({'params': params}, source, method='encode')
    variables = {'params': params, 'cache': made['cache']}
    out, _ = decode_step(model, variables, target, encoded, source)
    reference.assert_close(out, reference.apply(model, params, source, target), 1e-5)


@pytest.mark.parametrize('posemb', ['sincos1d', 'learned', 'none'])
def test_embeddings_are_scaled_and_get_positions(posemb):
    """Without blocks the logits are products of the target's tokens with the table."""
    model, params, source, target = make(posemb=posemb, depth=0, share_embeddings=False)
    table, source_table = (
        np.float64(params[f'{name}_embed']['embedding'])
        for name in ('target', 'source')
    )
    positions = np.zeros((L, D))
    if posemb == 'sincos1d':
        positions = sincos(np.arange(L), D)
    if posemb == 'learned':
        positions = np.float64(params['target_posemb']['table']['grid'])
        assert params['source_posemb']['table']['grid'].shape == (L, D)
    x = table[target] * np.sqrt(D) + positions[:T]
    out = reference.apply(model, params, source, target)
    assert out.dtype == jnp.float32
    reference.assert_close(out, x @ table.T)
    encoded = model.apply({'params': params}, source, method='encode')
    if posemb == 'learned':
        positions = np.float64(params['source_posemb']['table']['grid'])
    reference.assert_close(encoded, source_table[source] * np.sqrt(D) + positions[:S])


def test_only_learned_positions_end():
    longer = np.ones((B, L + 2), int)
    reference.init_shapes(make_model(), longer, longer)
    message = '13 tokens are more than the learned positions; increase max_length, 11'
    with pytest.raises(UserError, match=message):
        reference.init_shapes(make_model(posemb='learned'), longer, longer)


def test_positions_go_on_from_call_to_call():
    module, x = Positions('sincos1d', L), jnp.zeros((1, 2, D))
    cache = module.init(jax.random.key(0), x, decode=True)
    outs = []
    for _ in range(3):
        out, cache = module.apply(cache, x, decode=True, mutable=['cache'])
        outs.append(out)
    reference.assert_close(np.concatenate(outs, axis=1)[0], sincos(np.arange(6), D))


@pytest.mark.parametrize('share_embeddings', [False, True])
@pytest.mark.parametrize('tie_output', [False, True])
def test_what_is_shared_is_stored_once(share_embeddings, tie_output):
    model = make_model(share_embeddings=share_embeddings, tie_output=tie_output)
    params = reference.init_shapes(model, *make_tokens())
    tables = {'target_embed'} if share_embeddings else {'source_embed', 'target_embed'}
    outputs = set() if tie_output else {'output'}
    assert set(params) == {'encoder', 'decoder'} | tables | outputs
    for name in tables:
        assert params[name]['embedding'].shape == (V, D)
    if not tie_output:
        assert jax.tree.map(jnp.shape, params['output']) == {'kernel': (D, V)}


def test_stacks_have_their_depths_and_a_norm_where_norms_come_first():
    for norm_first, depth in ((False, None), (True, 3)):
        model = make_model(depth=2, decoder_depth=depth, norm_first=norm_first)
        params = reference.init_shapes(model, *make_tokens())
        blocks = [f'block{i:02d}' for i in range(3)]
        last = ['norm'] if norm_first else []
        assert sorted(params['encoder']) == blocks[:2] + last
        assert sorted(params['decoder']) == blocks[: depth or 2] + last


def test_embeddings_start_at_a_deviation_of_one_over_the_root_of_the_width():
    model = make_model(num_classes=101, width=97, depth=0, posemb='none', **UNSHARED)
    params = reference.init(model, *make_tokens())
    for name in ('source_embed', 'target_embed'):
        std = np.std(params[name]['embedding'])
        np.testing.assert_allclose(std, 97**-0.5, rtol=0.03)


def test_dropout_is_where_the_paper_has_it():
    model, params, *tokens = make(dropout_rate=0.25)
    found = set()

    def note(call, args, kwargs, context):
        if isinstance(context.module, Dropout) and context.module.rate > 0:
            assert (context.module.rate, kwargs) == (0.25, {'train': True})
            found.add('/'.join(context.module.path))
        return call(*args, **kwargs)

    def run(rng):
        rngs = {'dropout': rng}
        return model.apply({'params': params}, *tokens, train=True, rngs=rngs)

    with nn.intercept_methods(note):
        jax.eval_shape(run, jax.random.key(0))
    assert found == {
        'source_dropout',
        'target_dropout',
        'encoder/block00/dropout',
        'encoder/block00/mlp/dropout2',
        'decoder/block00/self_dropout',
        'decoder/block00/cross_dropout',
        'decoder/block00/mlp/dropout2',
    }
    run = jax.jit(run)
    first, second = run(jax.random.key(0)), run(jax.random.key(1))
    plain = reference.apply(model, params, *tokens)
    for a, b in ((first, second), (first, plain)):
        assert np.abs(a - b).max() > 1e-2


def test_what_is_computed_again_is_the_same():
    model, params, *tokens = make(decoder_depth=2)

    def gradient(model):
        def loss(params):
            return jnp.mean(model.apply({'params': params}, *tokens, train=True) ** 2)

        return jax.grad(loss)

    expected = jax.jit(gradient(model))(params)
    again = jax.jit(gradient(model.clone(remat='full'))).trace(params)
    found = again.lower().compile()(params)
    reference.assert_gradients_close(found, expected)
    names = [eqn.primitive.name for eqn in again.jaxpr.eqns]
    assert names.count('remat2') == 1 + 2


@pytest.mark.parametrize('tie_output', [False, True])
def test_bfloat16_reaches_every_module_and_logits_are_float32(tie_output):
    model = make_model(dtype=jnp.bfloat16, norm_first=True, tie_output=tie_output)
    inputs = tuple(jax.ShapeDtypeStruct((B, n), jnp.int32) for n in (S, T))
    float32 = [''] if tie_output else ['', 'output']
    model_checks.check_dtype_reaches_every_module(model, inputs, float32)


class Both(Transformer):
    """What training computes, and decoding with a cache."""

    def __call__(self, source, target, *, train=False):
        trained = super().__call__(source, target, train=train)
        encoded = self.encode(source, train=train)
        return trained, self.decode(target, encoded, source, cached=True)


def test_every_field_matters():
    others = {
        'num_classes': 19,
        'width': 15,
        'depth': 2,
        'decoder_depth': 2,
        'mlp_dim': 11,
        'num_heads': 4,
        'posemb': 'none',
        'norm_first': True,
        'share_embeddings': False,
        'tie_output': False,
        'dropout_rate': 0.1,
        'attention_dropout_rate': 0.1,
        'max_length': 13,
        'cache_length': 7,
        'activation': 'gelu',
        'layer_norm_eps': 1e-5,
        'attention_impl': 'chunked',
        'remat': 'full',
        'kernel_init': nn.initializers.ones,
        'dtype': jnp.bfloat16,
        'pad_id': 2,
    }

    def make_both(**kwargs):
        fields = make_model(posemb='learned').__dict__
        fields = {k: v for k, v in fields.items() if k in others}
        return Both(**{**fields, **kwargs})

    inputs = tuple(jax.ShapeDtypeStruct((B, n), jnp.int32) for n in (S, T))
    model_checks.check_every_field_matters(make_both, inputs, others)


def test_kernel_init_reaches_every_map():
    model = make_model(kernel_init=model_checks.half_zeros, tie_output=False)
    kernels = model_checks.leaves(
        reference.init_shapes(model, *make_tokens()), 'kernel'
    )
    assert [kernel.dtype for kernel in kernels] == (6 + 10 + 1) * [jnp.float16]


@pytest.mark.parametrize(
    ('fields', 'tokens', 'message'),
    [
        ({}, (np.ones((B, S)), np.ones((B, T), int)), 'source is tokens.*float'),
        ({}, (np.ones((B, S), int), np.ones(T, int)), r'target is .* shape \(5,\)'),
        ({'num_classes': None}, make_tokens(), 'needs num_classes, the size of a voc'),
        ({'cache_length': 13}, make_tokens(), 'cache_length 13 is above max_length 11'),
        ({'posemb': 'sincos2d'}, make_tokens(), "is for grids of 2 axes.*'sincos1d'"),
        ({'remat': 'ful'}, make_tokens(), "unknown remat 'ful'; did you mean 'full'"),
    ],
)
def test_mistakes_are_told(fields, tokens, message):
    with pytest.raises(UserError, match=message):
        reference.init_shapes(make_model(**fields), *tokens)
