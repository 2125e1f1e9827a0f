"""The layers in plain NumPy and float64, and helpers to compare with them.

Nothing here calls `vit_jax`: a mistake there cannot hide behind the same one here.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def random_params(module, *args, scale=0.3, **kwargs):
    """Random parameters (float32) of the shapes that `module.init` gives.

    No leaf stays at zero or one, so every parameter shows in the output.
    """
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        centre = 1.0 if path[-1].key == 'scale' else 0.0
        return jnp.asarray(rng.normal(centre, scale, leaf.shape), jnp.float32)

    shapes = init_shapes(module, *args, **kwargs)
    return jax.tree_util.tree_map_with_path(fill, shapes)


def init_shapes(module, *args, **kwargs):
    """The parameters that `module.init` gives, without computing them."""
    init = partial(module.init, **kwargs)
    return jax.eval_shape(init, jax.random.key(0), *args)['params']


@partial(jax.jit, static_argnums=0, static_argnames='grid')
def init(module, *args, **kwargs):
    """The parameters that `module.init` gives, compiled."""
    return module.init(jax.random.key(0), *args, **kwargs)['params']


@partial(jax.jit, static_argnums=0, static_argnames=('grid', 'mutable', 'train'))
def apply(module, params, *args, rng=None, **kwargs):
    """`module.apply`, compiled; `rng` is the key of dropout."""
    rngs = None if rng is None else {'dropout': rng}
    return module.apply({'params': params}, *args, rngs=rngs, **kwargs)


def random_arrays(seed, *shapes):
    """Float64 arrays that float32 represents exactly."""
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=shape) for shape in shapes]
    return [np.float64(np.float32(array)) for array in arrays]


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def assert_close(actual, expected, tolerance=1e-5):
    actual = np.asarray(actual)
    assert actual.shape == np.shape(expected)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def assert_gradients_close(actual, expected):
    """By the leaf's largest and the global norm in float32, to 1e-10 in float64."""
    leaves = jax.tree.leaves(expected)
    norm = math.sqrt(sum(np.sum(np.square(np.float64(leaf))) for leaf in leaves))
    for got, want in zip(jax.tree.leaves(actual), leaves, strict=True):
        assert got.shape == want.shape
        tolerance = 1e-4 * np.abs(want).max() + 1e-6 * norm
        if got.dtype == np.float64:
            tolerance = 1e-10 * max(1.0, norm)
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


def softmax(logits):
    exp = np.exp(logits - np.max(logits))
    return exp / exp.sum()


def attention(query, key, value, bias=0.0, mask=True):
    """Row by row, a softmax over the keys that the mask keeps -> (out, weights)."""
    batch, length, heads, size = query.shape
    shape = (batch, heads, length, key.shape[1])
    bias, mask = np.broadcast_to(bias, shape), np.broadcast_to(mask, shape)
    weights, out = np.zeros(shape), np.zeros(query.shape)
    for b, n, t in np.ndindex(shape[:3]):
        keep = mask[b, n, t]
        if keep.any():
            logits = key[b, keep, n] @ query[b, t, n] / math.sqrt(size)
            weights[b, n, t, keep] = softmax(logits + bias[b, n, t, keep])
        out[b, t, n] = weights[b, n, t] @ value[b, :, n]
    return out, weights


def softmax_gradient(weights, cotangent):
    """The gradient of the logits, given that of the softmax."""
    inner = np.sum(weights * cotangent, axis=-1, keepdims=True)
    return weights * (cotangent - inner)


def attention_gradients(query, key, value, weights, cotangent):
    """Gradients of sum(out * cotangent): query, key, value and logits."""
    dquery, dkey, dvalue = (np.zeros(x.shape) for x in (query, key, value))
    dlogits = np.zeros(weights.shape)
    for b, n in np.ndindex(weights.shape[:2]):
        q, k, v = query[b, :, n], key[b, :, n], value[b, :, n]
        dout = cotangent[b, :, n]
        dlogits[b, n] = softmax_gradient(weights[b, n], dout @ v.T)
        dquery[b, :, n] = dlogits[b, n] @ k / math.sqrt(query.shape[-1])
        dkey[b, :, n] = dlogits[b, n].T @ q / math.sqrt(query.shape[-1])
        dvalue[b, :, n] = weights[b, n].T @ dout
    return dquery, dkey, dvalue, dlogits


def linear(params, x):
    return x @ params['kernel'] + params.get('bias', 0.0)


def heads(params, x):
    """`[B, T, D]` -> `[B, T, N, H]`, head by head."""
    kernel = params['kernel']  # [D, N, H]
    bias = params.get('bias', np.zeros(kernel.shape[1:]))
    return np.stack([x @ kernel[:, n] + bias[n] for n in range(len(bias))], axis=2)


def merge(params, x):
    """`[B, T, N, H]` -> `[B, T, D]`, head by head."""
    parts = [x[:, :, n] @ kernel for n, kernel in enumerate(params['kernel'])]
    return sum(parts) + params['bias']


def multi_head_attention(params, x, x_kv=None, **kwargs):
    x_kv = x if x_kv is None else x_kv
    query, key, value = (
        heads(params[name], source)
        for name, source in (('query', x), ('key', x_kv), ('value', x_kv))
    )
    return merge(params['out'], attention(query, key, value, **kwargs)[0])


def relative_position(i, j, grid):
    """(dx, dy, dx^2 + dy^2) from token i to token j, tokens numbered row by row."""
    cells = [(row, col) for row in range(grid[0]) for col in range(grid[1])]
    dy, dx = cells[j][0] - cells[i][0], cells[j][1] - cells[i][1]
    return np.array([dx, dy, dx * dx + dy * dy], np.float64)


def relative_positions(grid):
    tokens = range(grid[0] * grid[1])
    return np.array([[relative_position(i, j, grid) for j in tokens] for i in tokens])


def position_weights(kernel, grid):
    """`[N, T, T]`, row by row."""
    features = relative_positions(grid)
    rows = [
        [softmax(row @ kernel[:, n]) for row in features] for n in range(len(kernel.T))
    ]
    return np.array(rows)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def gpsa_weights(query, key, kernel, gating, grid):
    content = attention(query, key, key)[1]
    gate = sigmoid(gating)[:, None, None]
    return (1 - gate) * content + gate * position_weights(kernel, grid)


def apply_weights(weights, value):
    out = np.zeros((*value.shape[:1], weights.shape[2], *value.shape[2:]))
    for b, n in np.ndindex(weights.shape[:2]):
        out[b, :, n] = weights[b, n] @ value[b, :, n]
    return out


def gpsa(params, x, grid):
    query, key, value = (heads(params[name], x) for name in ('query', 'key', 'value'))
    weights = gpsa_weights(
        query, key, params['position_kernel'], params['gating'], grid
    )
    return merge(params['out'], apply_weights(weights, value))


def gelu(x, variant='gelu'):
    def one(v):
        if variant == 'gelu':
            return 0.5 * v * (1 + math.erf(v / math.sqrt(2)))
        return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    return np.vectorize(one)(x)


def activate(x, name):
    return np.maximum(x, 0.0) if name == 'relu' else gelu(x, name)


def mlp(params, x, variant='gelu'):
    return linear(params['fc2'], activate(linear(params['fc1'], x), variant))


def layer_norm(params, x, eps=1e-6):
    mean = x.mean(axis=-1, keepdims=True)
    variance = np.square(x - mean).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * params['scale'] + params['bias']


def layer_scale(params, i, x):
    """The `i`-th branch of a block, feature by feature times its factor, if any."""
    if f'layer_scale{i}' not in params:
        return x
    factors = params[f'layer_scale{i}']['scale']
    return np.stack([x[..., d] * factors[d] for d in range(len(factors))], axis=-1)


def encoder_block(params, x, attend=multi_head_attention, eps=1e-6, variant='gelu'):
    attended = attend(params['attention'], layer_norm(params['norm1'], x, eps))
    x = x + layer_scale(params, 1, attended)
    transformed = mlp(params['mlp'], layer_norm(params['norm2'], x, eps), variant)
    return x + layer_scale(params, 2, transformed)


def post_norm_block(params, x, eps=1e-6, variant='gelu'):
    attended = multi_head_attention(params['attention'], x)
    x = layer_norm(params['norm1'], x + layer_scale(params, 1, attended), eps)
    transformed = layer_scale(params, 2, mlp(params['mlp'], x, variant))
    return layer_norm(params['norm2'], x + transformed, eps)


def decoder_block(params, x, encoded, self_mask=True, cross_mask=True, norm_first=True):
    """Attention to the tokens before, attention to the source, MLP."""
    causal = np.array([[s <= t for s in range(x.shape[1])] for t in range(x.shape[1])])

    def attend(x):
        return multi_head_attention(
            params['self_attention'], x, mask=causal & self_mask
        )

    def cross(x):
        return multi_head_attention(
            params['cross_attention'], x, encoded, mask=cross_mask
        )

    def transform(x):
        return mlp(params['mlp'], x)

    for i, branch in enumerate((attend, cross, transform), start=1):
        norm = params[f'norm{i}']
        if norm_first:
            x = x + layer_scale(params, i, branch(layer_norm(norm, x)))
        else:
            x = layer_norm(norm, x + layer_scale(params, i, branch(x)))
    return x


def patch_embed(params, x, patch):
    """`[B, *size, C]` -> `[B, *grid, D]`, patch by patch."""
    kernel = params['kernel']  # [*patch, C, D]
    grid = [n // p for n, p in zip(x.shape[1:-1], patch)]
    out = np.zeros((len(x), *grid, kernel.shape[-1]))
    for b, *cell in np.ndindex(out.shape[:-1]):
        window = tuple(slice(i * p, (i + 1) * p) for i, p in zip(cell, patch))
        pixels = x[(b, *window)]
        out[(b, *cell)] = pixels.ravel() @ kernel.reshape(pixels.size, -1)
    return out + params['bias']
