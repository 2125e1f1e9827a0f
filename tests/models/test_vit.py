import jax
import jax.numpy as jnp
import model_checks
import numpy as np
import numpy_reference as reference
import pytest
from flax import linen as nn

from vit_jax.errors import UserError
from vit_jax.models.vit import ViT

B, V, D, F = 2, 7, 12, 17
GRID, PATCH = (4, 9), (2, 3)
IMAGE = (B, GRID[0] * PATCH[0], GRID[1] * PATCH[1], 3)


def make_model(**kwargs):
    fields = {
        'num_classes': V,
        'patch_size': PATCH,
        'width': D,
        'depth': 2,
        'mlp_dim': F,
        'num_heads': 3,
    }
    return ViT(**{**fields, **kwargs})


def loops(params, image, pool, eps, variant):
    """The forward pass in NumPy, with learned positions."""
    x = reference.patch_embed(params['patches']['embed'], image, PATCH)
    x = x.reshape(B, -1, D)
    positions = params['posemb']['grid'].reshape(-1, D)
    if pool == 'cls':
        token = np.repeat(params['class_token']['cls'], B, axis=0)
        x = np.concatenate([token, x], axis=1)
        positions = np.concatenate([params['posemb']['prefix'], positions])
    x = x + positions
    for name in ('block00', 'block01'):
        x = reference.encoder_block(params[name], x, eps=eps, variant=variant)
    x = reference.layer_norm(params['head']['norm'], x, eps)
    x = x[:, 0] if pool == 'cls' else x.mean(axis=1)
    return reference.linear(params['head']['logits'], x)


@pytest.mark.parametrize(
    ('pool', 'eps', 'variant'), [('cls', 1e-6, 'gelu'), ('mean', 0.5, 'gelu_tanh')]
)
def test_forward_pass_on_a_rectangular_grid_equals_the_loops(pool, eps, variant):
    fields = {'layer_norm_eps': eps, 'activation': variant} if eps != 1e-6 else {}
    model = make_model(pool=pool, **fields)
    (image,) = reference.random_arrays(0, IMAGE)
    params = reference.random_params(model, image)
    out = reference.apply(model, params, image)
    assert out.dtype == jnp.float32
    expected = loops(reference.float64(params), image, pool, eps, variant)
    reference.assert_close(out, expected, 5e-5)


def test_class_token_gets_a_gradient():
    model = make_model(depth=1)
    (image,) = reference.random_arrays(0, IMAGE)
    params = reference.random_params(model, image)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: jnp.sum(model.apply({'params': p}, image)[:, 0]))(
            params
        )

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
        # A bias of the keys shifts all logits of a query: the softmax ignores it.
        if path[-2:] != tuple(map(jax.tree_util.DictKey, ('key', 'bias'))):
            assert np.any(np.abs(leaf) > 1e-5), jax.tree_util.keystr(path)


def shuffle_patches(image, order):
    (rows, cols), (h, w) = GRID, PATCH
    x = image.reshape(B, rows, h, cols, w, 3).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(B, rows * cols, h, w, 3)[:, order]
    x = x.reshape(B, rows, cols, h, w, 3).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(image.shape)


@pytest.mark.parametrize(
    ('posemb', 'blind'), [('none', True), ('learned', False), ('sincos2d', False)]
)
def test_without_positions_the_order_of_patches_is_invisible(posemb, blind):
    model = make_model(posemb=posemb, pool='mean')
    (image,) = reference.random_arrays(0, IMAGE)
    shuffled = shuffle_patches(image, np.random.default_rng(1).permutation(36))
    params = reference.random_params(model, image)
    out = reference.apply(model, params, image)
    other = reference.apply(model, params, shuffled)
    assert np.allclose(out, other, atol=2e-5) == blind


@pytest.mark.parametrize('pool', ['cls', 'map'])
def test_bfloat16_reaches_every_module(pool):
    model = make_model(pool=pool, dtype=jnp.bfloat16, representation_size=5)
    float32 = ['', 'head', 'head/logits']
    model_checks.check_dtype_reaches_every_module(model, IMAGE, float32)


class Brighten(nn.Module):
    """A stem that keeps the image's size."""

    factor: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image, *, train=False):
        return self.factor * image.astype(self.dtype)


def test_every_field_matters():
    others = {
        'num_classes': 5,
        'patch_size': (4, 9),
        'stem': None,
        'stem_kwargs': {'factor': 2.0},
        'width': 15,
        'depth': 1,
        'mlp_dim': 11,
        'num_heads': 4,
        'attention': Constant,
        'posemb': 'none',
        'pool': 'map',
        'representation_size': 5,
        'qkv_bias': False,
        'dropout_rate': 0.1,
        'attention_dropout_rate': 0.1,
        'drop_path_rate': 0.1,
        'layer_norm_eps': 1e-5,
        'activation': 'gelu_tanh',
        'attention_impl': 'chunked',
        'kernel_init': nn.initializers.ones,
        'head_init': nn.initializers.ones,
        'token_init': nn.initializers.ones,
        'dtype': jnp.bfloat16,
    }

    def make(**kwargs):
        return make_model(**{'stem': Brighten, **kwargs})

    model_checks.check_every_field_matters(make, IMAGE, others)


def test_dropout_also_of_the_embeddings():
    model = make_model(depth=0)
    dropping = make_model(depth=0, dropout_rate=0.1)
    fingerprint = model_checks.fingerprint
    assert fingerprint(model, IMAGE) != fingerprint(dropping, IMAGE)


def test_kernel_init_reaches_every_map_of_the_blocks():
    model = make_model(kernel_init=model_checks.half_zeros, depth=1)
    params = reference.init_shapes(model, jnp.ones(IMAGE))
    kernels = model_checks.leaves(params['block00'], 'kernel')
    assert [kernel.dtype for kernel in kernels] == [jnp.float16] * 6


class Constant(nn.Module):
    """An attention that attends to nothing; takes the fields of ours."""

    num_heads: int
    qkv_bias: bool
    dropout_rate: float
    impl: str
    kernel_init: nn.initializers.Initializer
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, *, train=False):
        return jnp.ones_like(x)


@pytest.mark.parametrize(('size', 'patch'), [((15,), 3), ((4, 6, 10), 2)])
def test_sequences_and_videos_are_classified_too(size, patch):
    model = make_model(patch_size=patch)
    x = jax.ShapeDtypeStruct((B, *size, 5), jnp.float32)
    out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert out.shape == (B, V)
    grid = tuple(n // patch for n in size)
    assert variables['params']['posemb']['grid'].shape == (*grid, D)


def test_parameters_of_another_grid_of_as_many_patches_are_refused():
    model = make_model(patch_size=2)
    square = jax.ShapeDtypeStruct((1, 12, 12, 3), jnp.float32)
    variables = {'params': reference.init_shapes(model, square)}
    oblong = jax.ShapeDtypeStruct((1, 8, 18, 3), jnp.float32)
    message = 'grid of 6x6 patches; this input has 4x9'
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.apply, variables, oblong)


def test_image_that_patches_do_not_divide_is_told():
    message = 'patch 2x3 does not divide the image 8x28'
    with pytest.raises(UserError, match=message):
        reference.init_shapes(make_model(), jnp.ones((1, 8, 28, 3)))
