import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from vit_jax.errors import UserError
from vit_jax.models import build_model, list_models
from vit_jax.models.variants import (
    decode_variant,
    is_generative_model,
    is_sequence_model,
)

# Counted in the public PyTorch models, 1,000 classes.
PUBLISHED = {
    'ConViT-Ti/16': 5_710_512,
    'ConViT-Ti+/16': 9_972_912,
    'ConViT-S/16': 27_777_322,
    'ConViT-S+/16': 48_979_882,
    'ConViT-B/16': 86_540_040,
    'ConViT-B+/16': 153_134_856,
    'DeiT-Ti/16': 5_717_416,
    'DeiT-S/16': 22_050_664,
    'DeiT-B/16': 86_567_656,
    'DeiT-Ti/16-distilled': 5_910_800,
    'DeiT-S/16-distilled': 22_436_432,
    'DeiT-B/16-distilled': 87_338_192,
    'ViT-B/16': 86_567_656,
    'ViT-L/16': 304_326_632,
    'ViT-H/14': 632_045_800,
    'R50+ViT-B/16': 98_659_112,
    'R26+ViT-S/32': 36_431_912,
    'ResNet-18': 11_689_512,
    'ResNet-34': 21_797_672,
    'ResNet-50': 25_557_032,
    'ResNet-101': 44_549_160,
    'BiT-R50x1': 25_549_352,
}


# Also counted there, at 224 pixels, without classifier. With registers the class token
# has no position of its own there; here it has, so that D numbers more are stored.
BACKBONES = {
    'DINOv2-S/14': 21_628_800,
    'DINOv2-B/14': 85_724_928,
    'DINOv2-L/14': 303_227_904,
    'DINOv2-S/14-registers': 21_629_952 + 384,
    'DINOv2-B/14-registers': 85_727_232 + 768,
    'DINOv2-L/14-registers': 303_230_976 + 1024,
}


def vit_params(width, depth, patch, mlp_dim=None):
    """The parameters of a ViT with a class token at 224 pixels, 1,000 classes."""
    mlp_dim = mlp_dim or 4 * width
    embed = patch * patch * 3 * width + width
    tokens = (224 // patch) ** 2 + 1
    attention = 4 * (width * width + width)
    mlp = 2 * width * mlp_dim + mlp_dim + width
    block = attention + mlp + 4 * width
    head = 2 * width + 1000 * width + 1000
    return embed + (1 + tokens) * width + depth * block + head


def cnn_params(widths):
    """3x3 convolutions without bias, a scale and a bias a channel, a classifier."""
    layers = zip((3, *widths), widths)
    return (
        sum(9 * a * b + 2 * b for a, b in layers)
        + 1001 * widths[-1]
        - widths[-1]
        + 1000
    )


def resnet_params(stages, group=False, width=64, classes=1000, conv3=None, root=None):
    """The parameters of a bottleneck ResNet.

    Args:
      stages: blocks of each stage.
      group: BiT: norms before the convolutions, none behind the shortcuts.
      conv3: (stage, index in it, channels) -> parameters in place of a 3x3
        convolution.
      root: parameters in place of the 7x7 convolution.
    """
    conv3 = conv3 or (lambda stage, index, w: 9 * w * w)
    total = 3 * 49 * width if root is None else root
    channels = width
    for stage, blocks in enumerate(stages):
        w = width * 2**stage
        for i in range(blocks):
            total += channels * w + conv3(stage, i, w) + 4 * w * w  # convolutions
            total += 2 * (channels + 2 * w) if group else 2 * (w + w + 4 * w)  # norms
            if i == 0:
                total += channels * 4 * w + (0 if group else 2 * 4 * w)  # shortcut
            channels = 4 * w
    total += 2 * channels if group else 2 * width  # the last norm, or the root's
    return total + (channels + 1) * classes if classes else total


def hybrid_params(stages, width, depth, stride):
    """A trunk of GroupNorm ResNet, its last map as patches of one pixel."""
    trunk = resnet_params(stages, classes=0)
    channels = 64 * 2 ** (len(stages) + 1)
    tokens = (224 // stride) ** 2 + 1
    vit = vit_params(width, depth, 224) - 2 * width - 3 * 224**2 * width
    return trunk + vit + tokens * width + channels * width


def local_params(stage, index, width):
    """Query, key and value; 7 rows and 7 columns of embeddings, half the width each."""
    return 3 * width**2 + 2 * 7 * width // 2


def augmented_params(stage, index, width):
    """8 heads: keys of at least 20 numbers, values of the nearest to a tenth."""
    if stage == 0:
        return 9 * width**2
    keys = 8 * max(round(0.2 * width / 8), 20)
    values = 8 * round(0.1 * width / 8)
    side = 56 // 2**stage
    tables = 2 * (2 * side - 1) * keys // 8
    linear = width * (2 * keys + values) + values**2
    return 9 * width * (width - values) + linear + tables


def global_params(stage, index, width):
    """Query, key and value; a table a side, on the map before the pooling."""
    if stage < 3:
        return 9 * width**2
    side = 14 if index == 0 else 7
    return 3 * width**2 + 2 * (2 * side - 1) * width // 4


# Query, key, four mixed values, and embeddings of 4 rows, 4 columns, 4 mixtures.
STEM = 3 * 64 * (2 + 4) + (4 + 4 + 4) * 8


def transformer_params(width, depth, mlp_dim, vocabulary):
    """Of an encoder and a decoder as deep, one table for all embeddings.

    Counted from the paper's equations: two maps and two biases an MLP, a gain and a
    shift a norm. Its maps of queries, keys, values and heads have no biases; ours have,
    as those of the authors' later code and of PyTorch.
    """
    attention = 4 * (width * width + width)
    mlp = width * mlp_dim + mlp_dim + mlp_dim * width + width
    norm = 2 * width
    encoder = depth * (attention + mlp + 2 * norm)
    decoder = depth * (2 * attention + mlp + 3 * norm)
    return vocabulary * width + encoder + decoder


def lstm_params(width, depth, vocabulary):
    """Both directions of the encoder, each of half the width; arXiv 1508.04025."""

    def cell(inputs, hidden):
        return 4 * hidden * (inputs + hidden + 1)

    encoder = depth * 2 * cell(width, width // 2)
    decoder = cell(2 * width, width) + (depth - 1) * cell(width, width)
    attention = width * width + 2 * width * width  # W_a and W_c
    return vocabulary * width + encoder + decoder + attention


# Of 37,000 pieces of words, as in the paper's section 5.1.
PIECES = 37_000
SEQUENCE = {
    'Transformer-tiny': transformer_params(128, 4, 256, PIECES),
    'Transformer-base': transformer_params(512, 6, 2048, PIECES),
    'Transformer-big': transformer_params(1024, 6, 4096, PIECES),
    'LSTM-tiny': lstm_params(160, 2, PIECES),
}


# Not counted elsewhere: by the formula, which the published ones bear out below.
COUNTS = {
    **PUBLISHED,
    **{
        name: count + 1000 * {'S': 384, 'B': 768, 'L': 1024}[name[7]] + 1000
        for name, count in BACKBONES.items()
    },
    'ViT-Ti/16': vit_params(192, 12, 16),
    'ViT-S/16': vit_params(384, 12, 16),
    'ViT-S/32': vit_params(384, 12, 32),
    'ViT-B/32': vit_params(768, 12, 32),
    'ViT-L/32': vit_params(1024, 24, 32),
    'R26+ViT-B/32': hybrid_params((2, 2, 2, 2), 768, 12, 32),
    'R50+ViT-B/32': hybrid_params((3, 4, 6, 3), 768, 12, 32),
    'R50+ViT-L/32': hybrid_params((3, 4, 6, 3), 1024, 24, 32),
    'R50+ViT-L/16': hybrid_params((3, 4, 9), 1024, 24, 16),
    # A root of 64 channels and stride 4, patches of 8x8 on top; 6.3M published.
    'R+ViT-Ti/16': vit_params(192, 12, 32)
    + (64 * 8 * 8 - 3 * 32 * 32) * 192
    + 64 * (3 * 49 + 2),
    'ResNet-152': resnet_params((3, 8, 36, 3)),
    'BiT-R50x3': resnet_params((3, 4, 6, 3), True, 192),
    'BiT-R101x1': resnet_params((3, 4, 23, 3), True),
    'BiT-R101x3': resnet_params((3, 4, 23, 3), True, 192),
    'BiT-R152x2': resnet_params((3, 8, 36, 3), True, 128),
    'BiT-R152x4': resnet_params((3, 8, 36, 3), True, 256),
    'SASA-ResNet-50': resnet_params((3, 4, 6, 3), conv3=local_params, root=STEM),
    'AA-ResNet-50': resnet_params((3, 4, 6, 3), conv3=augmented_params),
    'BoTNet-50': resnet_params((3, 4, 6, 3), conv3=global_params),
    'CNN': cnn_params((48, 48, 88, 88, 88)),
    'MLP': 224 * 224 * 3 * 512 + 512 + 512 * 512 + 512 + 512 * 1000 + 1000,
}


@pytest.mark.parametrize(
    ('name', 'width', 'depth', 'patch'),
    [
        ('DeiT-Ti/16', 192, 12, 16),
        ('DeiT-S/16', 384, 12, 16),
        ('ViT-L/16', 1024, 24, 16),
        ('ViT-H/14', 1280, 32, 14),
    ],
)
def test_the_formula_gives_the_published_counts(name, width, depth, patch):
    assert vit_params(width, depth, patch) == PUBLISHED[name]


def test_the_formulas_of_residual_networks_give_the_published_counts():
    assert resnet_params((3, 4, 6, 3)) == PUBLISHED['ResNet-50']
    assert resnet_params((3, 4, 23, 3)) == PUBLISHED['ResNet-101']
    assert resnet_params((3, 4, 6, 3), True) == PUBLISHED['BiT-R50x1']
    assert hybrid_params((3, 4, 9), 768, 12, 16) == PUBLISHED['R50+ViT-B/16']
    assert hybrid_params((2, 2, 2, 2), 384, 12, 32) == PUBLISHED['R26+ViT-S/32']


@pytest.mark.parametrize(
    ('name', 'millions'),
    [
        ('ResNet-152', 60.2),  # counted in the public PyTorch model
        ('SASA-ResNet-50', 18.0),
        ('AA-ResNet-50', 25.8),
        ('BoTNet-50', 20.9),  # 20.8 published: 20.84 without the position tables
    ],
)
def test_rounded_counts_are_those_of_the_papers(name, millions):
    assert round(COUNTS[name] / 1e6, 1) == millions


def conv_params(size, inputs, outputs):
    return size * size * inputs * outputs + outputs


def sagan_params(latent, generator, discriminator, channels=3, rows=4):
    """Without attention, which has four kernels of a 1/8 and a gamma in each net."""
    first = generator[0]
    total = conv_params(1, latent, rows * rows * first)
    for inputs, width in zip((first, *generator), generator):
        total += conv_params(3, inputs, width) + conv_params(3, width, width)
        total += 2 * inputs + 2 * width  # norms
        total += conv_params(1, inputs, width) if inputs != width else 0
    total += 2 * generator[-1] + conv_params(3, generator[-1], channels)
    for inputs, width in zip((channels, *discriminator), discriminator):
        total += conv_params(3, inputs, width) + conv_params(3, width, width)
        total += conv_params(1, inputs, width) if inputs != width else 0
    return total + conv_params(1, discriminator[-1], 1)


# On images of 32x32 in colour.
GENERATIVE = {
    'SAGAN': sagan_params(128, (256,) * 3, (128,) * 3)
    + sum(4 * width * width // 8 + 1 for width in (256, 128))
}


def test_every_model_has_a_count():
    counted = COUNTS | SEQUENCE | GENERATIVE
    assert sorted(counted) == sorted(list_models()), (
        'add the new model to COUNTS, to SEQUENCE or to GENERATIVE'
    )
    assert set(filter(is_generative_model, list_models())) == set(GENERATIVE)
    assert set(filter(is_sequence_model, list_models())) == set(SEQUENCE)


def count(name, num_classes):
    model = build_model(name, num_classes)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = reference.init_shapes(model, image)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


@pytest.mark.parametrize('name', COUNTS)
def test_parameter_count(name):
    assert count(name, num_classes=1000) == COUNTS[name]


@pytest.mark.parametrize('name', BACKBONES)
def test_parameter_count_of_backbones(name):
    assert count(name, num_classes=None) == BACKBONES[name]


@pytest.mark.parametrize('name', GENERATIVE)
def test_parameter_count_of_generative_models(name):
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = reference.init_shapes(build_model(name, None), image)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == GENERATIVE[name]


@pytest.mark.parametrize('name', SEQUENCE)
def test_parameter_count_of_sequence_models(name):
    model = build_model(name, num_classes=PIECES)
    source, target = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (5, 7))
    params = reference.init_shapes(model, source, target)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == SEQUENCE[name]


@pytest.mark.parametrize(
    ('name', 'num_heads', 'dropout_rate', 'millions'),
    [
        ('Transformer-tiny', 4, 0.3, 6),
        ('Transformer-base', 8, 0.1, 63),  # the paper's table says 65
        ('Transformer-big', 16, 0.3, 214),  # 213
    ],
)
def test_transformers_are_those_of_the_papers(name, num_heads, dropout_rate, millions):
    assert round(SEQUENCE[name] / 1e6) == millions
    model = build_model(name, PIECES)
    assert (model.num_heads, model.dropout_rate) == (num_heads, dropout_rate)
    assert (model.norm_first, model.posemb, model.activation) == (
        False,
        'sincos1d',
        'relu',
    )


# Heads leave no trace in the counts: the papers' tables.
HEADS = {
    'ViT': {'Ti': 3, 'S': 6, 'B': 12, 'L': 16, 'H': 16},
    'DeiT': {'Ti': 3, 'S': 6, 'B': 12},
    'ConViT': {'Ti': 4, 'Ti+': 4, 'S': 9, 'S+': 9, 'B': 16, 'B+': 16},
    'DINOv2': {'S': 6, 'B': 12, 'L': 16},
}


@pytest.mark.parametrize('family', HEADS)
def test_heads_are_those_of_the_papers(family):
    for size, num_heads in HEADS[family].items():
        assert decode_variant(f'{family}-{size}/16')[1]['num_heads'] == num_heads


def test_dinov2_is_a_vit_with_small_factors_and_exact_gelu():
    model = build_model('DINOv2-S/14-registers', num_classes=None)
    assert (model.layer_scale, model.num_registers, model.qkv_bias) == (1e-5, 4, True)
    assert (model.pool, model.activation, model.layer_norm_eps) == ('cls', 'gelu', 1e-6)
    assert build_model('DINOv2-S/14', num_classes=7).num_registers == 0


def test_the_end_of_a_name_goes_with_any_patch():
    model = build_model('DeiT-S/8-distilled', num_classes=7)
    assert (model.patch_size, model.distilled, model.num_prefix_tokens) == (8, True, 2)


def test_convit_keeps_attention_biases_out_and_ten_local_layers():
    model = build_model('ConViT-S/16', num_classes=10)
    assert (model.num_local_layers, model.qkv_bias, model.pool) == (10, False, 'cls')


@pytest.mark.parametrize(
    ('name', 'head_std'),
    [('ViT-B/16', 0.0), ('DeiT-B/16', 0.02), ('ConViT-B/16', 0.02)],
)
def test_classifiers_start_as_published(name, head_std):
    model = build_model(name, num_classes=1000)
    kernel = model.head_init(jax.random.key(0), (101, 997), jnp.float32)
    np.testing.assert_allclose(np.std(kernel), head_std, rtol=0.02)


@pytest.mark.parametrize('name', ['DeiT-B/16', 'ConViT-B/16'])
def test_deit_and_convit_kernels_start_as_published(name):
    model = build_model(name, num_classes=1000)
    kernel = model.kernel_init(jax.random.key(0), (101, 997), jnp.float32)
    np.testing.assert_allclose(np.std(kernel), 0.02, rtol=0.02)


@pytest.mark.parametrize('patch', [1, 4, 8, 32])
def test_any_patch_size_is_a_variant(patch):
    assert build_model(f'ConViT-Ti+/{patch}', num_classes=10).patch_size == patch


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('ConVit-S/16', "unknown model 'ConVit-S/16'; did you mean 'ConViT-S/16'"),
        ('ViT-G/14', "unknown size of ViT 'G'; choose one of: B, H, L, S, Ti"),
        ('ConViT-S', "unknown model 'ConViT-S'; did you mean 'ConViT-S/16'"),
        ('ViT-B/16 ', "did you mean 'ViT-B/16'"),
        ('ViT-B/x', "unknown model 'ViT-B/x'; did you mean 'ViT-B/"),
        ('ViT-b/16', "unknown size of ViT 'b'; did you mean 'B'"),
        (
            'ConViT-S*/16',
            r"unknown model 'ConViT-S\*/16'; did you mean 'ConViT-S\+?/16'",
        ),
        ('ConViT-B++/16', r"unknown size of ConViT 'B\+\+'; did you mean 'B\+'"),
        ('cnn', "unknown model 'cnn'; did you mean 'CNN'"),
        ('', "unknown model ''; choose one of: AA-ResNet-50, BiT-"),
        ('ResNet-51', "unknown model 'ResNet-51'; did you mean 'ResNet-"),
        ('R50+ViT-B/8', "unknown model 'R50\\+ViT-B/8'; did you mean 'R50\\+ViT-B"),
        ('ViT-B/0', "model 'ViT-B/0' has patches of size 0"),
        (
            'ViT-B/16-distilled',
            "unknown model 'ViT-B/16-distilled'; did you mean 'DeiT-B/16-distilled'",
        ),
        ('DeiT-B/8-distill', "did you mean 'DeiT-B/16-distilled'"),
        ('DINOv2-B/14-', "did you mean 'DINOv2-B/14'"),
        ('Transformer-bass', "did you mean 'Transformer-base'"),
        ('DINOv2-g/14', "unknown size of DINOv2 'g'; choose one of: B, L, S"),
    ],
)
def test_a_name_that_is_none_offers_the_nearest(name, message):
    with pytest.raises(UserError, match=message):
        decode_variant(name)
