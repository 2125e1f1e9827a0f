"""Maps against weights that NumPy computes layer by layer from the parameters."""

import math
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
from vit_jax.layers.patch import PatchEmbed
from vit_jax.maps import attention_maps, non_locality, rollout
from vit_jax.models import build_model
from vit_jax.models.convit import ConViT
from vit_jax.models.vit import ViT

B, V, D, N = 2, 7, 12, 4
GRID, PATCH = (3, 5), (2, 3)
T = GRID[0] * GRID[1]
IMAGE = (B, GRID[0] * PATCH[0], GRID[1] * PATCH[1], 3)


def make_model(cls, **kwargs):
    fields = {
        'num_classes': V,
        'patch_size': PATCH,
        'width': D,
        'depth': 3,
        'mlp_dim': 13,
        'num_heads': N,
        **({'num_local_layers': 2} if cls is ConViT else {}),
    }
    return cls(**{**fields, **kwargs})


MODELS = {'ViT': make_model(ViT), 'ConViT': make_model(ConViT)}


@partial(jax.jit, static_argnums=0)
def run(model, params, image):
    return attention_maps(model, {'params': params}, image)


def make_inputs(model, shape=IMAGE):
    (image,) = reference.random_arrays(0, shape)
    return reference.random_params(model, image, scale=0.5), image


def block_weights(params, x, grid):
    """The attention weights of an encoder block: GPSA's where there is a grid."""
    y, params = reference.layer_norm(params['norm1'], x), params['attention']
    query, key = (reference.heads(params[name], y) for name in ('query', 'key'))
    if grid is None:
        return reference.attention(query, key, key)[1]
    kernel, gating = params['position_kernel'], params['gating']
    return reference.gpsa_weights(query, key, kernel, gating, grid)


def loops(name, params, image):
    """The weights of the three blocks, each from the tokens that really reach it."""
    params = reference.float64(params)
    x = reference.patch_embed(params['patches']['embed'], image, PATCH)
    x = x.reshape(B, T, D) + params['posemb']['grid'].reshape(T, D)
    token = np.repeat(params['class_token']['cls'], B, axis=0)
    local = 2 if name == 'ConViT' else 0
    weights = []
    for i in range(3):
        if i == local:
            prefix = token if local else token + params['posemb']['prefix']
            x = np.concatenate([prefix, x], axis=1)
        grid = GRID if i < local else None
        attend = partial(reference.gpsa, grid=grid) if grid else None
        block = params[f'block{i:02d}']
        weights.append(block_weights(block, x, grid))
        x = reference.encoder_block(block, x, attend or reference.multi_head_attention)
    return weights


class Shared(nn.Module):
    """Two encoder blocks, each called twice, in turn; then their parent attends."""

    scanned: bool = False

    @nn.compact
    def __call__(self, image, *, train=False):
        x = PatchEmbed(D, PATCH, name='patches')(image).reshape(len(image), -1, D)
        attention = partial(MultiHeadAttention, num_heads=N)
        blocks = [EncoderBlock(attention, mlp_dim=13, name=name) for name in 'ab']
        for block in (blocks * 2)[: 4 if not self.scanned else 0]:
            x = block(x, train=train)
        if self.scanned:
            repeat = nn.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={'params': 0, 'intermediates': 0},
                split_rngs={'params': True},
                length=3,
            )
            x, _ = repeat(blocks[0], x, None)
        return x.mean(axis=1)


def test_a_module_that_is_called_again_makes_another_layer():
    """In the order of the calls a, b, a, b, not a, a, b, b."""
    model = Shared()
    params, image = make_inputs(model)
    maps = run(model, params, image)
    assert [layer.name for layer in maps.layers] == ['a', 'b', 'a#2', 'b#2']
    params = reference.float64(params)
    x = reference.patch_embed(params['patches']['embed'], image, PATCH)
    x, flow = x.reshape(B, T, D), np.eye(T)
    for layer, name in zip(maps.layers, 'abab', strict=True):
        expected = block_weights(params[name], x, None)
        reference.assert_close(layer.weights, expected, 5e-5)
        flow = (expected.mean(axis=1) + np.eye(T)) / 2 @ flow
        x = reference.encoder_block(params[name], x)
    reference.assert_close(maps.rollout.weights[:, 0], flow, 5e-5)


def test_rematerialised_layers_are_counted_once():
    """A transformation may trace a module more than once for one call."""

    class Remat(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            again = nn.remat(Sow)((4, 5), (4, 5), name='again')
            return again(again(Sow((4, 5), (2, 3), name='once')(x))).mean(axis=(1, 2))

    maps = run(Remat(), {}, np.ones((B, 4, 4, 1), np.float32))
    assert [layer.name for layer in maps.layers] == ['once', 'again', 'again#2']


def distance_loops(weights):
    """Non-locality by loops over pairs of patches, prefix tokens left out."""
    prefix = weights.shape[-1] - T
    out = np.zeros(weights.shape[:2])
    for i, j in np.ndindex(T, T):
        _, _, square = reference.relative_position(i, j, GRID)
        out += weights[:, :, prefix + i, prefix + j] * math.sqrt(square) / T
    return out


@pytest.mark.parametrize('name', MODELS)
def test_maps_are_those_of_the_loops(name):
    model = MODELS[name]
    params, image = make_inputs(model)
    maps = run(model, params, image)
    assert [layer.name for layer in maps.layers] == ['block00', 'block01', 'block02']
    for layer, expected in zip(maps.layers, loops(name, params, image), strict=True):
        prefix = expected.shape[-1] - T
        assert layer.num_prefix == prefix
        assert layer.grid == layer.key_grid == GRID
        reference.assert_close(layer.weights, expected, 5e-5)
        cells = expected[:, :, prefix:, prefix:].reshape(B, N, *GRID, *GRID)
        reference.assert_close(layer.grid_weights, cells, 5e-5)
        tokens = expected[:, :, :prefix, prefix:].reshape(B, N, prefix, *GRID)
        reference.assert_close(layer.prefix_weights, tokens, 5e-5)
        reference.assert_close(layer.non_locality, distance_loops(expected), 5e-5)
    prefixes = [layer.num_prefix for layer in maps.layers]
    assert prefixes == ([0, 0, 1] if name == 'ConViT' else [1, 1, 1])
    assert maps.pool is None


@pytest.mark.parametrize(
    ('pool', 'distilled', 'num_registers'),
    [
        ('cls', True, 0),
        ('cls', False, 3),
        ('cls', True, 3),
        ('mean', False, 3),
        ('map', False, 3),
    ],
)
def test_all_prefix_tokens_are_kept_apart(pool, distilled, num_registers):
    """Class token, distillation token, registers, then the cells, each in its row."""
    model = make_model(
        ViT, depth=1, distilled=distilled, num_registers=num_registers, pool=pool
    )
    params, image = make_inputs(model)
    maps = run(model, params, image)
    (layer,) = maps.layers
    prefix = (pool == 'cls') + distilled + num_registers
    assert model.num_prefix_tokens == layer.num_prefix == prefix
    expected = block_weights(
        reference.float64(params['block00']), tokens_by_kind(params, image), None
    )
    cells = expected[:, :, :prefix, prefix:].reshape(B, N, prefix, *GRID)
    reference.assert_close(layer.weights, expected, 5e-5)
    reference.assert_close(layer.prefix_weights, cells, 5e-5)
    reference.assert_close(layer.non_locality, distance_loops(expected), 5e-5)
    assert maps.rollout.num_prefix == prefix
    if pool == 'map':
        reference.assert_close(maps.pool.sum(axis=(2, 3)), np.ones((B, N)))


def tokens_by_kind(params, image):
    """What the first block is given: every kind of token that has parameters."""
    params = reference.float64(params)
    x = reference.patch_embed(params['patches']['embed'], image, PATCH)
    x = x.reshape(B, T, D) + params['posemb']['grid'].reshape(T, D)
    rows = []
    for i, name in enumerate(('cls', 'dist')):
        if name in params.get('class_token', ()):
            rows.append(params['class_token'][name][0] + params['posemb']['prefix'][i])
    if 'registers' in params:
        rows.append(params['registers']['tokens'][0])
    return np.stack([np.concatenate([*rows, tokens]) for tokens in x])


@pytest.mark.parametrize('name', MODELS)
def test_the_logits_are_those_of_the_model(name):
    """Without dropout, as in evaluation."""
    model = MODELS[name].clone(dropout_rate=0.5, attention_dropout_rate=0.5)
    params, image = make_inputs(model)
    expected = reference.apply(model, params, image)
    reference.assert_close(run(model, params, image).logits, expected)


def test_gates_are_those_of_the_gpsa_layers():
    params, image = make_inputs(MODELS['ConViT'])
    *local, last = run(MODELS['ConViT'], params, image).layers
    for layer in local:
        gating = np.asarray(params[layer.name]['attention']['gating'])
        reference.assert_close(layer.gates, reference.sigmoid(gating))
    assert last.gates is None


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('impl', ['xla', 'chunked', 'dense'])
def test_maps_do_not_depend_on_how_attention_is_computed(name, impl):
    model = MODELS[name]
    params, image = make_inputs(model)
    expected = run(model, params, image)
    actual = run(model.clone(attention_impl=impl), params, image)
    jax.tree.map(reference.assert_close, actual, expected)


@pytest.mark.parametrize('name', MODELS)
def test_non_locality_is_that_of_the_tokens_that_reach_a_layer(name):
    """Not of the patch embeddings: another first block, other distances after it."""
    model = MODELS[name]
    params, image = make_inputs(model)
    before = run(model, params, image)
    kernel = params['block00']['mlp']['fc2']['kernel']
    params['block00']['mlp']['fc2']['kernel'] = -kernel
    after = run(model, params, image)
    first, second, third = (
        np.abs(np.subtract(a.non_locality, b.non_locality)).min()
        for a, b in zip(before.layers, after.layers)
    )
    assert first == 0
    assert second > 1e-4
    assert third > 1e-4


def random_weights(seed, *shape):
    (logits,) = reference.random_arrays(seed, shape)
    weights = np.exp(logits)
    return np.float32(weights / weights.sum(axis=-1, keepdims=True))


def test_rollout_equals_the_loops():
    """Also where a token joins later and the layers have other numbers of heads."""
    weights = [
        random_weights(0, B, 3, 5, 5),
        random_weights(1, B, 2, 5, 5),
        random_weights(2, B, 3, 7, 7),
    ]
    expected = np.zeros((B, 7, 7))
    for b in range(B):
        flow = np.eye(7)
        for layer in weights:
            step = np.eye(7)
            absent = 7 - layer.shape[-1]
            for i, j in np.ndindex(layer.shape[2:]):
                mean = sum(layer[b, n, i, j] for n in range(layer.shape[1]))
                mean /= layer.shape[1]
                step[absent + i, absent + j] = (mean + (i == j)) / 2
            flow = step @ flow
        expected[b] = flow
    out = rollout([jnp.asarray(layer) for layer in weights])
    reference.assert_close(out, expected)
    reference.assert_close(out.sum(axis=-1), np.ones((B, 7)))


def test_rollout_normalises_rows():
    """Of a query that sees nothing, only the residual is left."""
    weights = jnp.asarray([[[[0.0, 0.0], [0.25, 0.75]]]])
    reference.assert_close(rollout([weights]), [[[1.0, 0.0], [0.125, 0.875]]])


@pytest.mark.parametrize('name', MODELS)
def test_rollout_of_a_model_is_that_of_its_layers(name):
    params, image = make_inputs(MODELS[name])
    maps = run(MODELS[name], params, image)
    expected = rollout([layer.weights for layer in maps.layers])[:, None]
    reference.assert_close(maps.rollout.weights, expected)
    assert maps.rollout.prefix_weights.shape == (B, 1, 1, *GRID)


def test_non_locality_by_hand():
    """Three queries in a row look 2 cells away, half a cell, and at themselves."""
    weights = np.zeros((1, 1, 1, 3, 1, 3), np.float32)
    weights[0, 0, 0, 0, 0, 2] = 1.0
    weights[0, 0, 0, 1, 0, [0, 1]] = 0.5
    weights[0, 0, 0, 2, 0, 2] = 1.0
    reference.assert_close(non_locality(weights), [[2.5 / 3]])


def test_non_locality_with_keys_on_a_coarser_grid():
    """Of 6 rows and of 3 that span the same image; the columns are shared."""
    weights = np.zeros((1, 1, 6, 2, 3, 2), np.float32)
    for row, column in np.ndindex(6, 2):
        weights[0, 0, row, column, 1, 0] = 1.0  # its centre lies at row 2.5, column 0
    expected = [
        math.hypot(row - 2.5, column) for row in range(6) for column in range(2)
    ]
    reference.assert_close(non_locality(weights), [[np.mean(expected)]])


def test_non_locality_in_three_axes():
    weights = np.zeros((1, 1, 2, 3, 5, 2, 3, 5), np.float32)
    weights[0, 0, 0, 0, 0, 1, 2, 4] = 1.0
    reference.assert_close(non_locality(weights), [[math.sqrt(21) / 30]])


@pytest.mark.parametrize(
    ('patch', 'shape', 'grid'),
    [(3, (B, 15, 2), (5,)), ((2, 3, 1), (B, 4, 9, 5, 1), (2, 3, 5))],
)
def test_grids_of_sequences_and_videos(patch, shape, grid):
    model = make_model(ViT, patch_size=patch, depth=1)
    params, x = make_inputs(model, shape)
    (layer,) = run(model, params, x).layers
    assert layer.grid_weights.shape == (B, N, *grid, *grid)
    assert layer.prefix_weights.shape == (B, N, 1, *grid)
    assert layer.non_locality.shape == (B, N)


def test_attention_pooling_is_apart():
    model = make_model(ViT, depth=1, pool='map')
    params, image = make_inputs(model)
    maps = run(model, params, image)
    assert [layer.name for layer in maps.layers] == ['block00']
    assert maps.pool.shape == (B, N, *GRID)
    reference.assert_close(maps.pool.sum(axis=(2, 3)), np.ones((B, N)))
    pool = reference.float64(params['head']['pool'])
    tokens = pool_inputs(params, image)
    probe = np.repeat(pool['probe'], B, axis=0)
    query = reference.heads(pool['attention']['query'], probe)
    key = reference.heads(pool['attention']['key'], tokens)
    expected = reference.attention(query, key, key)[1].reshape(B, N, *GRID)
    reference.assert_close(maps.pool, expected, 5e-5)


def pool_inputs(params, image):
    """What the pooling is given, by NumPy."""
    params = reference.float64(params)
    x = reference.patch_embed(params['patches']['embed'], image, PATCH)
    x = x.reshape(B, T, D) + params['posemb']['grid'].reshape(T, D)
    x = reference.encoder_block(params['block00'], x)
    return reference.layer_norm(params['head']['norm'], x)


class Sow(nn.Module):
    """Sows planted weights, as the attention of a CNN does."""

    grid: tuple
    key_grid: tuple

    @nn.compact
    def __call__(self, x, *, train=False):
        weights = random_weights(0, len(x), 3, *self.grid, *self.key_grid)
        self.sow('intermediates', 'attention_weights', jnp.asarray(weights))
        return x


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = Sow((4, 5), (4, 5), name='zeta')(x)
        alpha = Sow((4, 6), (2, 3), name='alpha')
        return alpha(alpha(x)).mean(axis=(1, 2))


def test_layers_of_cnns_lie_on_grids_of_their_own():
    """In the order of the forward pass; a module called twice makes two layers."""
    image = np.ones((B, 4, 4, 1), np.float32)
    maps = run(ConvNet(), {}, image)
    assert [layer.name for layer in maps.layers] == ['zeta', 'alpha', 'alpha#2']
    grids = [((4, 5), (4, 5)), ((4, 6), (2, 3)), ((4, 6), (2, 3))]
    for layer, (grid, keys) in zip(maps.layers, grids):
        assert (layer.grid, layer.key_grid, layer.num_prefix) == (grid, keys, 0)
        expected = random_weights(0, B, 3, *grid, *keys)
        reference.assert_close(layer.grid_weights, expected)
        reference.assert_close(layer.non_locality, non_locality(expected))
    assert maps.rollout is None


@pytest.mark.parametrize(
    ('name', 'grids', 'prefix'),
    [
        (
            'BoTNet-50',
            {'stage4_block1/conv2': (4, 6), 'stage4_block3/conv2': (2, 3)},
            0,
        ),
        ('R26+ViT-S/32', {'block00': (2, 3), 'block11': (2, 3)}, 1),
    ],
)
def test_models_that_convolve_and_attend(name, grids, prefix):
    model = build_model(name, V)
    image = jax.ShapeDtypeStruct((B, 64, 96, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    maps = jax.eval_shape(partial(attention_maps, model), variables, image)
    layers = {layer.name: layer for layer in maps.layers}
    for name, grid in grids.items():
        assert layers[name].grid == layers[name].key_grid == grid
        assert layers[name].num_prefix == prefix
    assert (maps.rollout is None) == (prefix == 0)


def test_hybrids_run_under_jit():
    """As the docstring says: jitted with the model static."""
    model = build_model(
        'R26+ViT-S/32',
        V,
        width=8,
        depth=1,
        mlp_dim=8,
        num_heads=2,
        stem_kwargs={'stage_sizes': (1, 1, 1, 1), 'width': 32},
    )
    image = np.ones((1, 32, 64, 3), np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), image)
    mapped = jax.jit(attention_maps, static_argnums=0)
    maps = mapped(model, variables, image)
    (layer,) = maps.layers
    assert layer.grid_weights.shape == (1, 2, 1, 2, 1, 2)
    reference.assert_close(layer.weights.sum(axis=-1), np.ones((1, 2, 3)))
    reference.assert_close(maps.logits, jax.jit(model.apply)(variables, image))


class Tokens(nn.Module):
    """Attention among tokens that come from elsewhere, or not all from patches."""

    embeds: int
    queries: int = 6
    keys: int = 6

    @nn.compact
    def __call__(self, x, *, train=False):
        grids = [PatchEmbed(8, 2, name=f'patches{i}')(x) for i in range(self.embeds)]
        tokens = (grids[0] if grids else x).reshape(len(x), -1, 8)
        source = jnp.concatenate([tokens, tokens], axis=1)[:, : self.keys]
        attention = MultiHeadAttention(2, name='attention')
        return attention(tokens[:, : self.queries], source).mean(axis=1)


@pytest.mark.parametrize(
    ('model', 'message'),
    [
        (
            build_model('CNN', 3, widths=(8,), strides=(1,)),
            'CNN has no attention to map: none of its modules sows attention_weights',
        ),
        (
            Tokens(embeds=0),
            'Tokens has 0 PatchEmbed modules; maps of tokens need one, on whose grid '
            'the tokens lie',
        ),
        (Tokens(embeds=2), 'Tokens has 2 PatchEmbed modules'),
        (
            Shared(scanned=True),
            r'the weights of a have rank 5; maps need \[B, N, T, S\], or \[B, N, '
            r'\*grid, \*key_grid\] in a CNN, of one layer: not the stacked layers of '
            r'nn.scan\b',
        ),
        (Sow((3,), ()), 'the weights of Sow have rank 3; maps need'),
        (Sow((), ()), 'the weights of Sow have rank 2; maps need'),
        (
            Tokens(embeds=1, keys=7),
            'attention attends from 6 to 7 tokens; maps need attention among the 2x3 '
            'patches and the tokens before them',
        ),
        (Tokens(embeds=1, queries=5, keys=5), 'attention attends from 5 to 5 tokens'),
    ],
)
def test_models_that_cannot_be_mapped(model, message):
    image = jnp.ones((1, 4, 6, 8))
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    with pytest.raises(UserError, match=f'^{message}'):
        jax.eval_shape(partial(attention_maps, model), variables, image)


def test_images_of_other_channels():
    params, _ = make_inputs(MODELS['ViT'])
    message = 'the model takes images of 3 channels; got 1'
    with pytest.raises(UserError, match=message):
        attention_maps(MODELS['ViT'], {'params': params}, jnp.ones((*IMAGE[:3], 1)))
