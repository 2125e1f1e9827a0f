"""What attention, positions and convolution are, as properties of any input.

"Attention Is All You Need", arXiv 1706.03762; "ConViT", arXiv 2103.10697. Examples
are drawn the same way each time, and shapes from few, since each compiles anew.
"""

import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vit_jax.layers.attention import (
    MultiHeadAttention,
    apply_weights,
    dot_product_attention,
)
from vit_jax.layers.blocks import DecoderBlock, EncoderBlock
from vit_jax.layers.conv import Conv
from vit_jax.layers.conv_attention import (
    AugmentedConv,
    GlobalAttention,
    SAGANAttention,
)
from vit_jax.layers.local_attention import LocalAttention
from vit_jax.layers.mlp import MlpBlock
from vit_jax.layers.position import POSEMBS, shift_matrix, sincos, sincos_grid, sine
from vit_jax.layers.psa import GPSA, PSA, gated_positional_attention
from vit_jax.layers.relative import conv_init
from vit_jax.models.convit import ConViT
from vit_jax.models.vit import ViT

few = settings(derandomize=True, deadline=None, max_examples=5)
many = settings(few, max_examples=50)
seeds = st.integers(0, 2**20)
IMPLS = ('xla', 'chunked', 'dense')
GPSA_IMPLS = ('factored', 'split', 'dense')


@lru_cache
def random_params(module, *shapes):
    return reference.random_params(module, *map(jnp.zeros, shapes))


# ------------------------------------------------------------ the order of tokens

SHOWN = sorted({*POSEMBS, 'GPSA'} - {'none'})


def orders(grid):
    return st.permutations(range(math.prod(grid)))


@partial(jax.jit, static_argnums=0)
def encode(model, params, image):
    """(tokens behind the last block and norm `[B, T, D]`, logits `[B, V]`)"""
    variables = {'params': params}
    _, state = model.apply(
        variables,
        image,
        capture_intermediates=lambda module, _: module.name == 'norm',
        mutable=['intermediates'],
    )
    (tokens,) = state['intermediates']['head']['norm']['__call__']
    return tokens, model.apply(variables, image)  # here no weights are formed to sow


def make_model(kind, pool='mean'):
    """A model on single pixels, whose blocks or position embedding are of a kind."""
    fields = {'num_classes': 5, 'patch_size': 1, 'width': 12, 'depth': 2, 'mlp_dim': 7}
    fields |= {'num_heads': 4, 'pool': pool}
    if kind == 'GPSA':
        return ConViT(posemb='none', num_local_layers=1, **fields)
    return ViT(posemb=kind, **fields)


def encode_in_order(model, grid, seed, order):
    """`encode` of an image, and of the same pixels in another order."""
    (pixels,) = reference.random_arrays(seed, (2, math.prod(grid), 3))
    params = random_params(model, (2, *grid, 3))
    images = (x.reshape(2, *grid, 3) for x in (pixels, pixels[:, order]))
    return [encode(model, params, jnp.float32(image)) for image in images]


@pytest.mark.parametrize(
    ('pool', 'grid'), [('mean', (2, 3)), ('cls', (3, 5)), ('map', (3, 5))]
)
@few
@given(seed=seeds, data=st.data())
def test_without_positions_the_encoder_is_blind_to_order(pool, grid, seed, data):
    order = data.draw(orders(grid))
    model = make_model('none', pool)
    (tokens, logits), (moved, same) = encode_in_order(model, grid, seed, order)
    prefix = [0] if pool == 'cls' else []
    order = prefix + [len(prefix) + place for place in order]
    reference.assert_close(moved, tokens[:, order], 5e-5)
    reference.assert_close(same, logits, 5e-5)
    assert np.ptp(logits, axis=0).max() > 1e-2  # they depend on the image


@pytest.mark.parametrize('kind', SHOWN)
@few
@given(seed=seeds, data=st.data())
def test_positions_show_the_order(kind, seed, data):
    grid = (2, 3, 2) if kind == 'sincos3d' else (3, 5)
    order = data.draw(orders(grid))
    assume(order != sorted(order))
    (tokens, logits), (moved, other) = encode_in_order(
        make_model(kind), grid, seed, order
    )
    change = np.abs(moved - tokens[:, order]).max(axis=(0, 2))
    assert change[np.array(order) != np.arange(len(order))].min() > 1e-3
    assert np.abs(other - logits).max() > 1e-4


# ------------------------------------------------------------ shifts

shifts = st.tuples(st.integers(-2, 2), st.integers(-2, 2))
MAP = (11, 13)


def check_shift(run, x, shift, margin):
    """Shifting `x` `[B, R, C, D]` shifts run(x), but within `margin` of a border."""
    before = np.asarray(run(jnp.float32(x)))
    after = np.asarray(run(jnp.float32(np.roll(x, shift, axis=(1, 2)))))
    back = np.roll(after, [-step for step in shift], axis=(1, 2))
    change = np.abs(back - before).max(axis=(0, 3))
    inside = np.ones(MAP, bool)
    for axis, step in enumerate(shift):
        place = np.arange(MAP[axis])
        keep = [(margin <= p) & (p < MAP[axis] - margin) for p in (place, place + step)]
        inside &= np.expand_dims(keep[0] & keep[1], 1 - axis)
    assert inside.sum() >= 15
    assert change[inside].max() < 2e-5
    assert change.max() > 1e-2, 'borders would show'
    assert before[:, inside].std(axis=1).max() > 1e-2, 'so would a constant'


@pytest.mark.parametrize(
    'layer', [Conv(5, kernel_size=5), LocalAttention(4, num_heads=2, kernel_size=5)]
)
@few
@given(seed=seeds, shift=shifts.filter(any))
def test_shifted_image_shifts_the_convolution(layer, seed, shift):
    (x,) = reference.random_arrays(seed, (1, *MAP, 3))
    params = random_params(layer, x.shape)
    check_shift(partial(reference.apply, layer, params), x, shift, margin=2)


@partial(jax.jit, static_argnames=('impl', 'grid'))
def gpsa(value, query, key, kernel, gating, grid, impl):
    out = gated_positional_attention(
        query, key, value, kernel, None, gating, grid, impl=impl
    )
    return out.reshape(len(value), *grid, -1)


@pytest.mark.parametrize('impl', GPSA_IMPLS)
@few
@given(seed=seeds, shift=shifts.filter(any), strength=st.floats(2.0, 4.0))
def test_shifted_image_shifts_the_positional_half_of_gpsa(impl, seed, shift, strength):
    heads, size = 9, 2
    shape = (1, math.prod(MAP), heads, size)
    value, query, key = map(jnp.float32, reference.random_arrays(seed, *[shape] * 3))
    kernel = jnp.asarray(conv_init(heads, strength))
    gating = jnp.full(heads, 40.0)  # whose sigmoid is 1: nothing of the content

    def run(x):
        return gpsa(x.reshape(shape), query, key, kernel, gating, MAP, impl)

    image = np.asarray(value).reshape(1, *MAP, -1)
    check_shift(run, image, shift, margin=3)
    gating = jnp.full(heads, -40.0)  # and now nothing else
    with pytest.raises(AssertionError):
        check_shift(run, image, shift, margin=3)


@many
@given(
    place=st.integers(-10_000, 10_000),
    step=st.floats(-1000, 1000),
    pairs=st.sampled_from([1, 2, 3, 7]),
    wavelength=st.sampled_from([100.0, 10_000.0]),
)
def test_step_is_one_rotation_from_any_place(place, step, pairs, wavelength):
    kwargs = {'width': 2 * pairs, 'max_wavelength': wavelength}
    matrix = np.float64(shift_matrix(step, **kwargs))
    code, moved = np.float64(sincos(np.array([place, place + step]), **kwargs))
    reference.assert_close(matrix @ code, moved, 2e-6)
    reference.assert_close(matrix.T @ matrix, np.eye(2 * pairs), 1e-6)


@few
@given(grid=st.sampled_from([(5,), (5, 7), (3, 5, 7)]), data=st.data())
def test_step_on_a_grid_is_one_rotation_from_any_cell(grid, data):
    step = data.draw(st.tuples(*(st.integers(1 - n, n - 1) for n in grid)))
    code = np.float64(sincos_grid(grid, 12)).reshape(*grid, 12)
    start = tuple(slice(max(0, -d), n - max(0, d)) for n, d in zip(grid, step))
    stop = tuple(slice(max(0, d), n - max(0, -d)) for n, d in zip(grid, step))
    moved = code[start] @ np.float64(shift_matrix(step, 12)).T
    reference.assert_close(moved, code[stop], 2e-6)


@few
@given(step=st.integers(1, 50), width=st.sampled_from([2, 3, 7]))
def test_no_matrix_steps_sines_without_their_cosines(step, width):
    code = np.float64(sine(np.arange(997), width))
    before, after = code[:-step], code[step:]
    best = np.linalg.lstsq(before, after, rcond=None)[0]
    assert np.abs(before @ best - after).max() > 1e-2


# ------------------------------------------------------------ rows of weights

MODULES = {
    'self': (MultiHeadAttention(2), (2, 7, 6)),
    'cross': (MultiHeadAttention(2), (2, 7, 6), (2, 11, 3)),
    'causal': (MultiHeadAttention(2, causal=True), (2, 7, 6)),
    'PSA': (PSA(2, (3, 5)), (2, 15, 6)),
    'PSA by a table': (PSA(2, (3, 5), encoding='table'), (2, 15, 6)),
    'GPSA': (GPSA(4, (3, 5)), (2, 15, 8)),
    'SAGAN': (SAGANAttention(), (2, 3, 5, 8)),
    'SAGAN with pooled keys': (SAGANAttention(key_pool=2), (2, 3, 5, 8)),
    'augmented convolution': (AugmentedConv(7, num_heads=2), (2, 3, 5, 3)),
    'the same with strides': (AugmentedConv(7, 2, num_heads=2), (2, 5, 7, 3)),
    'global': (GlobalAttention(6, num_heads=2), (2, 3, 5, 7)),
    'local': (LocalAttention(4, num_heads=2, kernel_size=3), (2, 5, 7, 3)),
}


@pytest.mark.parametrize('case', MODULES)
@few
@given(seed=seeds, scale=st.sampled_from([0.01, 1.0, 100.0]))
def test_rows_of_every_attention_sum_to_one(case, seed, scale):
    module, *shapes = MODULES[case]
    params = random_params(module, *shapes)
    inputs = [jnp.float32(scale * x) for x in reference.random_arrays(seed, *shapes)]
    _, sown = reference.apply(module, params, *inputs, mutable='intermediates')
    (weights,) = sown['intermediates']['attention_weights']
    keys = (-1,) if weights.ndim == 4 else (-2, -1)  # [B, N, T, S] or on grids
    assert weights.ndim in (4, 6)
    assert weights.min() >= 0.0
    sums = weights.sum(axis=keys)
    reference.assert_close(sums, np.ones(sums.shape), 1e-5)
    assert np.prod([weights.shape[key] for key in keys]) > 1


@partial(jax.jit, static_argnames=('impl', 'causal'))
def attend(inputs, mask, cotangent, impl, causal):
    """The output, and the gradients of sum(out * cotangent)."""

    def run(inputs):
        return dot_product_attention(*inputs, mask=mask, causal=causal, impl=impl)

    out, vjp = jax.vjp(run, inputs)
    return out, *vjp(cotangent)


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('impl', IMPLS)
@few
@given(
    seed=seeds,
    scale=st.sampled_from([1.0, 1e4]),
    keep=st.floats(0.1, 0.6),
    row=st.integers(0, 4),
)
def test_row_that_keeps_no_key_is_zero(impl, causal, seed, scale, keep, row):
    batch, length, source, heads, size = 2, 5, 7, 3, 2
    query, key, value, cotangent = reference.random_arrays(
        seed,
        (batch, length, heads, size),
        (batch, source, heads, size),
        (batch, source, heads, size),
        (batch, length, heads, size),
    )
    mask = np.random.default_rng(seed).random((batch, heads, length, source)) < keep
    mask[1, 2, row] = False
    inputs = tuple(map(jnp.float32, (scale * query, key, value + 3.0)))
    out, grads = attend(inputs, mask, jnp.float32(cotangent), impl, causal)
    seen = mask & np.tri(length, source, dtype=bool) if causal else mask
    empty = ~seen.any(axis=-1).swapaxes(1, 2)  # [B, T, N]
    assert empty.any()
    assert not empty.all()
    np.testing.assert_array_equal(out[empty], 0.0)
    assert np.all(np.abs(np.asarray(out)[~empty]).max(axis=-1) > 1e-3)
    for grad in grads:
        assert np.all(np.isfinite(grad))
    assert np.any(grads[2] != 0.0)
    # Nor does such a row teach anything.
    alone = jnp.float32(np.where(empty[..., None], cotangent, 0.0))
    for grad in attend(inputs, mask, alone, impl, causal)[1]:
        np.testing.assert_array_equal(grad, 0.0)


# ------------------------------------------------------------ Jacobians


@partial(jax.jit, static_argnums=0, static_argnames='of')
def jacobian(module, params, *inputs, of=0, **kwargs):
    """`[T, D, S, E]`: d out[t, d] / d inputs[of][s, e], of the only example."""

    def run(x):
        changed = (*inputs[:of], x, *inputs[of + 1 :])
        out = module.apply({'params': params}, *changed, **kwargs)
        return out.reshape(-1, out.shape[-1])

    jac = jax.jacrev(run)(inputs[of])
    return jac.reshape(*jac.shape[:2], -1, jac.shape[-1])


def influence(jac):
    """`[T, S]`: how much token s of the input can change token t of the output."""
    return np.abs(np.asarray(jac)).max(axis=(1, 3))


def count_terms(jac):
    """How many products of a `[T, S]` and a `[D, E]` matrix sum to a Jacobian.

    Each aggregates tokens, whatever the feature, and transforms features, whatever
    the token.
    """
    matrix = np.float64(jac).transpose(0, 2, 1, 3)
    matrix = matrix.reshape(len(jac) * jac.shape[2], -1)
    values = np.linalg.svd(matrix, compute_uv=False)
    return int(np.sum(values > 1e-4 * values[0]))


def random_input(seed, *shape):
    return jnp.float32(reference.random_arrays(seed, shape)[0])


ATTENTION = partial(MultiHeadAttention, num_heads=2)


@pytest.mark.parametrize('impl', IMPLS)
@few
@given(seed=seeds)
def test_causal_attention_never_looks_ahead(impl, seed):
    x = random_input(seed, 1, 5, 4)
    module = ATTENTION(causal=True, impl=impl)
    params = random_params(module, x.shape)
    seen = influence(jacobian(module, params, x))
    np.testing.assert_array_equal(np.triu(seen, 1), 0.0)
    assert seen[np.tri(5, dtype=bool)].min() > 1e-5
    everywhere = influence(jacobian(ATTENTION(impl=impl), params, x))
    assert everywhere.min() > 1e-5


@pytest.mark.parametrize('norm_first', [True, False])
@few
@given(seed=seeds)
def test_decoder_sees_what_is_before_and_all_of_the_source(norm_first, seed):
    x, source = random_input(seed, 1, 5, 4), random_input(seed + 1, 1, 7, 3)
    block = DecoderBlock(ATTENTION, 6, norm_first=norm_first)
    params = random_params(block, x.shape, source.shape)
    seen = influence(jacobian(block, params, x, source))
    np.testing.assert_array_equal(np.triu(seen, 1), 0.0)
    assert seen[np.tri(5, dtype=bool)].min() > 1e-5
    assert influence(jacobian(block, params, x, source, of=1)).min() > 1e-6


@few
@given(seed=seeds)
def test_attention_mixes_tokens_and_the_mlp_does_not(seed):
    x = random_input(seed, 1, 5, 4)
    off = ~np.eye(5, dtype=bool)
    for module in (ATTENTION(), EncoderBlock(ATTENTION, 6)):
        params = random_params(module, x.shape)
        assert influence(jacobian(module, params, x))[off].min() > 1e-5
    mlp = MlpBlock(6)
    of_mlp = influence(jacobian(mlp, random_params(mlp, x.shape), x))
    np.testing.assert_array_equal(of_mlp[off], 0.0)
    assert np.diag(of_mlp).min() > 1e-3


@few
@given(seed=seeds)
def test_weights_given_attention_averages_every_feature_alike(seed):
    heads, length, source, size = 3, 2, 5, 4
    shapes = (1, heads, length, source), (1, source, heads, size)
    weights, value = map(jnp.float32, reference.random_arrays(seed, *shapes))
    jac = jax.jacrev(lambda v: apply_weights(weights, v[None])[0])(value[0])
    same = np.einsum('nm,hg->nhmg', np.eye(heads), np.eye(size))
    expected = np.einsum('nts,nhmg->tnhsmg', weights[0], same)
    np.testing.assert_array_equal(jac, expected)
    out = np.einsum('tnhsmg,smg->tnh', jac, value[0])  # so it is linear
    reference.assert_close(apply_weights(weights, value)[0], out)


@pytest.mark.parametrize('heads', [1, 3])
@few
@given(seed=seeds)
def test_head_is_one_aggregation_times_one_transformation(heads, seed):
    x, other, bias = (
        random_input(seed + i, *shape)
        for i, shape in enumerate([(1, 5, 6), (1, 5, 6), (heads, 5, 5)])
    )
    module = MultiHeadAttention(heads)
    params = random_params(module, x.shape)
    # Weights that come from the bias alone do not depend on the input.
    given_weights = {**params, 'query': jax.tree.map(jnp.zeros_like, params['query'])}
    jac = jacobian(module, given_weights, x, bias=bias)
    assert count_terms(jac) == heads
    reference.assert_close(jacobian(module, given_weights, other, bias=bias), jac)
    # Weights of the input do, and then attention is not linear.
    jacs = [jacobian(module, params, y, bias=bias) for y in (x, other)]
    assert np.abs(jacs[1] - jacs[0]).max() > 1e-2
    assert count_terms(jacs[0]) > heads


@pytest.mark.parametrize('side', [1, 3])
@few
@given(seed=seeds)
def test_convolution_aggregates_and_transforms_at_once(side, seed):
    """Each offset has a transformation of its own: k^2 terms, as of k^2 heads."""
    grid, width = (3, 5), 4
    x = random_input(seed, 1, *grid, width)
    layer = Conv(width, kernel_size=side)
    params = random_params(layer, x.shape)
    jac = jacobian(layer, params, x)
    assert count_terms(jac) == side**2
    rows, cols = np.divmod(np.arange(15), grid[1])
    near = np.maximum(abs(rows[:, None] - rows), abs(cols[:, None] - cols)) <= side // 2
    np.testing.assert_array_equal(influence(jac) > 0.0, near)
    blocks = np.asarray(jac).transpose(0, 2, 1, 3)[near].reshape(-1, width**2)
    similarity = np.abs(np.corrcoef(blocks))
    assert (similarity.min() < 0.9) == (side > 1)  # not multiples of one matrix

    heads = PSA(side**2, grid, head_dim=width, local_init=True)
    tokens = x.reshape(1, -1, width)
    params = random_params(heads, tokens.shape)
    params['query'] = jax.tree.map(jnp.zeros_like, params['query'])
    assert count_terms(jacobian(heads, params, tokens)) == side**2
