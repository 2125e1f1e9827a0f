"""The LSTM encoder-decoder against loops over sentences and gates, in float64."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from vit_jax.errors import UserError
from vit_jax.models.lstm import LSTM, global_attention

B, S, T, V, D = 3, 7, 5, 11, 6
PAD = 0
# Padding at the end, at the start and in the middle.
SOURCE = np.array([[3, 5, 2, 9, 0, 0, 0], [0, 4, 4, 8, 0, 6, 1], [7, 2, 3, 1, 5, 9, 2]])
TARGET = np.array([[1, 4, 7, 9, 3], [1, 10, 2, 2, 8], [1, 6, 0, 5, 4]])


def make(**fields):
    fields = {'num_classes': V, 'width': D, 'depth': 2, **fields}
    model = LSTM(**fields)
    return model, reference.random_params(model, SOURCE, TARGET, scale=0.5)


def lstm(params, cell, hidden, x):
    def gate(name):
        recurrent = params[f'h{name}']
        return (
            x @ params[f'i{name}']['kernel']
            + hidden @ recurrent['kernel']
            + recurrent['bias']
        )

    keep, new = reference.sigmoid(gate('f')), reference.sigmoid(gate('i'))
    cell = keep * cell + new * np.tanh(gate('g'))
    return cell, reference.sigmoid(gate('o')) * np.tanh(cell)


def read_sentence(params, x):
    """One layer, `[S, E]` -> states `[S, D]`, last cell and hidden `[D]`."""
    sides = []
    for name, order in (
        ('forward', range(len(x))),
        ('backward', reversed(range(len(x)))),
    ):
        cell = hidden = np.zeros(D // 2)
        states = np.zeros((len(x), D // 2))
        for s in order:
            cell, hidden = lstm(params[name], cell, hidden, x[s])
            states[s] = hidden
        sides.append((states, cell, hidden))
    return [np.concatenate(both, axis=-1) for both in zip(*sides)]


def translate(params, source, target):
    """Logits `[T, V]` of one sentence, its padding cut out first."""
    params, target_table = reference.float64(params), 'target_embedding'
    source_table = 'source_embedding'
    if 'embedding' in params:
        source_table = target_table = 'embedding'
    table = params[target_table]['embedding']
    x = params[source_table]['embedding'][[v for v in source if v != PAD]]
    depth = len([name for name in params if name.startswith('encoder_')])
    carry = []
    for i in range(depth):
        x, cell, hidden = read_sentence(params[f'encoder_{i}'], x)
        carry.append((cell, hidden))
    fed, logits = np.zeros(D), []
    for token in target:
        attends = 'key' in params
        h = np.concatenate([table[token], fed]) if attends else table[token]
        for i in range(depth):
            carry[i] = lstm(params['decoder'][f'layer{i:02d}'], *carry[i], h)
            h = carry[i][1]
        fed = attend(params, h, x) if attends else h
        kernel = params['logits']['kernel'] if 'logits' in params else table.T
        logits.append(fed @ kernel)
    return np.array(logits)


def attend(params, h, x):
    scores = np.array([h @ (state @ params['key']['kernel']) for state in x])
    context = reference.softmax(scores) @ x if len(x) else np.zeros(D)
    both = np.concatenate([context, h])
    return np.tanh(both @ params['decoder']['combine']['kernel'])


@pytest.mark.parametrize('attention', [True, False])
@pytest.mark.parametrize('depth', [1, 2])
@pytest.mark.parametrize(('share', 'tie'), [(True, True), (False, False)])
def test_logits_equal_a_loop_over_tokens(attention, depth, share, tie):
    model, params = make(
        attention=attention, depth=depth, share_embeddings=share, tie_output=tie
    )
    logits = reference.apply(model, params, SOURCE, TARGET)
    assert logits.dtype == jnp.float32
    expected = [translate(params, *pair) for pair in zip(SOURCE, TARGET)]
    reference.assert_close(logits, expected)


def test_the_weights_it_sows_equal_the_loop(monkeypatch):
    model, params = make()
    logits, state = model.apply(
        {'params': params}, SOURCE, TARGET, mutable=['intermediates']
    )
    (weights,) = state['intermediates']['decoder']['attention_weights']
    assert weights.shape == (B, 1, T, S)
    assert weights.dtype == jnp.float32
    found, softmax = [], reference.softmax
    monkeypatch.setattr(
        reference, 'softmax', lambda scores: found.append(softmax(scores)) or found[-1]
    )
    for row in range(B):
        reference.assert_close(logits[row], translate(params, SOURCE[row], TARGET[row]))
    for (row, t), expected in zip(np.ndindex(B, T), found, strict=True):
        whole = np.zeros(S)
        whole[SOURCE[row] != PAD] = expected
        reference.assert_close(weights[row, 0, t], whole)


def test_the_target_gives_the_logits_where_the_embeddings_differ():
    model, params = make(share_embeddings=False)
    expected = [translate(params, *pair) for pair in zip(SOURCE, TARGET)]
    reference.assert_close(reference.apply(model, params, SOURCE, TARGET), expected)


@partial(jax.jit, static_argnums=0)
def encode(model, params, source):
    return model.apply({'params': params}, source, method='encode')


def test_what_is_encoded_is_that_of_the_sentence_without_padding():
    model, params = make()
    encoded = encode(model, params, SOURCE)
    for row in range(B):
        kept = SOURCE[row] != PAD
        alone = encode(model, params, SOURCE[row : row + 1, kept])
        for name in ('key', 'value'):
            states = encoded[name][row, kept]
            reference.assert_close(states, alone[name][0], 1e-6)
        for got, want in zip(
            jax.tree.leaves(encoded['carry']), jax.tree.leaves(alone['carry'])
        ):
            assert got.dtype == jnp.float32
            reference.assert_close(got[row], want[0], 1e-6)
    assert all(leaf.shape[0] == B for leaf in jax.tree.leaves(encoded))


def test_without_attention_the_last_state_is_all_that_is_known():
    model, params = make(attention=False)
    encoded = encode(model, params, SOURCE)
    assert set(encoded) == {'carry'}
    whole = reference.apply(model, params, SOURCE, TARGET)
    other = np.ones_like(SOURCE)
    out = model.apply({'params': params}, TARGET, encoded, other, method='decode')
    reference.assert_close(out, whole, 1e-6)


def test_a_source_of_nothing_but_padding_is_finite():
    model, params = make()
    source = np.concatenate([np.zeros((1, S), int), SOURCE[1:]])

    def loss(params):
        logits = model.apply({'params': params}, source, TARGET)
        return jnp.sum(logits**2), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    reference.assert_close(logits[0], translate(params, source[0], TARGET[0]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_a_token_sees_those_up_to_it_and_the_whole_source():
    model, params = make(share_embeddings=False, tie_output=False)

    def embed(module, x):
        return module.target_embedding(x)

    x = model.apply({'params': params}, TARGET, method=embed)
    encoded = encode(model, params, SOURCE)

    def decode(x, value):
        def run(module):
            start, key = encoded['carry'], encoded['key']
            return module.decoder(x, start, key, value, SOURCE != PAD)

        return model.apply({'params': params}, method=run)

    by_target, by_source = jax.jit(jax.jacrev(decode, (0, 1)))(x, encoded['value'])
    seen = np.abs(by_target).sum(axis=(2, 5)) > 0  # [B, T, B, T]
    for b, c in np.ndindex(B, B):
        expected = np.tri(T, dtype=bool) & (b == c)
        np.testing.assert_array_equal(seen[b, :, c], expected)
    seen = np.abs(by_source).sum(axis=(2, 5)) > 0  # [B, T, B, S]
    for b, c in np.ndindex(B, B):
        expected = np.broadcast_to((SOURCE[b] != PAD) & (b == c), (T, S))
        np.testing.assert_array_equal(seen[b, :, c], expected)


@partial(jax.jit, static_argnums=0)
def decode_next(model, variables, target, encoded, source):
    return model.apply(
        variables,
        target,
        encoded,
        source,
        cached=True,
        method='decode',
        mutable=['cache'],
    )


@pytest.mark.parametrize('attention', [True, False])
def test_cached_decoding_equals_one_pass_for_every_split(attention):
    model, params = make(attention=attention)
    whole = reference.apply(model, params, SOURCE, TARGET)
    encoded = encode(model, params, SOURCE)
    for cuts in itertools.product([False, True], repeat=T - 1):
        variables, outs = {'params': params}, []
        for part in np.split(TARGET, 1 + np.flatnonzero(cuts), axis=1):
            out, cache = decode_next(model, variables, part, encoded, SOURCE)
            variables = {'params': params, **cache}
            outs.append(out)
        reference.assert_close(np.concatenate(outs, axis=1), whole, 1e-6)
        assert all(leaf.shape[0] == B for leaf in jax.tree.leaves(cache))


def test_init_remembers_nothing():
    model, params = make()
    encoded = encode(model, params, SOURCE)
    made = jax.eval_shape(
        partial(model.init, cached=True, method='decode'),
        jax.random.key(0),
        TARGET,
        encoded,
        SOURCE,
    )
    assert set(made) == {'params'}


def test_dropout_is_of_the_rng_and_of_training_only():
    model, params = make(dropout_rate=0.3)
    run = partial(reference.apply, model, params, SOURCE, TARGET)
    first, second = (run(train=True, rng=jax.random.key(seed)) for seed in range(2))
    assert (first != second).any()
    np.testing.assert_array_equal(first, run(train=True, rng=jax.random.key(0)))
    np.testing.assert_array_equal(run(), run(rng=jax.random.key(0)))
    without = reference.apply(make(dropout_rate=0.0)[0], params, SOURCE, TARGET)
    np.testing.assert_array_equal(run(), without)


def test_dropout_of_a_row_does_not_depend_on_the_others():
    model, params = make(dropout_rate=0.3)
    run = partial(reference.apply, model, params, train=True, rng=jax.random.key(0))
    whole = run(SOURCE, TARGET)
    reference.assert_close(run(SOURCE[:2], TARGET[:2]), whole[:2], 1e-6)


def test_each_step_drops_others():
    """Of equal steps: the mask of the decoder is not one for the whole target."""
    model, params = make(dropout_rate=0.5, depth=1)
    params = jax.tree.map(jnp.zeros_like, params)
    params['decoder']['layer00']['ig']['kernel'] += 1.0  # h sees what x has left
    params['decoder']['layer00']['hf']['bias'] -= 30.0  # and forgets
    params['decoder']['combine']['kernel'] = np.eye(2 * D, D, -D)
    params['embedding']['embedding'] += 1.0
    encoded = encode(model, params, SOURCE)
    vectors = model.apply(
        {'params': params},
        jnp.ones((B, 13, D)),
        encoded['carry'],
        encoded['key'],
        encoded['value'],
        SOURCE != PAD,
        train=True,
        rngs={'dropout': jax.random.key(0)},
        method=lambda module, *args, **kwargs: module.decoder(*args, **kwargs),
    )
    assert len(np.unique(np.round(vectors[0, :, 0], 5))) > 3


@pytest.mark.parametrize('attention', [True, False])
@pytest.mark.parametrize(
    ('share', 'tie', 'depth'), [(True, True, 2), (False, False, 1), (False, True, 3)]
)
def test_parameter_count(attention, share, tie, depth):
    model = LSTM(V, D, depth, attention, share_embeddings=share, tie_output=tie)
    shapes = reference.init_shapes(model, SOURCE, TARGET)

    def cell(inputs, size):
        return 4 * size * (inputs + size + 1)

    tables = V * D * ((1 if share else 2) + (0 if tie else 1))
    encoder = depth * 2 * cell(D, D // 2)
    decoder = depth * cell(D, D)
    attending = D * 4 * D + D * D + 2 * D * D if attention else 0  # feeding, key, W
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == tables + encoder + decoder + attending


def test_bfloat16_computes_near_float32_and_keeps_states_in_it():
    model, params = make()
    half = model.clone(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype('float32')}
    whole = reference.apply(model, params, SOURCE, TARGET)
    logits = reference.apply(half, params, SOURCE, TARGET)
    assert logits.dtype == jnp.float32
    reference.assert_close(logits, whole, 0.1)
    assert np.abs(logits - whole).max() > 1e-4
    encoded = encode(half, params, SOURCE)
    assert encoded['key'].dtype == encoded['value'].dtype == jnp.bfloat16
    _, cache = decode_next(half, {'params': params}, TARGET, encoded, SOURCE)
    states, vector = cache['cache']['decoder']['carry']
    assert {x.dtype for x in jax.tree.leaves(states)} == {np.dtype('float32')}
    assert vector.dtype == jnp.bfloat16


def test_attention_to_nothing_is_zero():
    query, key = map(jnp.float32, reference.random_arrays(0, (B, D), (B, S, D)))
    mask = np.array([[False] * S] * B)
    context, attn_weights = global_attention(query, key, key, mask)
    np.testing.assert_array_equal(context, np.zeros((B, D)))
    np.testing.assert_array_equal(attn_weights, np.zeros((B, S)))


def test_an_odd_width_is_told():
    with pytest.raises(UserError, match=r'width must be even.* not 7'):
        make(width=7)


def test_other_rows_are_told():
    model, params = make()
    with pytest.raises(UserError, match='as many rows: 3 are not 2'):
        reference.apply(model, params, SOURCE, TARGET[:2])
    encoded = encode(model, params, SOURCE)
    _, cache = decode_next(model, {'params': params}, TARGET, encoded, SOURCE)
    fewer = encode(model, params, SOURCE[:2])
    with pytest.raises(UserError, match='the cache has 3 rows, the target 2'):
        decode_next(model, {'params': params, **cache}, TARGET[:2], fewer, SOURCE[:2])
