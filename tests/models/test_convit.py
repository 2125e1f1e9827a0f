import jax
import jax.numpy as jnp
import model_checks
import numpy as np
import numpy_reference as reference
import pytest
from flax import linen as nn

from vit_jax.errors import UserError
from vit_jax.models.convit import ConViT

B, V, D, F = 2, 7, 12, 17
GRID, PATCH = (4, 9), (2, 3)
IMAGE = (B, GRID[0] * PATCH[0], GRID[1] * PATCH[1], 3)


def make_model(**kwargs):
    fields = {
        'num_classes': V,
        'patch_size': PATCH,
        'width': D,
        'depth': 3,
        'mlp_dim': F,
        'num_heads': 4,
        'num_local_layers': 2,
    }
    return ConViT(**{**fields, **kwargs})


def loops(params, image, pool, num_local_layers, eps, variant):
    """The forward pass in NumPy: the class token joins after the local blocks."""

    def attend_locally(params, x):
        return reference.gpsa(params, x, GRID)

    x = reference.patch_embed(params['patches']['embed'], image, PATCH)
    x = x.reshape(B, -1, D) + params['posemb']['grid'].reshape(-1, D)
    for i in range(3):
        if i == num_local_layers and pool == 'cls':
            token = np.repeat(params['class_token']['cls'], B, axis=0)
            x = np.concatenate([token, x], axis=1)
        local = i < num_local_layers
        attend = attend_locally if local else reference.multi_head_attention
        block = params[f'block{i:02d}']
        x = reference.encoder_block(block, x, attend, eps, variant)
    x = reference.layer_norm(params['head']['norm'], x, eps)
    x = x[:, 0] if pool == 'cls' else x.mean(axis=1)
    return reference.linear(params['head']['logits'], x)


@pytest.mark.parametrize(
    ('pool', 'num_local_layers', 'eps', 'variant'),
    [('cls', 2, 1e-6, 'gelu'), ('cls', 0, 1e-6, 'gelu'), ('mean', 1, 0.5, 'gelu_tanh')],
)
def test_forward_pass_on_a_rectangular_grid_equals_the_loops(
    pool, num_local_layers, eps, variant
):
    fields = {'layer_norm_eps': eps, 'activation': variant} if eps != 1e-6 else {}
    model = make_model(pool=pool, num_local_layers=num_local_layers, **fields)
    (image,) = reference.random_arrays(0, IMAGE)
    params = reference.random_params(model, image)
    assert set(params['posemb']) == {'grid'}
    out = reference.apply(model, params, image)
    assert out.dtype == jnp.float32
    params = reference.float64(params)
    expected = loops(params, image, pool, num_local_layers, eps, variant)
    reference.assert_close(out, expected, 5e-5)


def test_every_parameter_gets_a_gradient_also_the_class_token():
    model = make_model(depth=2, num_local_layers=1)
    (image,) = reference.random_arrays(0, IMAGE)
    params = reference.random_params(model, image)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: jnp.sum(model.apply({'params': p}, image)[:, 0]))(
            params
        )

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
        if path[-1].key != 'position_bias':  # the softmax ignores it
            assert np.any(np.abs(leaf) > 1e-5), jax.tree_util.keystr(path)


def test_class_token_needs_a_layer_that_is_not_local():
    message = r"all 3 layers are local.*num_local_layers <= 2, or pool='mean'"
    image = jnp.ones(IMAGE)
    with pytest.raises(UserError, match=message):
        reference.init_shapes(make_model(num_local_layers=3), image)
    for pool in ('mean', 'map'):
        model = make_model(num_local_layers=3, pool=pool)
        params = reference.init_shapes(model, image)
        assert 'class_token' not in params


@pytest.mark.parametrize('fields', [{'local_init': False}, {'num_local_layers': 0}])
def test_locality_strength_needs_a_convolutional_start(fields):
    model = make_model(locality_strength=5.0, **fields)
    with pytest.raises(
        UserError, match='it needs local_init=True and num_local_layers'
    ):
        reference.init_shapes(model, jnp.ones(IMAGE))


def test_gates_need_layers_that_have_them():
    model = make_model(gating_init=0.0, num_local_layers=0)
    with pytest.raises(UserError, match='gating_init is of GPSA: it needs num_local'):
        reference.init_shapes(model, jnp.ones(IMAGE))


@pytest.mark.parametrize('num_local_layers', [-1, 4])
def test_number_of_local_layers_must_lie_within_the_depth(num_local_layers):
    message = f'num_local_layers {num_local_layers} is not between 0 and the depth 3'
    with pytest.raises(UserError, match=message):
        reference.init_shapes(
            make_model(num_local_layers=num_local_layers), jnp.ones(IMAGE)
        )


def test_heads_that_are_no_square_need_another_start():
    with pytest.raises(UserError, match='square number of heads'):
        reference.init_shapes(make_model(num_heads=3), jnp.ones(IMAGE))
    model = make_model(num_heads=3, local_init=False)
    reference.init_shapes(model, jnp.ones(IMAGE))


def test_local_blocks_see_positions_without_position_embedding():
    model = make_model(posemb='none', pool='mean')
    (image,) = reference.random_arrays(0, IMAGE)
    params = reference.random_params(model, image)
    out = reference.apply(model, params, image)
    other = reference.apply(model, params, image[:, ::-1])
    assert not np.allclose(out, other, atol=1e-3)


def test_sequences_are_refused():
    with pytest.raises(UserError, match=r'ConViT takes images \[B, h, w, channels\]'):
        reference.init_shapes(make_model(patch_size=2), jnp.ones((1, 8, 3)))


def test_bfloat16_reaches_every_module():
    model = make_model(dtype=jnp.bfloat16)
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
        'width': 16,
        'depth': 4,
        'mlp_dim': 11,
        'num_heads': 1,
        'num_local_layers': 1,
        'local_init': False,
        'locality_strength': 2.0,
        'gating_init': 0.0,
        'posemb': 'none',
        'pool': 'mean',
        'qkv_bias': True,
        'dropout_rate': 0.1,
        'attention_dropout_rate': 0.1,
        'drop_path_rate': 0.1,
        'layer_norm_eps': 1e-5,
        'activation': 'gelu_tanh',
        'gpsa_impl': 'split',
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


@pytest.mark.parametrize('num_local_layers', [0, 1])
@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('attention_impl', 'chunked'),
        ('attention_dropout_rate', 0.1),
        ('qkv_bias', True),
        ('dtype', jnp.bfloat16),
    ],
)
def test_field_reaches_both_kinds_of_block(field, value, num_local_layers):
    fields = {'depth': 1, 'num_local_layers': num_local_layers, 'pool': 'mean'}
    model = make_model(**fields)
    other = make_model(**fields, **{field: value})
    fingerprint = model_checks.fingerprint
    assert fingerprint(model, IMAGE) != fingerprint(other, IMAGE)


def test_dropout_also_of_the_embeddings():
    fields = {'depth': 0, 'num_local_layers': 0, 'pool': 'mean'}
    model, dropping = make_model(**fields), make_model(**fields, dropout_rate=0.1)
    fingerprint = model_checks.fingerprint
    assert fingerprint(model, IMAGE) != fingerprint(dropping, IMAGE)


@pytest.mark.parametrize('local_init', [True, False])
def test_kernel_init_reaches_every_map_that_has_no_start_of_its_own(local_init):
    model = make_model(
        kernel_init=model_checks.half_zeros,
        depth=2,
        num_local_layers=1,
        local_init=local_init,
    )
    params = reference.init_shapes(model, jnp.ones(IMAGE))
    if local_init:
        del params['block00']['attention']['value']
    for name, number in (('block00', 6 - local_init), ('block01', 6)):
        kernels = model_checks.leaves(params[name], 'kernel')
        assert [kernel.dtype for kernel in kernels] == [jnp.float16] * number
    position = params['block00']['attention']['position_kernel']
    assert position.dtype == (jnp.float32 if local_init else jnp.float16)


def test_the_class_token_does_not_start_at_the_pole_of_a_layer_norm():
    """No position joins it, and the gradient of a LayerNorm at 0 is 1 / sqrt(eps)."""
    params = make_model().init(jax.random.key(0), jnp.zeros(IMAGE))['params']
    token = params['class_token']['cls']
    assert 0.01 < float(jnp.std(token)) < 0.04
