"""ViT and ConViT behind a stem."""

from functools import partial

import conv_reference
import jax
import jax.numpy as jnp
import model_checks
import numpy as np
import numpy_reference as reference
import pytest
from flax import linen as nn

from vit_jax.errors import UserError
from vit_jax.layers.conv import ConvStem
from vit_jax.models import build_model
from vit_jax.models.convit import ConViT
from vit_jax.models.hybrid import STEMS
from vit_jax.models.vit import ViT

B, V, D = 2, 7, 8
STRIDE = (2, 3)
IMAGE = (B, 16, 54, 3)


class Shrink(nn.Module):
    """A stem of a fork: every s-th pixel, and twice as many channels."""

    dtype: jnp.dtype = jnp.float32
    factor: float = 1.0

    @nn.compact
    def __call__(self, image, *, train=False):
        x = image[:, :: STRIDE[0], :: STRIDE[1]].astype(self.dtype)
        return jnp.concatenate([x, self.factor * x], axis=-1)


def make_model(model, **kwargs):
    fields = {'num_classes': V, 'width': D, 'mlp_dim': 12, 'num_heads': 4}
    depths = {'depth': 2, 'num_local_layers': 1} if model is ConViT else {'depth': 1}
    return model(**{**fields, **depths, **kwargs})


@pytest.mark.parametrize('model', [ViT, ConViT])
def test_stem_comes_before_the_patches_which_are_counted_in_pixels(model):
    hybrid = make_model(model, patch_size=(4, 6), stem=Shrink)
    (image,) = reference.random_arrays(0, IMAGE)
    params = reference.random_params(hybrid, image)
    assert params['posemb']['grid'].shape == (4, 9, D)
    assert params['patches']['embed']['kernel'].shape == (2, 2, 6, D)
    out = reference.apply(hybrid, params, image)
    feature_map = np.concatenate([image[:, ::2, ::3]] * 2, axis=-1)
    plain = make_model(model, patch_size=2)
    expected = reference.apply(plain, params, feature_map)
    reference.assert_close(out, expected)


@pytest.mark.parametrize('model', [ViT, ConViT])
def test_fields_of_the_stem_reach_it(model):
    def fingerprint(**kwargs):
        hybrid = make_model(model, patch_size=(4, 6), stem=Shrink, **kwargs)
        return model_checks.fingerprint(hybrid, IMAGE)

    assert fingerprint() != fingerprint(stem_kwargs={'factor': 2.0})


@pytest.mark.parametrize('model', [ViT, ConViT])
@pytest.mark.parametrize(
    ('stem', 'kwargs'),
    [
        ('conv', {'widths': (8, 16)}),
        ('resnet', {'stage_sizes': (), 'width': 4, 'num_groups': 2}),
    ],
)
def test_bfloat16_reaches_every_module(model, stem, kwargs):
    hybrid = make_model(
        model, patch_size=(4, 6), stem=stem, stem_kwargs=kwargs, dtype=jnp.bfloat16
    )
    float32 = ['', 'head', 'head/logits']
    shape = (B, 16, 24, 3)
    model_checks.check_dtype_reaches_every_module(
        hybrid.clone(patch_size=4), shape, float32
    )


@pytest.mark.parametrize('norm', ['batch', 'group'])
def test_the_statistics_of_a_stem_are_updated_at_training(norm):
    kwargs = {'stage_sizes': (1,), 'width': 4, 'num_groups': 2, 'norm': norm}
    model = make_model(ViT, patch_size=4, stem='resnet', stem_kwargs=kwargs)
    shape = (B, 8, 12, 3)
    variables = conv_reference.random_variables(model, shape)
    apply = partial(model.apply, train=True, mutable=['batch_stats'])
    _, updated = jax.jit(apply)(variables, jnp.ones(shape))
    assert ('batch_stats' in variables) == (norm == 'batch')
    before = variables.get('batch_stats', {})
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(updated)):
        assert np.any(old != new)


@pytest.mark.parametrize(
    ('name', 'patch', 'channels'),
    [
        ('R50+ViT-B/16', 1, 1024),
        ('R50+ViT-L/32', 1, 2048),
        ('R26+ViT-S/32', 1, 2048),
        ('R+ViT-Ti/16', 8, 64),
    ],
)
def test_published_hybrids_have_their_patches(name, patch, channels):
    model = build_model(name, 10)
    params = reference.init_shapes(model, jnp.ones((1, 64, 96, 3)))
    kernel = params['patches']['embed']['kernel']
    assert kernel.shape == (patch, patch, channels, model.width)


def test_trunk_is_that_of_the_public_weights():
    trunk = STEMS['resnet']()
    assert (trunk.norm, trunk.num_groups, trunk.preactivation) == ('group', 32, False)
    assert (trunk.norm_eps, trunk.standardize_eps) == (1e-6, 1e-5)
    assert (trunk.padding, trunk.num_classes, trunk.pool) == ('same', None, 'none')


@pytest.mark.parametrize('model', [ViT, ConViT])
@pytest.mark.parametrize(('pool', 'number'), [('cls', 1), ('mean', 0), ('map', 0)])
def test_prefix_tokens_are_those_before_the_grid(model, pool, number):
    model = make_model(model, pool=pool, patch_size=2)
    assert model.num_prefix_tokens == number
    image = jax.ShapeDtypeStruct((1, 4, 6, 3), jnp.float32)

    def attend(rng, image):
        _, state = model.init_with_output(rng, image, mutable=True)
        return state['intermediates'][f'block{model.depth - 1:02d}']['attention']

    weights = jax.eval_shape(attend, jax.random.key(0), image)['attention_weights'][0]
    assert weights.shape[-1] == 6 + number


def test_config_can_choose_a_stem_by_name_and_by_path():
    by_name = build_model('ConViT-S/16', 10, stem='conv', stem_kwargs={'widths': [8]})
    assert by_name.stem == 'conv'
    params = reference.init_shapes(by_name, jnp.ones((1, 32, 48, 3)))
    assert params['posemb']['grid'].shape == (2, 3, 432)
    assert params['patches']['embed']['kernel'].shape == (8, 8, 8, 432)
    path = 'vit_jax.layers.conv:ConvStem'
    assert build_model('ViT-B/16', 10, stem=path).stem is ConvStem


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'stem': 'cnov'}, "unknown stem 'cnov'; did you mean 'conv'"),
        ({'stem': 3}, r'stem is a name \(conv, resnet\) or a callable.* got 3'),
        (
            {'stem': 'conv', 'stem_kwargs': {'width': (8,)}},
            "unknown field of stem 'conv' 'width'; did you mean 'widths'",
        ),
        (
            {'stem': 'resnet', 'stem_kwargs': {'stage_size': ()}},
            "unknown field of stem 'resnet' 'stage_size'; did you mean 'stage_sizes'",
        ),
        (
            {'stem': 'resnet', 'stem_kwargs': {'num_classes': 3}},
            "num_classes of stem 'resnet' is set by the model",
        ),
        ({'stem_kwargs': {'width': 3}}, "stem_kwargs {'width': 3} need a stem"),
        (
            {'stem': Shrink, 'patch_size': 4},
            'patch 4x4 does not fit: the stem makes a map of 8x18 of the image 16x54',
        ),
        ({'stem': Shrink, 'patch_size': (4, 12)}, 'patch 4x12 does not fit'),
        ({'stem': Shrink, 'patch_size': (6, 6)}, 'patch 6x6 does not fit'),
        (
            {'stem': Shrink, 'patch_size': (2, 2, 2)},
            'patch size 2x2x2 has 3 axes, the input has 2',
        ),
    ],
)
@pytest.mark.parametrize('model', [ViT, ConViT])
def test_stems_that_do_not_fit_are_told(model, fields, message):
    with pytest.raises(UserError, match=message):
        reference.init_shapes(make_model(model, **fields), jnp.ones(IMAGE))
