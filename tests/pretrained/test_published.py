import importlib.resources
import json
import re

import pytest

from vit_jax.errors import UserError
from vit_jax.modules import make_model
from vit_jax.pretrained.fetch import is_address
from vit_jax.pretrained.published import (
    class_names,
    find_published,
    from_hugging_face,
)
from vit_jax.pretrained.zoo import COMPARED, SOURCES, ZOO
from vit_jax.summary import count

ADDRESSES = [address for row in ZOO for address in row.addresses]

# The public PyTorch models.
PARAMS = {
    'hf:timm/convit_tiny.fb_in1k': 5_710_512,
    'hf:timm/convit_small.fb_in1k': 27_777_322,
    'hf:timm/convit_base.fb_in1k': 86_540_040,
    'hf:timm/deit_tiny_patch16_224.fb_in1k': 5_717_416,
    'hf:timm/deit_small_patch16_224.fb_in1k': 22_050_664,
    'hf:timm/deit_base_patch16_224.fb_in1k': 86_567_656,
    'hf:timm/deit_tiny_distilled_patch16_224.fb_in1k': 5_910_800,
    'hf:timm/deit_small_distilled_patch16_224.fb_in1k': 22_436_432,
    'hf:google/vit-base-patch16-224': 86_567_656,
    'hf:timm/vit_large_patch16_224.augreg_in21k_ft_in1k': 304_326_632,
    'hf:timm/vit_small_r26_s32_224.augreg_in21k_ft_in1k': 36_431_912,
    # That at 224 pixels, and its further positions.
    'hf:timm/vit_base_r50_s16_384.orig_in21k_ft_in1k': 98_659_112
    + (24 * 24 - 14 * 14) * 768,
    'hf:timm/resnet18.tv_in1k': 11_689_512,
    'hf:timm/resnet34.tv_in1k': 21_797_672,
    'hf:timm/resnet50.tv_in1k': 25_557_032,
    'hf:timm/resnet101.tv_in1k': 44_549_160,
    'hf:timm/resnetv2_50x1_bit.goog_in21k_ft_in1k': 25_549_352,
}


def make(metadata):
    about = metadata['model']
    fields = ('name', 'num_classes', 'dtype', 'kwargs')
    return make_model(*(about[field] for field in fields))


@pytest.mark.parametrize('address', PARAMS)
def test_parameters_are_those_of_the_public_models(address):
    metadata = find_published(address)
    shape = (*metadata['preprocessing']['image_size'], 3)
    assert count(make(metadata), shape)[0] == PARAMS[address]


@pytest.mark.parametrize('address', ADDRESSES)
def test_metadata_makes_the_model_that_it_describes(address):
    metadata = find_published(address)
    assert json.loads(json.dumps(metadata)) == metadata
    assert list(metadata) == ['model', 'class_names', 'preprocessing']
    about, pixels = metadata['model'], metadata['preprocessing']
    model = make(metadata)
    assert len(metadata['class_names']) == (model.num_classes or 0)
    assert len(set(metadata['class_names'])) == len(metadata['class_names'])
    rest = {k: v for k, v in about.items() if k in ('activation', 'layer_norm_eps')}
    assert rest == {k: getattr(model, k) for k in rest}
    if 'ResNet' in about['name'] or 'BiT' in about['name']:
        assert not rest
        assert 'grid' not in about
    else:
        assert len(rest) == 2
        patch = model.patch_size
        assert [n * patch for n in about['grid']] == pixels['image_size']
        assert about['prefix_tokens'] == model.num_prefix_tokens
    assert pixels['channels'] == 3
    assert 0.85 < pixels['crop_fraction'] <= 1


@pytest.mark.parametrize(
    ('address', 'model', 'pixels'),
    [
        (
            'https://dl.fbaipublicfiles.com/deit/deit_base_patch16_384-8de9b5d1.pth',
            {
                'name': 'DeiT-B/16',
                'kwargs': {},
                'num_classes': 1000,
                'dtype': 'float32',
                'activation': 'gelu',
                'layer_norm_eps': 1e-6,
                'grid': [24, 24],
                'prefix_tokens': 1,
                'num_heads': 12,
            },
            ([384, 384], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 1, 'bicubic'),
        ),
        (
            'hf:google/vit-base-patch16-224',
            {
                'name': 'ViT-B/16',
                'kwargs': {'activation': 'gelu_tanh'},
                'num_classes': 1000,
                'dtype': 'float32',
                'activation': 'gelu_tanh',
                'layer_norm_eps': 1e-6,
                'grid': [14, 14],
                'prefix_tokens': 1,
                'num_heads': 12,
            },
            ([224, 224], [0.5], [0.5], 0.9, 'bicubic'),
        ),
        (
            'hf:facebook/dinov2-with-registers-small',
            {
                'name': 'DINOv2-S/14-registers',
                'kwargs': {},
                'num_classes': None,
                'dtype': 'float32',
                'activation': 'gelu',
                'layer_norm_eps': 1e-6,
                'grid': [37, 37],
                'prefix_tokens': 5,
                'num_heads': 6,
            },
            ([518, 518], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 1, 'bicubic'),
        ),
        (
            'https://storage.googleapis.com/bit_models/BiT-M-R50x3-ILSVRC2012.npz',
            {
                'name': 'BiT-R50x3',
                'kwargs': {},
                'num_classes': 1000,
                'dtype': 'float32',
            },
            ([448, 448], [0.5], [0.5], 1, 'bilinear'),
        ),
    ],
)
def test_what_is_known_of_some(address, model, pixels):
    metadata = find_published(address)
    assert metadata['model'] == model
    names = ('image_size', 'mean', 'std', 'crop_fraction', 'interpolation')
    expected = {'channels': 3, **dict(zip(names, pixels))}
    assert metadata['preprocessing'] == expected


@pytest.mark.parametrize('row', ZOO, ids=lambda row: row.addresses[-1])
def test_what_google_trained_has_its_gelu(row):
    google = re.compile(r'augreg|hf:google|vit_models|\.orig_in21k')
    transformer = re.match(r'ViT|R\d*\+', row.model) is not None
    assert transformer == any(map(google.search, row.addresses))
    expected = 'gelu_tanh' if transformer else None
    assert row.kwargs.get('activation') == expected


def test_addresses_are_unique_and_of_a_known_form():
    assert len(set(ADDRESSES)) == len(ADDRESSES)
    for address in ADDRESSES:
        assert is_address(address)
        assert re.fullmatch(
            r'hf:(timm|google|facebook)/[\w.-]+'
            r'|augreg:[\w.-]+'
            r'|https://(dl\.fbaipublicfiles\.com|storage\.googleapis\.com'
            r'|download\.pytorch\.org)/[\w./+-]+\.(pth|npz)',
            address,
        ), address


def test_accuracies_have_a_source():
    for row in ZOO:
        assert (row.top1 is None) == (row.source is None)
        if row.top1 is not None:
            assert 65 < row.top1 < 90
            assert row.source in SOURCES
    assert {row.model for row in ZOO} >= COMPARED.keys()


@pytest.mark.parametrize(
    'name',
    [
        'HF:timm/convit_tiny.fb_in1k',
        'hf:timm/convit_tiny.fb_in1k@main',
        'hf:timm/convit_tiny.fb_in1k/model.safetensors',
        'hf:timm/convit_tiny.fb_in1k/model.safetensors@0123abc',
    ],
)
def test_revision_file_and_case_are_of_the_same_model(name):
    assert find_published(name) == find_published('hf:timm/convit_tiny.fb_in1k')


@pytest.mark.parametrize(
    'name',
    [
        'convit_tiny.pth',
        '/weights/convit_tiny.pth',
        'https://dl.fbaipublicfiles.com/other/convit_tiny.pth',
        'https://elsewhere.example/convit/convit_tiny.pth',
        'https://dl.fbaipublicfiles.com/convit/convit_tiny.pth.zip',
        'hf:somebody/convit_tiny.fb_in1k',
        'hf:timm/convit_tiny',
        'hf:timm/convit_tiny.fb_in1k.old',
        'timm/convit_tiny.fb_in1k',
        'augreg:S_16',
        '',
    ],
)
def test_the_same_name_elsewhere_is_not_known(name):
    assert find_published(name) is None


def test_an_address_may_be_spelled_out_or_have_a_hash_behind_it():
    short = next(a for a in ADDRESSES if a.startswith('augreg:R_Ti'))
    store = 'https://storage.googleapis.com/vit_models/augreg/'
    metadata = find_published(short)
    assert metadata['model']['name'] == 'R+ViT-Ti/16'
    assert find_published(f'{short}.npz') == metadata
    assert find_published(f'{store}{short.removeprefix("augreg:")}.npz') == metadata
    assert find_published(f'{short}#sha256={"0" * 64}') == metadata


def test_names_of_imagenets_classes():
    names = class_names('imagenet')
    assert len(names) == len(set(names)) == 1000
    ids, words = zip(*(name.split(' ', 1) for name in names))
    assert list(ids) == sorted(set(ids))  # the order that ImageNet's classes have
    assert all(re.fullmatch(r'n\d{8}', wordnet_id) for wordnet_id in ids)
    assert len(set(words)) == 1000  # two cranes, two maillots
    assert [words[i] for i in (0, 1, 207, 281, 388, 817, 999)] == [
        'tench',
        'goldfish',
        'golden retriever',
        'tabby',
        'giant panda',
        'sports car',
        'toilet tissue',
    ]
    with pytest.raises(UserError, match="unknown list of class names 'cifar10'"):
        class_names('cifar10')


def test_the_names_are_part_of_the_package():
    file = importlib.resources.files('vit_jax.pretrained') / 'imagenet_classes.txt'
    assert file.read_text(encoding='utf-8').count('\n') == 1000


TIMM = {
    'architecture': 'convit_tiny',
    'num_classes': 1000,
    'num_features': 192,
    'global_pool': 'token',
    'pretrained_cfg': {
        'tag': 'fb_in1k',
        'input_size': [3, 224, 224],
        'interpolation': 'bicubic',
        'crop_pct': 0.875,
        'crop_mode': 'center',
        'mean': [0.485, 0.456, 0.406],
        'std': [0.229, 0.224, 0.225],
        'num_classes': 1000,
    },
}
VIT = {
    'architectures': ['ViTForImageClassification'],
    'hidden_act': 'gelu',
    'hidden_size': 384,
    'id2label': {'0': 'cat', '1': 'dog', '2': 'cat'},
    'image_size': 224,
    'intermediate_size': 1536,
    'layer_norm_eps': 1e-12,
    'num_attention_heads': 6,
    'num_hidden_layers': 12,
    'patch_size': 32,
    'qkv_bias': True,
}
DINO = {
    'architectures': ['Dinov2WithRegistersModel'],
    'hidden_act': 'gelu',
    'hidden_size': 768,
    'image_size': 518,
    'layer_norm_eps': 1e-6,
    'mlp_ratio': 4,
    'num_attention_heads': 12,
    'num_hidden_layers': 12,
    'num_register_tokens': 4,
    'patch_size': 14,
    'qkv_bias': True,
    'use_swiglu_ffn': False,
}
RESNET = {
    'architectures': ['ResNetForImageClassification'],
    'depths': [3, 4, 6, 3],
    'downsample_in_first_stage': False,
    'embedding_size': 64,
    'hidden_act': 'relu',
    'hidden_sizes': [256, 512, 1024, 2048],
    'layer_type': 'bottleneck',
}


def changed(config, **values):
    """The config with other values; None leaves one out, a `_cfg` is timm's inner."""
    inner = values.pop('_cfg', None)
    config = {**config, **values}
    if inner is not None:
        inner = {**config['pretrained_cfg'], **inner}
        config['pretrained_cfg'] = {k: v for k, v in inner.items() if v is not None}
    return {k: v for k, v in config.items() if v is not None}


def test_a_config_of_timm_says_what_the_registry_knows():
    assert from_hugging_face(TIMM) == find_published('hf:timm/convit_tiny.fb_in1k')


def test_a_config_of_timm_may_have_other_classes_and_sizes():
    config = changed(
        TIMM,
        architecture='vit_small_patch16_384',
        num_classes=2,
        model_args={'img_size': [64, 96]},
        label_names=['cat', 'dog'],
        _cfg={'mean': [0.5] * 3, 'std': [0.25] * 3, 'interpolation': 'bilinear'},
    )
    found = from_hugging_face(config)
    assert found['model']['name'] == 'ViT-S/16'
    assert found['model']['num_classes'] == 2
    assert found['model']['activation'] == 'gelu'
    assert found['model']['grid'] == [4, 6]
    assert found['class_names'] == ['cat', 'dog']
    assert found['preprocessing'] == {
        'image_size': [64, 96],
        'channels': 3,
        'mean': [0.5],
        'std': [0.25],
        'crop_fraction': 0.875,
        'interpolation': 'bilinear',
    }


@pytest.mark.parametrize(
    ('values', 'names'),
    [
        ({'_cfg': {'tag': 'mine'}}, [str(i) for i in range(1000)]),
        ({'num_classes': 3}, ['0', '1', '2']),
        ({'num_classes': 0}, []),
        ({'num_classes': 2, '_cfg': {'label_names': {'0': 'a', '1': 'b'}}}, ['a', 'b']),
    ],
)
def test_class_names_of_timm(values, names):
    found = from_hugging_face(changed(TIMM, **values))
    assert found['class_names'] == names
    assert found['model']['num_classes'] == (len(names) or None)


@pytest.mark.parametrize(
    'inner',
    [
        {'mean': None},
        {'crop_pct': None},
        {'interpolation': 'random'},
        {'crop_mode': 'squash'},
        {'crop_pct': 1.15},
    ],
)
def test_preprocessing_that_is_not_clear_is_left_out(inner):
    found = from_hugging_face(changed(TIMM, _cfg=inner))
    assert list(found) == ['model', 'class_names']


@pytest.mark.parametrize(
    'values',
    [
        {'architecture': 'vit_base_patch16_siglip_224'},
        {'architecture': 'convit_tiny_v2'},
        {'architecture': 'vit_base_patch16_224', 'global_pool': 'avg'},
        {'model_args': {'patch_size': 8}},
        {'num_classes': 3, 'label_names': ['a', 'b']},
        {'num_classes': False},
        {'_cfg': {'mean': [float('nan')] * 3}},
        {'_cfg': {'std': [0.5, 0, 0.5]}},
        {'_cfg': {'input_size': [3, 8, 8]}},
    ],
)
def test_other_models_of_timm_are_not_taken_for_ours(values):
    assert from_hugging_face(changed(TIMM, **values)) is None


@pytest.mark.parametrize(
    ('config', 'name', 'kwargs', 'num_classes'),
    [
        (VIT, 'ViT-S/32', {'layer_norm_eps': 1e-12}, 3),
        (
            changed(VIT, id2label=None, hidden_act='gelu_new', layer_norm_eps=1e-6),
            'ViT-S/32',
            {'activation': 'gelu_tanh'},
            2,
        ),
        (
            changed(VIT, architectures=['ViTModel'], qkv_bias=False, hidden_size=390),
            'ViT-B/32',
            {
                'width': 390,
                'num_heads': 6,
                'mlp_dim': 1536,
                'layer_norm_eps': 1e-12,
                'qkv_bias': False,
            },
            None,
        ),
        (
            changed(VIT, architectures=['DeiTForImageClassificationWithTeacher']),
            'DeiT-S/32-distilled',
            {'layer_norm_eps': 1e-12},
            3,
        ),
        (DINO, 'DINOv2-B/14-registers', {}, None),
        (
            changed(DINO, num_register_tokens=7),
            'DINOv2-B/14-registers',
            {'num_registers': 7},
            None,
        ),
        (changed(DINO, architectures=['Dinov2Model']), 'DINOv2-B/14', {}, None),
        (RESNET, 'ResNet-50', {}, 2),
        (
            changed(
                RESNET,
                architectures=['ResNetModel'],
                layer_type='basic',
                hidden_sizes=[64, 128, 256, 512],
            ),
            'ResNet-34',
            {},
            None,
        ),
    ],
)
def test_configs_of_transformers(config, name, kwargs, num_classes):
    found = from_hugging_face(config)
    about = found.pop('model')
    names = found.pop('class_names')
    assert found == {}  # nothing of the preprocessing is in it
    assert (about['name'], about['kwargs']) == (name, kwargs)
    assert about['num_classes'] == num_classes
    assert len(names) == (num_classes or 0)
    model = make_model(name, num_classes, 'float32', about['kwargs'])
    if not name.startswith('ResNet'):
        sizes = (model.width, model.depth, model.num_heads)
        keys = ('hidden_size', 'num_hidden_layers', 'num_attention_heads')
        assert sizes == tuple(config[k] for k in keys)
        assert about['grid'] == [config['image_size'] // config['patch_size']] * 2
        assert about['prefix_tokens'] == model.num_prefix_tokens


def test_class_names_that_stand_twice_are_told_apart():
    assert from_hugging_face(VIT)['class_names'] == ['cat (0)', 'dog', 'cat (2)']


@pytest.mark.parametrize(
    'config',
    [
        changed(VIT, architectures=['DeiTForImageClassification']),
        changed(VIT, architectures=['ViTModel', 'ViTForImageClassification']),
        changed(VIT, hidden_act='silu'),
        changed(VIT, num_attention_heads=7),
        changed(VIT, patch_size=[16, 32]),
        changed(VIT, id2label={'0': 'a', '2': 'b'}),
        changed(VIT, num_hidden_layers=10**7),
        changed(DINO, use_swiglu_ffn=True),
        changed(RESNET, downsample_in_bottleneck=True),
        changed(RESNET, depths=[3, 4, 6, 4]),
        {},
    ],
)
def test_other_configs_are_not_taken_for_ours(config):
    assert from_hugging_face(config) is None


JUNK = (None, True, -1, 0, 10**400, 1e308, float('nan'), '', 'x', [], [None], [[]], {})


@pytest.mark.parametrize('config', [TIMM, VIT, DINO, RESNET])
def test_damaged_configs_do_no_harm(config):
    for key in config:
        assert from_hugging_face({k: v for k, v in config.items() if k != key}) != {}
        for junk in JUNK:
            found = from_hugging_face({**config, key: junk})
            assert found is None or found['model']['name']
    for key in config.get('pretrained_cfg', ()):
        for junk in JUNK:
            inner = {**config['pretrained_cfg'], key: junk}
            found = from_hugging_face({**config, 'pretrained_cfg': inner})
            assert found is None or found['model']['name']
