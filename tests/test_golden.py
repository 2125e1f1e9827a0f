"""Layers and models against numbers that PyTorch computed, see golden/README.md."""

import math
import pathlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.layers.attention import MultiHeadAttention, causal_mask, padding_mask
from vit_jax.layers.blocks import DecoderBlock
from vit_jax.models.convit import ConViT
from vit_jax.models.transformer import Transformer
from vit_jax.models.vit import ViT

GOLDEN = pathlib.Path(__file__).parent / 'golden'


def load(name):
    with np.load(GOLDEN / name, allow_pickle=False) as arrays:
        return unflatten_dict(dict(arrays), sep='/')


ATTENTION, MODELS = load('attention.npz'), load('models.npz')
TRANSFORMER = load('transformer.npz')

# PyTorch's names to ours, in this order.
RENAMES = (
    (r'_(weight|bias)$', r'.\1'),
    (r'^(\w+coder)\.layers\.(\d)', r'\1.block0\2'),
    (r'^(encoder\.\w+)\.self_attn', r'\1.attention'),
    (r'^blocks\.(\d)', r'block0\1'),
    (r'^patch_embed\.proj', 'patches.embed'),
    (r'^norm\.', 'head.norm.'),
    (r'^head\.(weight|bias)', r'head.logits.\1'),
    (r'\.attn\.', '.attention.'),
    (r'\bself_attn', 'self_attention'),
    (r'\bmultihead_attn', 'cross_attention'),
    (r'linear', 'mlp.fc'),
    (r'gating_param', 'gating'),
    (r'pos_proj\.weight', 'position_kernel'),
    (r'pos_proj\.bias', 'position_bias'),
    (r'\b(out_)?proj\.', 'out.'),
    (r'^(cls|dist)_token', r'class_token.\1'),
    (r'^reg_token', 'registers.tokens'),
    (r'^head_dist', 'head.dist_logits'),
    (r'\.ls(\d)\.gamma', r'.layer_scale\1.scale'),
)
# Linear maps that PyTorch stores as one, or under another name.
PARTS = {
    'qkv': ('query', 'key', 'value'),
    'in_proj': ('query', 'key', 'value'),
    'qk': ('query', 'key'),
    'q_proj': ('query',),
    'k_proj': ('key',),
    'v_proj': ('value',),
    'v': ('value',),
}
UNCHANGED = ('gating', 'position_bias', 'cls', 'dist', 'tokens', 'scale')


def convert(name, x, num_heads, grid):
    """Yields (path, leaf): what one array of PyTorch is in our tree."""
    if name == 'pos_embed':
        prefix = x.shape[1] - math.prod(grid)
        yield ('posemb', 'grid'), x[0, prefix:].reshape(*grid, -1)
        if prefix:
            yield ('posemb', 'prefix'), x[0, :prefix]
        return
    for pattern, new in RENAMES:
        name = re.sub(pattern, new, name)
    *path, module, kind = name.split('.')
    if kind in UNCHANGED:
        yield (*path, module, kind), x
    elif kind == 'position_kernel':
        yield (*path, module, kind), x.T
    elif module in PARTS:
        for part, rows in zip(PARTS[module], np.split(x, len(PARTS[module]))):
            if kind == 'weight':
                yield (*path, part, 'kernel'), rows.T.reshape(x.shape[1], num_heads, -1)
            else:
                yield (*path, part, 'bias'), rows.reshape(num_heads, -1)
    elif kind == 'bias':
        yield (*path, module, 'bias'), x
    elif x.ndim == 1:
        yield (*path, module, 'scale'), x
    elif module == 'out':
        yield (*path, module, 'kernel'), x.T.reshape(num_heads, -1, len(x))
    else:  # [out, in] of a linear map, [out, in, *size] of a convolution
        yield (*path, module, 'kernel'), np.moveaxis(x, (0, 1), (-1, -2))


def to_tree(arrays, num_heads, grid=None):
    """PyTorch's parameters, or their gradients, as our tree: each number once."""
    leaves = {}
    for name, x in arrays.items():
        new = dict(convert(name, x, num_heads, grid))
        assert sum(leaf.size for leaf in new.values()) == x.size, name
        assert not new.keys() & leaves.keys(), name
        leaves.update(new)
    return unflatten_dict(leaves)


def check(module, golden, inputs, grads, loss_of, grid=None, **terms):
    """Output, and gradients for every parameter and input, are PyTorch's.

    Args:
      inputs: floats, passed by name; `grads` has their gradients.
      loss_of: output -> loss.
      terms: what else `module` is called with.
    """
    params, param_grads = (
        to_tree(golden[name], module_heads(module), grid)
        for name in ('params', 'param_grads')
    )
    # No array of PyTorch is left over, and none of ours is without one.
    ours = reference.init_shapes(module, **inputs, **terms)
    assert shapes(params) == shapes(ours)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params, inputs):
        out = module.apply({'params': params}, **inputs, **terms)
        return loss_of(out), out

    (loss, out), actual = run(params, inputs)
    reference.assert_close(out, golden['out'])
    reference.assert_close(loss, golden['loss'])
    expected = (param_grads, grads)
    assert shapes(actual) == shapes(expected)
    reference.assert_gradients_close(actual, expected)


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


def module_heads(module):
    if isinstance(module, DecoderBlock):
        return module.attention.keywords['num_heads']
    return module.num_heads


def test_arrays_find_their_places_by_hand():
    qkv = np.arange(6.0)[:, None] + np.array([[0.0, 0.5]])  # rows 0 1 | 2 3 | 4 5
    tree = to_tree({'blocks.1.attn.qkv.weight': qkv}, num_heads=2)
    key = tree['block01']['attention']['key']['kernel']  # [D, N, H]
    np.testing.assert_array_equal(key, [[[2.0], [3.0]], [[2.5], [3.5]]])
    tree = to_tree({'pos_embed': np.arange(14.0).reshape(1, 7, 2)}, 1, grid=(2, 3))
    np.testing.assert_array_equal(tree['posemb']['prefix'], [[0, 1]])
    np.testing.assert_array_equal(tree['posemb']['grid'][1, 0], [8, 9])


def attention_terms(golden):
    """The masks of a recorded layer, ours being True where a key is kept."""
    terms = {}
    if 'key_padding_mask' in golden:
        terms['mask'] = padding_mask(~jnp.asarray(golden['key_padding_mask']))
    if 'attn_mask' in golden:
        terms['mask'] = ~jnp.asarray(golden['attn_mask'])
    return terms


@pytest.mark.parametrize('impl', ['xla', 'chunked', 'dense'])
@pytest.mark.parametrize('case', ['self', 'cross', 'padding', 'causal', 'bias'])
def test_multi_head_attention_is_that_of_pytorch(case, impl):
    golden = ATTENTION[case]
    module = MultiHeadAttention(3, impl=impl)
    check(
        module,
        golden,
        golden['inputs'],
        golden['input_grads'],
        lambda out: jnp.sum(out * golden['cotangent']),
        **attention_terms(golden),
    )


@pytest.mark.parametrize('case', ['self', 'cross', 'padding', 'causal', 'bias'])
def test_attention_weights_are_those_of_pytorch(case):
    golden = ATTENTION[case]
    params = to_tree(golden['params'], num_heads=3)
    terms = attention_terms(golden) | golden['inputs']
    x = terms.pop('x')
    out, sown = reference.apply(
        MultiHeadAttention(3), params, x, **terms, mutable='intermediates'
    )
    reference.assert_close(out, golden['out'])
    (weights,) = sown['intermediates']['attention_weights']
    reference.assert_close(weights, golden['weights'])


def test_causal_field_is_the_causal_mask_of_pytorch():
    golden = ATTENTION['causal']
    np.testing.assert_array_equal(causal_mask(5, 5), ~golden['attn_mask'])
    params = to_tree(golden['params'], num_heads=3)
    for impl in ('xla', 'chunked', 'dense'):
        module = MultiHeadAttention(3, causal=True, impl=impl)
        out = reference.apply(module, params, golden['inputs']['x'])
        reference.assert_close(out, golden['out'])


@pytest.mark.parametrize('activation', ['relu', 'gelu'])
@pytest.mark.parametrize('order', ['pre', 'post'])
def test_decoder_block_is_the_decoder_layer_of_pytorch(order, activation):
    golden = ATTENTION[f'decoder_{order}_{activation}']
    block = DecoderBlock(
        partial(MultiHeadAttention, num_heads=3),
        mlp_dim=17,
        norm_first=order == 'pre',
        activation=activation,
        layer_norm_eps=float(golden['eps']),
    )
    check(
        block,
        golden,
        golden['inputs'],
        golden['input_grads'],
        lambda out: jnp.sum(out * golden['cotangent']),
        cross_mask=padding_mask(~jnp.asarray(golden['memory_key_padding_mask'])),
    )


@pytest.mark.parametrize('order', ['pre', 'post'])
def test_transformer_is_that_of_pytorch(order):
    """Which has no embeddings: each of its input vectors is a token of our tables."""
    golden, width = TRANSFORMER[order], 12
    vectors = {name: x.reshape(-1, width) for name, x in golden['inputs'].items()}
    model = Transformer(
        num_classes=1 + len(vectors['source']),  # the token 0 is padding
        width=width,
        depth=2,
        decoder_depth=3,
        mlp_dim=17,
        num_heads=3,
        posemb='none',
        norm_first=order == 'pre',
        share_embeddings=False,
        tie_output=False,
        layer_norm_eps=float(golden['eps']),
    )
    tokens = {
        name: 1 + np.arange(len(x)).reshape(golden['inputs'][name].shape[:2])
        for name, x in vectors.items()
    }
    tokens['source'] = np.where(golden['padding'], 0, tokens['source'])
    to_tables = partial(make_tables, num_rows=model.num_classes)
    scale = width**-0.5  # of our embeddings, which the model takes back
    params = to_tree(golden['params'], num_heads=3) | to_tables(vectors, scale)
    params['output'] = {'kernel': np.eye(width, model.num_classes)}
    assert shapes(params) == shapes(reference.init_shapes(model, **tokens))

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(params):
        out = model.apply({'params': params}, **tokens)[..., :width]
        return jnp.sum(out * golden['cotangent']), out

    (loss, out), grads = run(params)
    reference.assert_close(out, golden['out'])
    reference.assert_close(loss, golden['loss'])
    del grads['output']
    vectors = {k: x.reshape(-1, width) for k, x in golden['input_grads'].items()}
    expected = to_tree(golden['param_grads'], num_heads=3)
    reference.assert_gradients_close(grads, expected | to_tables(vectors, 1 / scale))


def make_tables(vectors, scale, num_rows):
    """Embeddings whose rows from 1 on are these vectors times `scale`."""
    return {
        f'{name}_embed': {
            'embedding': np.pad(scale * x, ((1, num_rows - 1 - len(x)), (0, 0)))
        }
        for name, x in vectors.items()
    }


def check_model(model, golden, grid):
    assert model.layer_norm_eps == pytest.approx(float(golden['eps']))
    image, label = golden['inputs']['image'], golden['inputs']['label']

    def loss_of(logits):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return jnp.mean(losses)

    check(
        model,
        golden,
        {'image': channels_last(image)},
        {'image': channels_last(golden['input_grads']['image'])},
        loss_of,
        grid=grid,
    )


def channels_last(image):
    return np.moveaxis(image, 1, -1)


VIT = ViT(num_classes=7, patch_size=(2, 4), width=12, depth=2, mlp_dim=18, num_heads=3)


@pytest.mark.parametrize(
    ('case', 'fields'),
    [
        ('deit', {}),
        ('distilled', {'distilled': True}),
        ('dinov2', {'layer_scale': 0.1}),
        ('registers', {'layer_scale': 0.1, 'num_registers': 4}),
    ],
)
def test_vit_is_that_of_timm(case, fields):
    golden = MODELS[case]
    if case == 'registers':
        golden = give_class_token_a_position(golden)
    check_model(VIT.clone(**fields), golden, grid=(3, 5))


def give_class_token_a_position(golden):
    """A zero: beside registers timm's class token has no position, ours has one.

    Its gradient is that of the token, to which it is added.
    """
    params, grads = golden['params'], golden['param_grads']
    zero = np.zeros_like(params['cls_token'])
    return {
        **golden,
        'params': params | {'pos_embed': prepend(zero, params['pos_embed'])},
        'param_grads': grads
        | {'pos_embed': prepend(grads['cls_token'], grads['pos_embed'])},
    }


def prepend(token, tokens):
    return np.concatenate([token, tokens], axis=1)


@pytest.mark.parametrize(
    ('impl', 'qkv_bias'),
    [('factored', False), ('split', False), ('dense', False), ('factored', True)],
)
def test_convit_is_that_of_timm(impl, qkv_bias):
    model = ConViT(
        num_classes=7,
        patch_size=2,
        width=20,
        depth=3,
        mlp_dim=22,
        num_heads=4,
        num_local_layers=2,
        qkv_bias=qkv_bias,
        gpsa_impl=impl,
    )
    golden = MODELS['convit_bias' if qkv_bias else 'convit']
    check_model(model, golden, grid=(4, 4))


def test_every_number_of_the_models_shows():
    """No recorded gradient is zero but those of shifts that a softmax ignores."""
    for case, golden in MODELS.items():
        heads, grid = (4, (4, 4)) if 'convit' in case else (3, (3, 5))
        grads = flatten_dict(to_tree(golden['param_grads'], heads, grid))
        silent = {path for path, x in grads.items() if np.abs(x).max() < 1e-6}
        assert {path[-2:] for path in silent} <= {
            ('key', 'bias'),
            ('attention', 'position_bias'),
        }
