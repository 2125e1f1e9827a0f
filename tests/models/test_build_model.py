import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

import vit_jax
from vit_jax.errors import UserError
from vit_jax.models import build_model, check_takes_images
from vit_jax.models.convit import ConViT
from vit_jax.models.vit import ViT


class Fork(nn.Module):
    """A model of a research fork."""

    num_classes: int
    width: int = 3
    options: dict | None = None

    @nn.compact
    def __call__(self, image, *, train=False):
        return nn.Dense(self.num_classes)(jnp.mean(image, axis=(1, 2)))


def make_fork(num_classes, scale):
    return Fork(num_classes, width=round(2 * scale))


def make_dict(num_classes):
    return {'num_classes': num_classes}


class ForkAttention(nn.Module):
    """An attention layer of a research fork: takes any fields, adds one to the mean."""

    num_heads: int
    qkv_bias: bool = True
    dropout_rate: float = 0.0
    impl: str = 'auto'
    kernel_init: nn.initializers.Initializer | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, train=False):
        return jnp.ones_like(x) * self.param('level', nn.initializers.ones, ())


SMALL = {'patch_size': 2, 'width': 8, 'depth': 1, 'mlp_dim': 16, 'num_heads': 2}


def test_package_offers_its_two_functions():
    assert vit_jax.build_model is build_model
    assert 'ConViT-S+/16' in vit_jax.list_models()


def test_name_decides_the_class_and_overrides_win():
    model = build_model('ConViT-S/16', 7, depth=3, num_local_layers=1)
    assert isinstance(model, ConViT)
    assert (model.num_classes, model.width, model.depth) == (7, 432, 3)
    assert build_model('ViT-B/16', 7, width=24).width == 24
    assert build_model('DeiT-B/16', None).num_classes is None
    assert isinstance(build_model('DeiT-B/16', 7), ViT)


def test_path_names_the_model_of_a_fork():
    model = build_model(f'{__name__}:Fork', 5, width=11)
    assert isinstance(model, Fork)
    assert (model.num_classes, model.width) == (5, 11)
    assert build_model(f'{__name__}:make_fork', 5, scale=2.0) == Fork(5, width=4)


def test_path_names_a_layer_of_a_fork():
    model = build_model('ViT-Ti/2', 5, **SMALL, attention=f'{__name__}:ForkAttention')
    params = reference.init_shapes(model, jnp.ones((1, 4, 6, 3)))
    assert set(params['block00']['attention']) == {'level'}


def test_paths_inside_a_mapping_are_resolved():
    options = {'a': {'b': f'{__name__}:make_fork'}, 'c': 3}
    model = build_model(f'{__name__}:Fork', 5, options=options)
    assert model.options['a']['b'] is make_fork
    assert model.options['c'] == 3


@pytest.mark.parametrize(
    ('name', 'overrides', 'message'),
    [
        ('ViT-B/17x', {}, "unknown model 'ViT-B/17x'; did you mean 'ViT-B/"),
        (
            'ViT-B/16',
            {'dept': 3},
            "unknown field of ViT-B/16 'dept'; did you mean 'depth'",
        ),
        (
            'ConViT-S/16',
            {'attention': None},
            "unknown field of ConViT-S/16 'attention'",
        ),
        ('ViT-B/16', {'parent': None}, "unknown field of ViT-B/16 'parent'"),
        (
            f'{__name__}:Fork',
            {'with': 3},
            "unknown field of .*:Fork 'with'; did you mean 'width'",
        ),
        (f'{__name__}:Frok', {}, f"module '{__name__}' has no 'Frok'"),
        ('no_such.fork:Net', {}, "cannot import 'no_such.fork:Net': No module named"),
        ('ViT-B/16', {'attention': 'no_such:Layer'}, "cannot import 'no_such:Layer'"),
        ('ViT-B/16', {'width': '24'}, "width of ViT-B/16 is like 768; '24' is not"),
        ('ViT-B/16', {'depth': 1.5}, 'depth of ViT-B/16 is like 12; 1.5 is not'),
        ('ViT-B/16', {'depth': True}, 'depth of ViT-B/16 is like 12; True is not'),
        ('ViT-B/16', {'qkv_bias': 1}, 'qkv_bias of ViT-B/16 is like True; 1 is not'),
        (
            'ViT-B/16',
            {'dropout_rate': True},
            'dropout_rate .* is like 0.0; True is not',
        ),
        ('CNN', {'strides': (1, 1, 2, 1, 0)}, r'is like \(1, 1, 2, 1, 1\); .* is not'),
        ('MLP', {'widths': (0,)}, r'widths of MLP is like \(512, 512\); \(0,\) is not'),
        ('CNN', {'widths': (8, 'x')}, r'widths of CNN is like'),
        ('CNN', {'attention_after': (-1,)}, r'is like \(1, 3\); \(-1,\) is not'),
        ('ResNet-50', {'attention_stages': 3}, r'is like \(1, 3\); 3 is not'),
        (f'{__name__}:make_fork', {}, "cannot be made from num_classes: .*'scale'"),
        ('json:JSONDecoder', {}, "'json:JSONDecoder' cannot be made from"),
        (f'{__name__}:make_dict', {}, 'makes a dict, not a Flax module'),
        ('builtins:dict', {}, "'builtins:dict' cannot be made from"),
        ('ViT-B/16', {'pool': None}, "pool of ViT-B/16 is like 'cls'; None is not"),
    ],
)
def test_mistakes_are_told_with_what_would_be_right(name, overrides, message):
    with pytest.raises(UserError, match=message):
        build_model(name, 10, **overrides)


@pytest.mark.parametrize('num_classes', [0, -3, 2.0, 'ten'])
def test_a_number_of_classes_that_is_none_is_told(num_classes):
    with pytest.raises(UserError, match='num_classes is a number above 0 or None'):
        build_model('CNN', num_classes)


def test_models_of_sequences_are_told_from_those_of_images():
    check_takes_images(build_model('ViT-B/16', 7))
    check_takes_images(build_model(f'{__name__}:Fork', 5))
    message = '^a Transformer takes sequences of tokens, not images; choose a model'
    with pytest.raises(UserError, match=message):
        check_takes_images(build_model('Transformer-tiny', 7))


def test_any_token_may_be_the_padding():
    assert build_model('Transformer-tiny', 7, pad_id=0).pad_id == 0
    with pytest.raises(UserError, match='pad_id of Transformer-tiny is like 0; -1 is'):
        build_model('Transformer-tiny', 7, pad_id=-1)


@pytest.mark.parametrize('name', vit_jax.list_models())
def test_jit_can_take_a_model_as_static(name):
    assert hash(build_model(name, 3)) == hash(build_model(name, 3))
    if name.startswith('ResNet'):
        fields = {'attention_stages': (3,), 'attention_kwargs': {'num_heads': 2}}
        hash(build_model(name, 3, **fields))


@pytest.mark.parametrize(
    'overrides',
    [
        {'dropout_rate': 0},
        {'patch_size': (2, 3)},
        {'representation_size': 5},
        {'dtype': jnp.bfloat16},
        {'kernel_init': nn.initializers.ones},
    ],
)
def test_values_of_a_fields_kind_are_taken(overrides):
    model = build_model('ViT-B/16', 10, **overrides)
    for field, value in overrides.items():
        assert getattr(model, field) == value


@pytest.mark.parametrize('name', ['ViT-Ti/2', 'ConViT-Ti/2', 'CNN'])
def test_other_channels_than_the_parameters_are_told(name):
    overrides = {} if name == 'CNN' else {**SMALL, 'num_heads': 4, 'depth': 2}
    if name == 'ConViT-Ti/2':
        overrides['num_local_layers'] = 1
    model = build_model(name, 5, **overrides)
    params = reference.init_shapes(model, jnp.ones((1, 4, 6, 3)))
    with pytest.raises(UserError, match='takes images of 3 channels; got 1'):
        jax.eval_shape(model.apply, {'params': params}, jnp.ones((1, 4, 6, 1)))


def test_no_classes_gives_the_features_under_the_classifier():
    (image,) = reference.random_arrays(0, (2, 4, 6, 3))
    classifier = build_model('DeiT-Ti/2', 5, **SMALL)
    features = build_model('DeiT-Ti/2', None, **SMALL)
    params = reference.random_params(classifier, image)
    logits = reference.apply(classifier, params, image)
    classify = reference.float64(params['head'].pop('logits'))
    out = np.asarray(reference.apply(features, params, image))
    assert out.shape == (2, 8)
    reference.assert_close(logits, reference.linear(classify, out))
