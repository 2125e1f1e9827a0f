"""Convolutional networks in plain NumPy and float64, pixel by pixel, and variables.

Nothing here calls `vit_jax`: a mistake there cannot hide behind the same one here.
"""

import jax
import jax.numpy as jnp
import numpy as np


def windows(x, size, strides, kind):
    """Yields each cell of the output, and the pixels it sees; zeros outside."""
    height, width = x.shape[1:3]
    cells = -(-height // strides), -(-width // strides)
    for row, col in np.ndindex(*cells):
        window = np.zeros((len(x), size, size, x.shape[-1]))
        for i, j in np.ndindex(size, size):
            y, z = (
                k * strides + shift - start(n, m, size, strides, kind)
                for k, shift, n, m in (
                    (row, i, height, cells[0]),
                    (col, j, width, cells[1]),
                )
            )
            if 0 <= y < height and 0 <= z < width:
                window[:, i, j] = x[:, y, z]
        yield row, col, window


def start(length, cells, size, strides, kind):
    """How far before the axis the first window begins."""
    if kind == 'symmetric':
        return (size - 1) // 2
    return max((cells - 1) * strides + size - length, 0) // 2


def convolve(x, kernel, strides, kind):
    shape = (len(x), -(-x.shape[1] // strides), -(-x.shape[2] // strides))
    out = np.zeros((*shape, kernel.shape[-1]))
    for row, col, window in windows(x, len(kernel), strides, kind):
        out[:, row, col] = np.einsum('bijc,ijcd->bd', window, kernel)
    return out


def max_pool(x, size, strides, kind):
    """Zeros outside are values too."""
    shape = (len(x), -(-x.shape[1] // strides), -(-x.shape[2] // strides))
    out = np.zeros((*shape, x.shape[-1]))
    for row, col, window in windows(x, size, strides, kind):
        out[:, row, col] = window.max(axis=(1, 2))
    return out


def standardize(kernel, eps):
    out = np.zeros(kernel.shape)
    for i in range(kernel.shape[-1]):
        one = kernel[..., i]
        out[..., i] = (one - one.mean()) / (one.std() + eps)
    return out


def batch_norm(params, x, mean, var, eps):
    return (x - mean) / np.sqrt(var + eps) * params['scale'] + params['bias']


def group_norm(params, x, groups, eps=1e-6):
    axes = (1, 2, 3)
    parts = [
        (p - p.mean(axes, keepdims=True)) / np.sqrt(p.var(axes, keepdims=True) + eps)
        for p in np.split(x, groups, axis=-1)
    ]
    return np.concatenate(parts, axis=-1) * params['scale'] + params['bias']


def random_variables(model, shape):
    """Random parameters and running statistics, of the shapes of `init`."""
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = path[-1].key
        if name == 'var':
            return jnp.asarray(rng.uniform(0.5, 2.0, leaf.shape), jnp.float32)
        centre = 1.0 if name == 'scale' else 0.0
        return jnp.asarray(rng.normal(centre, 0.3, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, dict(shapes))
