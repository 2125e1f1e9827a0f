"""Generator and discriminator, against NumPy with kernels divided by SVD's values."""

from functools import partial

import conv_reference
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
import spatial_reference
from flax.traverse_util import flatten_dict

from vit_jax.errors import UserError
from vit_jax.models import (
    build_model,
    check_classifies,
    check_generates,
    check_takes_images,
)
from vit_jax.models.gan import normalized

B, Z, SHAPE = 3, 7, (4, 8, 2)
KWARGS = {
    'image_shape': SHAPE,
    'latent_dim': Z,
    'generator_widths': (16, 8),
    'discriminator_widths': (8, 16),
    'attention_rows': 4,
}


def largest(kernel):
    matrix = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])
    return np.linalg.svd(matrix, compute_uv=False)[0]


@pytest.fixture(scope='module')
def net():
    """A SAGAN of random parameters, whose power iterations have come to their end."""
    model = build_model('SAGAN', None, **KWARGS)
    variables = conv_reference.random_variables(model, (1, *SHAPE))
    latent, image = reference.random_arrays(0, (B, Z), (B, *SHAPE))

    def iterate(variables, _):
        for given, method in ((latent, 'generate'), (image, '__call__')):
            _, changed = model.apply(
                variables, given, train=True, method=method, mutable=['batch_stats']
            )
            variables = {**variables, **changed}
        return variables, None

    variables, _ = jax.jit(partial(jax.lax.scan, iterate, length=500))(variables)
    return model, variables, latent, image


def as_they_work(variables, name):
    """Float64 parameters of a net, kernels divided, and its running statistics."""
    params = reference.float64(variables['params'][name])
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x / largest(x) if path[-1].key == 'kernel' else x, params
    )
    return params, reference.float64(variables['batch_stats'][name])


def run_block(params, x, stats=None, activate=True):
    y = x
    for i in range(2):
        if stats is not None:
            y = run_norm(params[f'norm{i}'], stats[f'norm{i}'], y)
        if i or activate:
            y = np.maximum(y, 0)
        conv = params[f'conv{i}']
        y = spatial_reference.convolution(conv['kernel'], y, 1) + conv['bias']
    if 'project' in params:
        x = reference.linear(params['project'], x)
    return x + y


def run_norm(params, stats, x):
    return conv_reference.batch_norm(params, x, stats['mean'], stats['var'], 1e-5)


def upsample(x):
    out = np.zeros((len(x), 2 * x.shape[1], 2 * x.shape[2], x.shape[3]))
    for i, j in np.ndindex(*out.shape[1:3]):
        out[:, i, j] = x[:, i // 2, j // 2]
    return out


def test_the_generator(net):
    model, variables, latent, _ = net
    params, stats = as_they_work(variables, 'generator')
    x = reference.linear(params['stem'], np.asarray(latent, np.float64))
    x = x.reshape(B, 1, 2, 16)
    for i in range(2):
        block = f'block{i}'
        x = run_block(params[block], upsample(x), stats[block])
    x, _ = spatial_reference.sagan(params['attention'], x)  # behind the larger map
    x = np.maximum(run_norm(params['norm'], stats['norm'], x), 0)
    x = spatial_reference.convolution(params['conv']['kernel'], x, 1)
    expected = np.tanh(x + params['conv']['bias'])
    apply = jax.jit(partial(model.apply, method='generate', train=False))
    images = apply(variables, latent)
    reference.assert_close(images, expected, 1e-4)
    assert images.shape == (B, *SHAPE)
    assert np.std(images, axis=0).max() > 0.1  # latents count


def test_the_discriminator(net):
    model, variables, _, image = net
    params, _ = as_they_work(variables, 'discriminator')
    x = run_block(params['block0'], np.asarray(image, np.float64), activate=False)
    x, _ = spatial_reference.sagan(params['attention'], x)
    x = spatial_reference.pool(x, 2, 2, 0)
    x = spatial_reference.pool(run_block(params['block1'], x), 2, 2, 0)
    x = np.maximum(x, 0).sum(axis=(1, 2))
    expected = reference.linear(params['head'], x)[:, 0]
    logits = jax.jit(partial(model.apply, train=False))(variables, image)
    reference.assert_close(logits, expected, 1e-4)
    assert logits.shape == (B,)


def test_singular_values_are_those_of_the_svd(net):
    """Of every kernel of both nets, and of nothing else."""
    _, variables, *_ = net
    kernels = flatten_dict(variables['params'], sep='/')
    kernels = {k: x for k, x in kernels.items() if k.endswith('kernel')}
    stats = flatten_dict(variables['batch_stats'], sep='/')
    found = {k: x for k, x in stats.items() if k.endswith('/sigma')}
    assert len(found) == len(kernels)
    values = sorted(float(x) for x in found.values())
    expected = sorted(largest(x) for x in kernels.values())
    np.testing.assert_allclose(values, expected, rtol=1e-4)


# --- Spectral normalisation -----------------------------------------------------


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        dense = nn.Dense(5, use_bias=False, name='dense')
        return normalized(dense, x, train=train)


def unit(x):
    return x / np.linalg.norm(x)


def test_a_step_of_power_iteration_by_hand():
    x, kernel, u = reference.random_arrays(1, (3, 7), (7, 5), (1, 5))
    names = 'dense/kernel/u', 'dense/kernel/sigma'
    stats = dict(zip(names, (u, jnp.float32(11.0))))
    variables = {
        'params': {'dense': {'kernel': kernel}},
        'batch_stats': {'dense_spectral': stats},
    }
    w = np.asarray(kernel, np.float64)
    left = unit(w @ np.asarray(u, np.float64)[0])
    right = unit(left @ w)
    sigma = left @ w @ right
    apply = partial(Layer().apply, variables, x)
    out, changed = apply(train=True, mutable=['batch_stats'])
    reference.assert_close(out, np.asarray(x, np.float64) @ w / sigma)
    after = changed['batch_stats']['dense_spectral']
    reference.assert_close(after['dense/kernel/u'], right[None])
    reference.assert_close(after['dense/kernel/sigma'], sigma)
    # Evaluation makes the step too, and keeps nothing of it.
    again, changed = apply(train=False, mutable=['batch_stats'])
    reference.assert_close(again, out)
    assert changed['batch_stats']['dense_spectral']['dense/kernel/u'] is u


def test_the_gradient_flows_through_the_singular_value():
    """Of sum(C * x W / sigma): arXiv 1802.05957, equation 10, by the SVD."""
    x, kernel, weight = reference.random_arrays(2, (3, 7), (7, 5), (3, 5))
    w = np.asarray(kernel, np.float64)
    left, values, right = np.linalg.svd(w)
    stats = {
        'dense/kernel/u': jnp.float32(right[:1]),
        'dense/kernel/sigma': jnp.float32(values[0]),
    }

    def loss(kernel):
        variables = {
            'params': {'dense': {'kernel': kernel}},
            'batch_stats': {'dense_spectral': stats},
        }
        return jnp.sum(weight * Layer().apply(variables, x))

    flat = np.asarray(x, np.float64).T @ np.asarray(weight, np.float64)
    outer = np.outer(left[:, 0], right[0])
    expected = flat / values[0] - np.sum(flat * w) / values[0] ** 2 * outer
    reference.assert_close(jax.grad(loss)(kernel), expected, 1e-4)


# --- Nets ----------------------------------------------------------------------


def test_attention_begins_as_the_identity():
    """Both nets say what they say without it, by the other parameters."""
    latent, image = reference.random_arrays(0, (B, Z), (B, *SHAPE))
    model = build_model('SAGAN', None, **KWARGS)
    variables = jax.jit(model.init)(jax.random.key(0), image)
    rest = {
        kind: {
            net: {k: x for k, x in tree.items() if not k.startswith('attention')}
            for net, tree in nets.items()
        }
        for kind, nets in variables.items()
    }
    plain = model.clone(attention=False)
    for given, method in ((latent, 'generate'), (image, '__call__')):
        out, expected = (
            jax.jit(partial(net.apply, method=method))(tree, given)
            for net, tree in ((model, variables), (plain, rest))
        )
        np.testing.assert_array_equal(out, expected)


def test_bfloat16_reaches_the_layers():
    model = build_model('SAGAN', None, **KWARGS, dtype=jnp.bfloat16)
    latent, image = reference.random_arrays(0, (B, Z), (B, *SHAPE))
    variables = jax.jit(model.init)(jax.random.key(0), image)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.float32.dtype}
    text = str(
        jax.make_jaxpr(partial(model.apply, method='generate'))(variables, latent)
    )
    convolutions = [
        line for line in text.splitlines() if 'conv_general_dilated' in line
    ]
    assert convolutions
    assert all('bf16' in line for line in convolutions)
    assert model.apply(variables, image).dtype == jnp.float32


# --- Mistakes ------------------------------------------------------------------


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'image_shape': (8, 8, 2)}, 'of images of 8x8x2, not 4x8x2; set config.model'),
        ({'image_shape': (4, 8)}, r'image_shape is \(height, width, channels\), not'),
        ({'generator_widths': (8, 8, 8)}, 'images of 4x8 cannot be halved 3 times'),
        ({'discriminator_widths': (8, 8, 8)}, 'images of 4x8 cannot be halved 3 times'),
        (
            {'attention_rows': 1},
            'attention_rows 1 is below the rows of every map, 2, 4',
        ),
        ({'generator_widths': (8, 12)}, 'cannot reduce 12 channels by 8'),
    ],
)
def test_sizes_that_do_not_fit(values, message):
    model = build_model('SAGAN', None, **{**KWARGS, **values})
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, *SHAPE)))


def test_what_a_model_is_for():
    sagan, cnn = build_model('SAGAN', None), build_model('CNN', 3)
    check_takes_images(sagan)
    check_generates(sagan)
    check_classifies(cnn)
    with pytest.raises(UserError, match=r"^a SAGAN .* set config.task='gan'"):
        check_classifies(sagan)
    with pytest.raises(UserError, match=r'^a CNN does not generate images'):
        check_generates(cnn)
