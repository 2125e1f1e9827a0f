import jax
import jax.numpy as jnp
import model_checks
import numpy as np
import numpy_reference as reference
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

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


def loops(params, image, pool='cls', eps=1e-6, variant='gelu'):
    """The forward pass in NumPy, with learned positions; registers where there are."""
    x = reference.patch_embed(params['patches']['embed'], image, PATCH)
    x = x.reshape(B, -1, D)
    positions = params['posemb']['grid'].reshape(-1, D)
    if pool == 'cls':
        names = [name for name in ('cls', 'dist') if name in params['class_token']]
        tokens = [np.repeat(params['class_token'][k], B, axis=0) for k in names]
        x = np.concatenate([*tokens, x], axis=1)
        positions = np.concatenate([params['posemb']['prefix'], positions])
    x = x + positions
    first = x.shape[1] - 36  # of the patches
    if 'registers' in params:
        registers = np.repeat(params['registers']['tokens'], B, axis=0)
        x = np.concatenate([x[:, :first], registers, x[:, first:]], axis=1)
    for name in ('block00', 'block01'):
        x = reference.encoder_block(params[name], x, eps=eps, variant=variant)
    x = reference.layer_norm(params['head']['norm'], x, eps)
    head = params['head']
    if 'dist_logits' in head:
        by_cls = reference.linear(head['logits'], x[:, 0])
        return (by_cls + reference.linear(head['dist_logits'], x[:, 1])) / 2
    x = x[:, 0] if pool == 'cls' else x[:, -36:].mean(axis=1)
    return reference.linear(head['logits'], x)


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


class RowNumbers(nn.Module):
    """Adds the number of its row to the first feature of each patch, scaled."""

    @nn.compact
    def __call__(self, x, grid):
        scale = self.param('scale', nn.initializers.ones, ())
        rows = jnp.repeat(jnp.arange(grid[0]), grid[1])
        return x.at[:, -len(rows) :, 0].add(scale * rows)


def test_positions_may_be_a_module_of_a_fork():
    """As learned positions that hold the same."""
    (image,) = reference.random_arrays(0, IMAGE)
    model = make_model(posemb=RowNumbers)
    params = reference.random_params(model, image)
    learned = {'grid': np.zeros((*GRID, D)), 'prefix': np.zeros((1, D))}
    for row, col in np.ndindex(GRID):
        learned['grid'][row, col, 0] = row * float(params['posemb']['scale'])
    expected = loops({**reference.float64(params), 'posemb': learned}, image)
    reference.assert_close(reference.apply(model, params, image), expected, 5e-5)


@pytest.mark.parametrize(
    'fields',
    [
        {'distilled': True},
        {'num_registers': 3},
        {'num_registers': 3, 'pool': 'mean'},
        {'distilled': True, 'num_registers': 3, 'layer_scale': 0.1},
    ],
)
def test_tokens_and_factors_of_published_weights_equal_the_loops(fields):
    model = make_model(**fields)
    (image,) = reference.random_arrays(0, IMAGE)
    params = reference.random_params(model, image)
    out = reference.apply(model, params, image)
    pool = fields.get('pool', 'cls')
    reference.assert_close(out, loops(reference.float64(params), image, pool), 5e-5)


def test_attention_pooling_leaves_registers_out():
    """Of a block that does nothing: its tokens do not meet the patches there."""
    model = make_model(pool='map', num_registers=3, layer_scale=0.1, depth=1)
    (image,) = reference.random_arrays(0, IMAGE)
    params = reference.random_params(model, image)
    for name in ('layer_scale1', 'layer_scale2'):
        params['block00'][name]['scale'] *= 0.0
    out = reference.apply(model, params, image)
    params['registers']['tokens'] *= -2.0
    np.testing.assert_array_equal(reference.apply(model, params, image), out)


def test_published_tokens_and_factors_have_their_places():
    model = make_model(distilled=True, num_registers=3, layer_scale=0.1, depth=1)
    params = reference.init_shapes(model, jnp.ones(IMAGE))
    plain = reference.init_shapes(make_model(depth=1), jnp.ones(IMAGE))
    shapes, others = (
        flatten_dict(jax.tree.map(jnp.shape, tree), sep='/') for tree in (params, plain)
    )
    new = {name: shape for name, shape in shapes.items() if others.get(name) != shape}
    assert new == {
        'class_token/dist': (1, 1, D),
        'posemb/prefix': (2, D),
        'registers/tokens': (1, 3, D),
        'block00/layer_scale1/scale': (D,),
        'block00/layer_scale2/scale': (D,),
        'head/dist_logits/kernel': (D, V),
        'head/dist_logits/bias': (V,),
    }


def test_a_distillation_token_needs_a_class_token():
    with pytest.raises(UserError, match="it needs pool='cls', not 'mean'"):
        reference.init_shapes(make_model(distilled=True, pool='mean'), jnp.ones(IMAGE))


@pytest.mark.parametrize('distilled', [False, True])
def test_every_parameter_gets_a_gradient(distilled):
    model = make_model(
        depth=1, distilled=distilled, num_registers=3 * distilled, layer_scale=0.1
    )
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


@pytest.mark.parametrize(('pool', 'distilled'), [('cls', True), ('map', False)])
def test_bfloat16_reaches_every_module(pool, distilled):
    model = make_model(
        pool=pool,
        distilled=distilled,
        num_registers=3,
        layer_scale=0.1,
        dtype=jnp.bfloat16,
        representation_size=5,
    )
    float32 = ['', 'head', 'head/logits', *['head/dist_logits'] * distilled]
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
        'distilled': True,
        'num_registers': 3,
        'representation_size': 5,
        'qkv_bias': False,
        'dropout_rate': 0.1,
        'attention_dropout_rate': 0.1,
        'drop_path_rate': 0.1,
        'layer_scale': 0.1,
        'layer_norm_eps': 1e-5,
        'activation': 'gelu_tanh',
        'attention_impl': 'chunked',
        'remat': 'full',
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
