"""Attention inside CNNs in plain NumPy and float64, position by position.

Nothing here calls `vit_jax`. Maps are `[B, R, C, D]`, queries, keys and values of
heads `[B, R, C, N, H]`, weights `[B, N, R, C, R', C']`. Beside the references,
`array_sizes` says what a program holds.
"""

import math

import jax
import numpy as np
from numpy_reference import softmax


def array_sizes(jaxpr):
    """The number of entries of each array of a program, loops included."""
    sizes = set()
    for equation in jaxpr.eqns:
        sizes |= {math.prod(var.aval.shape) for var in equation.outvars}
        for value in jax.tree.leaves(tuple(equation.params.values())):
            if hasattr(value, 'eqns') or hasattr(value, 'jaxpr'):
                sizes |= array_sizes(getattr(value, 'jaxpr', value))
    return sizes


def windows(size, kernel, strides, before):
    """The rows that each window sees, of those that exist."""
    starts = range(-before, size - before, strides)
    count = math.ceil(size / strides)
    return [
        [i for i in range(start, start + kernel) if 0 <= i < size]
        for start in list(starts)[:count]
    ]


def pool(x, kernel, strides, before, reduce=np.mean):
    rows, cols = (windows(n, kernel, strides, before) for n in x.shape[1:3])
    out = np.zeros((len(x), len(rows), len(cols), x.shape[3]))
    for i, row in enumerate(rows):
        for j, col in enumerate(cols):
            out[:, i, j] = reduce(x[:, row][:, :, col], axis=(1, 2))
    return out


def convolution(kernel, x, strides):
    """Zeros around, half a kernel on each side."""
    half = len(kernel) // 2
    shape = [math.ceil(n / strides) for n in x.shape[1:3]]
    out = np.zeros((len(x), *shape, kernel.shape[-1]))
    for i, j, di, dj in np.ndindex(*shape, *kernel.shape[:2]):
        row, col = i * strides + di - half, j * strides + dj - half
        if 0 <= row < x.shape[1] and 0 <= col < x.shape[2]:
            out[:, i, j] += x[:, row, col] @ kernel[di, dj]
    return out


def heads(params, x):
    """`[B, R, C, D]` -> `[B, R, C, N, H]`."""
    return np.einsum('brcd,dnh->brcnh', x, params['kernel'])


def attend(query, key, value, logit):
    """Softmax over the keys for which `logit(b, n, i, j)` is a number, not None."""
    batch, *grid, num_heads, _ = query.shape
    key_grid = key.shape[1:3]
    weights = np.zeros((batch, num_heads, *grid, *key_grid))
    out = np.zeros((batch, *grid, num_heads, value.shape[-1]))
    for b, n in np.ndindex(batch, num_heads):
        for i in np.ndindex(*grid):
            logits = {j: logit(b, n, i, j) for j in np.ndindex(*key_grid)}
            seen = [j for j, value_ in logits.items() if value_ is not None]
            for j, weight in zip(seen, softmax(np.array([logits[j] for j in seen]))):
                weights[(b, n, *i, *j)] = weight
                out[(b, *i, n)] += weight * value[(b, *j, n)]
    return out, weights


def global_attention(query, key, value, rows=None, columns=None):
    """q . (k + r) / sqrt(H), tables shared by the heads; without tables, r is 0."""
    (num_rows, num_cols), size = query.shape[1:3], query.shape[-1]

    def logit(b, n, i, j):
        if rows is None:
            return query[(b, *i, n)] @ key[(b, *j, n)] / math.sqrt(size)
        position = (
            rows[j[0] - i[0] + num_rows - 1] + columns[j[1] - i[1] + num_cols - 1]
        )
        return query[(b, *i, n)] @ (key[(b, *j, n)] + position) / math.sqrt(size)

    return attend(query, key, value, logit)


def local_attention(query, key, value, rows, columns):
    """q . (k + r) over the neighbours that exist; rows and columns share r."""
    half = len(rows) // 2

    def logit(b, n, i, j):
        down, right = j[0] - i[0], j[1] - i[1]
        if abs(down) > half or abs(right) > half:
            return None
        position = np.concatenate([rows[down + half, n], columns[right + half, n]])
        return query[(b, *i, n)] @ (key[(b, *j, n)] + position)

    return attend(query, key, value, logit)


def flat(x):
    return x.reshape(*x.shape[:3], -1)


def sagan(params, x, key_pool=1, strides=1):
    if 'project' in params:
        x = x @ params['project']['kernel']
    query, key, value = (
        (x @ params[name]['kernel'])[..., None, :] for name in ('query', 'key', 'value')
    )
    key, value = (
        pool(flat(y), key_pool, key_pool, 0, np.max)[..., None, :] for y in (key, value)
    )

    def logit(b, n, i, j):
        return query[(b, *i, n)] @ key[(b, *j, n)]

    out, weights = attend(query, key, value, logit)
    out = x + params['gamma'] * flat(out) @ params['out']['kernel']
    return pool(out, strides, strides, 0), weights


def project(params, x):
    return [heads(params[name], x) for name in ('query', 'key', 'value')]


def augmented_conv(params, x, strides=1):
    parts = []
    if 'conv' in params:
        parts.append(convolution(params['conv']['kernel'], x, strides))
    x = pool(x, 2 * strides - 1, strides, strides - 1)
    position = params['relative_position']
    out, weights = global_attention(
        *project(params, x), position['rows'], position['columns']
    )
    out = np.einsum('brcnh,nhd->brcd', out, params['out']['kernel'])
    return np.concatenate([*parts, out], axis=-1), weights


def botnet(params, x, strides=1):
    position = params['relative_position']
    out, weights = global_attention(
        *project(params, x), position['rows'], position['columns']
    )
    return pool(flat(out), strides, strides, 0), weights


def local(params, x, strides=1):
    out, weights = local_attention(
        *project(params, x), params['rows'], params['columns']
    )
    return pool(flat(out), strides, strides, 0), weights


def mixture(params, a, b):
    """p(a, b, m) for every m."""
    place = params['rows'][a] + params['columns'][b]
    return softmax(np.array([place @ mixture for mixture in params['mixtures']]))


def attention_stem(params, x, side, num_heads):
    query, key = (heads(params[name], x) for name in ('query', 'key'))
    value = np.zeros(query.shape)
    for i, j in np.ndindex(x.shape[1:3]):
        p = mixture(params['value'], i % side, j % side)
        kernel = sum(
            p[m] * kernel for m, kernel in enumerate(params['value']['kernel'])
        )
        value[:, i, j] = (x[:, i, j] @ kernel).reshape(len(x), num_heads, -1)

    def logit(b, n, i, j):
        same = i[0] // side == j[0] // side and i[1] // side == j[1] // side
        return query[(b, *i, n)] @ key[(b, *j, n)] if same else None

    return flat(attend(query, key, value, logit)[0])
