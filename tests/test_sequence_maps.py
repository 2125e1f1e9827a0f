"""Maps of sentences against weights that NumPy computes from the parameters."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from vit_jax.errors import UserError
from vit_jax.layers.attention import MultiHeadAttention
from vit_jax.layers.blocks import EncoderBlock
from vit_jax.layers.position import sincos
from vit_jax.models.lstm import LSTM
from vit_jax.models.transformer import Transformer
from vit_jax.sequence_maps import sequence_maps

B, S, T, V, D, N = 2, 7, 5, 17, 12, 3
SOURCE = np.array([[5, 9, 4, 2, 0, 0, 0], [7, 3, 8, 6, 11, 10, 2]])  # 0 is padding
TARGET = np.array([[1, 12, 6, 2, 0], [1, 5, 5, 9, 16]])
LAYERS = [
    ('encoder', 'encoder/block00'),
    ('encoder', 'encoder/block01'),
    ('decoder', 'decoder/block00/self_attention'),
    ('cross', 'decoder/block00/cross_attention'),
    ('decoder', 'decoder/block01/self_attention'),
    ('cross', 'decoder/block01/cross_attention'),
]


def make(**kwargs):
    fields = {
        'num_classes': V,
        'width': D,
        'depth': 2,
        'mlp_dim': 13,
        'num_heads': N,
        'norm_first': True,
        'activation': 'gelu',
        'max_length': 11,
    }
    model = Transformer(**{**fields, **kwargs})
    return model, reference.random_params(model, SOURCE, TARGET, scale=0.5)


@partial(jax.jit, static_argnums=0)
def run(model, params, source, target):
    return sequence_maps(model, {'params': params}, source, target)


def loops(params, monkeypatch):
    """The weights of the six layers, each from the tokens that really reach it."""
    weights = []
    attention = reference.attention

    def record(*args, **kwargs):
        out = attention(*args, **kwargs)
        weights.append(out[1])
        return out

    monkeypatch.setattr(reference, 'attention', record)
    params = reference.float64(params)
    table = params['target_embed']['embedding'] * D**0.5
    keep = (SOURCE != 0)[:, None, None, :]
    attend = partial(reference.multi_head_attention, mask=keep)
    x = table[SOURCE] + sincos(np.arange(S), D)
    for i in range(2):
        x = reference.encoder_block(params['encoder'][f'block{i:02d}'], x, attend)
    encoded = reference.layer_norm(params['encoder']['norm'], x)
    x = table[TARGET] + sincos(np.arange(T), D)
    for i in range(2):
        block = params['decoder'][f'block{i:02d}']
        x = reference.decoder_block(block, x, encoded, cross_mask=keep)
    return weights


def test_maps_are_those_of_the_loops(monkeypatch):
    model, params = make()
    maps = run(model, params, SOURCE, TARGET)
    assert [(layer.kind, layer.name) for layer in maps.layers] == LAYERS
    for layer, expected in zip(maps.layers, loops(params, monkeypatch), strict=True):
        assert layer.weights.dtype == jnp.float32
        reference.assert_close(layer.weights, expected, 5e-5)


def test_no_layer_sees_padding_or_what_comes_later():
    model, params = make()
    for layer in run(model, params, SOURCE, TARGET).layers:
        sums = layer.weights.sum(axis=-1)
        reference.assert_close(sums, np.ones(sums.shape))
        if layer.kind == 'decoder':
            seen = np.broadcast_to(np.tri(T, dtype=bool), layer.weights.shape)
        else:
            keep = (SOURCE != 0)[:, None, None, :]
            seen = np.broadcast_to(keep, layer.weights.shape)
        np.testing.assert_array_equal(np.asarray(layer.weights) > 0, seen)


def test_the_maps_of_a_sentence_are_those_without_its_padding():
    model, params = make()
    padded = run(model, params, SOURCE, TARGET).layers
    alone = run(model, params, SOURCE[:1, :4], TARGET[:1, :4]).layers
    for layer, other in zip(padded, alone, strict=True):
        queries, keys = other.weights.shape[2:]
        reference.assert_close(layer.weights[:1, :, :queries, :keys], other.weights)


@pytest.mark.parametrize(
    'fields',
    [
        {'dropout_rate': 0.5, 'attention_dropout_rate': 0.5},
        {'remat': 'full'},
        {'attention_impl': 'chunked'},
    ],
)
def test_maps_are_of_the_model_as_it_is_evaluated(fields):
    """Without dropout; the logits are those of the model."""
    model, params = make()
    expected = run(model, params, SOURCE, TARGET)
    other = model.clone(**fields)
    maps = run(other, params, SOURCE, TARGET)
    assert [layer.name for layer in maps.layers] == [name for _, name in LAYERS]
    jax.tree.map(reference.assert_close, maps, expected)
    logits = reference.apply(other, params, SOURCE, TARGET)
    reference.assert_close(maps.logits, logits)


def test_an_lstm_attends_to_the_source():
    """Its weights are compared in tests/models/test_lstm.py."""
    model = LSTM(V, width=D, depth=2)
    params = reference.random_params(model, SOURCE, TARGET, scale=0.5)
    maps = run(model, params, SOURCE, TARGET)
    (layer,) = maps.layers
    assert (layer.kind, layer.name) == ('cross', 'decoder')
    assert layer.weights.shape == (B, 1, T, S)
    reference.assert_close(maps.logits, reference.apply(model, params, SOURCE, TARGET))


class Other(nn.Module):
    """Attention of a block of its own, or an encoder whose layers are scanned."""

    scanned: bool

    @nn.compact
    def __call__(self, source, target, *, train=False):
        x = nn.Embed(V, D)(source)
        attention = partial(MultiHeadAttention, num_heads=N)
        if not self.scanned:
            return attention(name='attention')(x)
        repeat = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={'params': 0, 'intermediates': 0},
            split_rngs={'params': True},
            length=3,
        )
        return repeat(EncoderBlock(attention, mlp_dim=13, name='block'), x, None)[0]


@pytest.mark.parametrize(
    ('scanned', 'message'),
    [
        (False, r'attention sows weights of rank 4; maps of sentences need'),
        (True, r'block sows weights of rank 5; maps of sentences need'),
    ],
)
def test_attention_of_another_kind_is_told(scanned, message):
    model = Other(scanned)
    params = reference.random_params(model, SOURCE, TARGET)
    with pytest.raises(UserError, match=message):
        run(model, params, SOURCE, TARGET)


def test_a_model_without_attention_is_told():
    class Bag(nn.Module):
        @nn.compact
        def __call__(self, source, target, *, train=False):
            return nn.Embed(V, V)(target)

    params = reference.random_params(Bag(), SOURCE, TARGET)
    with pytest.raises(UserError, match='Bag has no attention to map'):
        run(Bag(), params, SOURCE, TARGET)
