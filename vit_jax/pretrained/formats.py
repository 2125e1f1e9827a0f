"""The tables: how the world names the weights of the models that are here.

`naming` says how to read a row. Where a format names the same thing in two ways, the
first is the one written.
"""

from collections.abc import Iterator
from typing import Any

from vit_jax.pretrained.naming import (
    CONV,
    CONV_HEAD,
    CONV_HEAD_LAST,
    FLAT,
    LINEAR,
    LINEAR_IN,
    MAP,
    SAME,
    Format,
    Layout,
    Positions,
    Rule,
)


def _rule(theirs: str, *ours: str, layout: Layout = SAME, **kwargs) -> Rule:
    return Rule(theirs, tuple(f'params/{path}' for path in ours), layout, **kwargs)


# Modules of PyTorch: a weight and perhaps a bias.


def _linear(theirs: str, *ours: str, **kwargs) -> Iterator[Rule]:
    """A map to heads, or to features: its outputs are the axes behind the first."""
    kernels, biases = ([f'{path}/{leaf}' for path in ours] for leaf in _LINEAR)
    yield _rule(f'{theirs}.weight', *kernels, layout=LINEAR, **kwargs)
    yield _rule(f'{theirs}.bias', *biases, layout=FLAT, **kwargs)


def _linear_in(theirs: str, ours: str) -> Iterator[Rule]:
    """A map from heads: its inputs are the axes before the last."""
    yield _rule(f'{theirs}.weight', f'{ours}/kernel', layout=LINEAR_IN)
    yield _rule(f'{theirs}.bias', f'{ours}/bias')


def _conv(theirs: str, ours: str, bias: bool = False, **kwargs) -> Iterator[Rule]:
    yield _rule(f'{theirs}.weight', f'{ours}/kernel', layout=CONV, **kwargs)
    if bias:
        yield _rule(f'{theirs}.bias', f'{ours}/bias', **kwargs)


def _norm(theirs: str, ours: str, **kwargs) -> Iterator[Rule]:
    yield _rule(f'{theirs}.weight', f'{ours}/scale', **kwargs)
    yield _rule(f'{theirs}.bias', f'{ours}/bias', **kwargs)


def _batch_norm(theirs: str, ours: str) -> Iterator[Rule]:
    yield from _norm(theirs, ours)
    yield Rule(f'{theirs}.running_mean', (f'batch_stats/{ours}/mean',))
    yield Rule(f'{theirs}.running_var', (f'batch_stats/{ours}/var',))


_LINEAR = ('kernel', 'bias')
_LEAVES = ('weight', 'bias')  # of PyTorch
_QKV = ('query', 'key', 'value')


def _each(parent: str, *names: str) -> list[str]:
    return [f'{parent}/{name}' for name in names]


_ATTENTION = 'block{i:02}/attention'
_GPSA = {'only_with': f'params/{_ATTENTION}/gating'}
_STAGES: dict[str, Any] = {'only_with': 'params/stem/stage1_block1/conv1/kernel'}

# timm, and with it the published DeiT, ConViT and DINOv2. The fused map of queries,
# keys and values has no bias in some models; a ConViT's first blocks fuse two of them.
TIMM = Format(
    'the naming of timm',
    (
        _rule('cls_token', 'class_token/cls'),
        _rule('dist_token', 'class_token/dist'),
        _rule('reg_token', 'registers/tokens'),
        _rule('register_tokens', 'registers/tokens'),  # DINOv2's own files
        Positions('pos_embed'),
        *_conv('patch_embed.proj', 'patches/embed', bias=True),
        *_norm('blocks.{i}.norm1', 'block{i:02}/norm1'),
        *_linear('blocks.{i}.attn.qk', *_each(_ATTENTION, 'query', 'key'), **_GPSA),
        *_linear('blocks.{i}.attn.v', f'{_ATTENTION}/value', **_GPSA),
        *_linear('blocks.{i}.attn.qkv', *_each(_ATTENTION, *_QKV)),
        *_linear('blocks.{i}.attn.q', f'{_ATTENTION}/query'),
        *_linear('blocks.{i}.attn.k', f'{_ATTENTION}/key'),
        _rule(
            'blocks.{i}.attn.pos_proj.weight',
            f'{_ATTENTION}/position_kernel',
            layout=LINEAR,
        ),
        _rule('blocks.{i}.attn.pos_proj.bias', f'{_ATTENTION}/position_bias'),
        _rule('blocks.{i}.attn.gating_param', f'{_ATTENTION}/gating'),
        *_linear_in('blocks.{i}.attn.proj', f'{_ATTENTION}/out'),
        _rule('blocks.{i}.ls1.gamma', 'block{i:02}/layer_scale1/scale'),
        *_norm('blocks.{i}.norm2', 'block{i:02}/norm2'),
        *_linear('blocks.{i}.mlp.fc1', 'block{i:02}/mlp/fc1'),
        *_linear('blocks.{i}.mlp.fc2', 'block{i:02}/mlp/fc2'),
        _rule('blocks.{i}.ls2.gamma', 'block{i:02}/layer_scale2/scale'),
        *_norm('norm', 'head/norm'),
        _rule('attn_pool.latent', 'head/pool/probe'),
        *_linear('attn_pool.q', 'head/pool/attention/query'),
        *_linear('attn_pool.kv', *_each('head/pool/attention', 'key', 'value')),
        *_linear_in('attn_pool.proj', 'head/pool/attention/out'),
        *_norm('attn_pool.norm', 'head/pool/norm'),
        *_linear('attn_pool.mlp.fc1', 'head/pool/mlp/fc1'),
        *_linear('attn_pool.mlp.fc2', 'head/pool/mlp/fc2'),
        *_linear('pre_logits.fc', 'head/pre_logits'),
        *_linear('head', 'head/logits'),
        *_linear('head_dist', 'head/dist_logits'),
        # The trunk of a hybrid; that of R+ViT-Ti/16 is a stem alone.
        *_conv('patch_embed.backbone.stem.conv', 'stem/stem', **_STAGES),
        *_norm('patch_embed.backbone.stem.norm', 'stem/stem_norm', **_STAGES),
        *_conv('patch_embed.backbone.conv', 'stem/stem'),
        *_norm('patch_embed.backbone.norm', 'stem/stem_norm'),
        *_conv(
            'patch_embed.backbone.stages.{s}.blocks.{b}.conv{n}',
            'stem/stage{s+1}_block{b+1}/conv{n}',
        ),
        *_norm(
            'patch_embed.backbone.stages.{s}.blocks.{b}.norm{n}',
            'stem/stage{s+1}_block{b+1}/norm{n}',
        ),
        *_conv(
            'patch_embed.backbone.stages.{s}.blocks.{b}.downsample.conv',
            'stem/stage{s+1}_block{b+1}/shortcut',
        ),
        *_norm(
            'patch_embed.backbone.stages.{s}.blocks.{b}.downsample.norm',
            'stem/stage{s+1}_block{b+1}/shortcut_norm',
        ),
    ),
    ignored={
        'mask_token': 'only masked pre-training reads it',
        **dict.fromkeys(
            (
                *(f'head.mlp.{i}.{leaf}' for i in (0, 2, 4) for leaf in _LEAVES),
                *(f'head.last_layer.weight_{leaf}' for leaf in 'gv'),
            ),
            'the projection head of DINO serves its training only',
        ),
    },
)

# BiT in timm.
TIMM_BIT = Format(
    "timm's naming of BiT",
    (
        *_conv('stem.conv', 'stem'),
        *_norm('stages.{s}.blocks.{b}.norm{n}', 'stage{s+1}_block{b+1}/norm{n}'),
        *_conv('stages.{s}.blocks.{b}.conv{n}', 'stage{s+1}_block{b+1}/conv{n}'),
        *_conv(
            'stages.{s}.blocks.{b}.downsample.conv', 'stage{s+1}_block{b+1}/shortcut'
        ),
        *_norm('norm', 'norm'),
        _rule('head.fc.weight', 'head/kernel', layout=CONV_HEAD),
        _rule('head.fc.bias', 'head/bias'),
    ),
)

# ResNets in torchvision and in timm.
TORCHVISION = Format(
    'the naming of torchvision',
    (
        *_conv('conv1', 'stem'),
        *_batch_norm('bn1', 'stem_norm'),
        *_conv('layer{s}.{b}.conv{n}', 'stage{s}_block{b+1}/conv{n}'),
        *_batch_norm('layer{s}.{b}.bn{n}', 'stage{s}_block{b+1}/norm{n}'),
        *_conv('layer{s}.{b}.downsample.0', 'stage{s}_block{b+1}/shortcut'),
        *_batch_norm('layer{s}.{b}.downsample.1', 'stage{s}_block{b+1}/shortcut_norm'),
        *_linear('fc', 'head'),
    ),
    ignored={'num_batches_tracked': 'a counter'},
)

_LAYER = 'encoder.layer.{i}'
_HF_POOLER = {
    'pooler.dense.weight': 'the pooler is not part of the classifier',
    'pooler.dense.bias': 'the pooler is not part of the classifier',
    'mask_token': 'only masked pre-training reads it',
}

# ViT, DeiT and DINOv2 in Hugging Face's transformers.
HUGGING_FACE = Format(
    'the naming of transformers',
    (
        _rule('embeddings.cls_token', 'class_token/cls'),
        _rule('embeddings.distillation_token', 'class_token/dist'),
        _rule('embeddings.register_tokens', 'registers/tokens'),
        Positions('embeddings.position_embeddings'),
        *_conv('embeddings.patch_embeddings.projection', 'patches/embed', bias=True),
        *(
            rule
            for name in _QKV
            for rule in _linear(
                f'{_LAYER}.attention.attention.{name}', f'{_ATTENTION}/{name}'
            )
        ),
        *_linear_in(f'{_LAYER}.attention.output.dense', f'{_ATTENTION}/out'),
        # ViT and DeiT
        *_norm(f'{_LAYER}.layernorm_before', 'block{i:02}/norm1'),
        *_norm(f'{_LAYER}.layernorm_after', 'block{i:02}/norm2'),
        *_linear(f'{_LAYER}.intermediate.dense', 'block{i:02}/mlp/fc1'),
        *_linear(f'{_LAYER}.output.dense', 'block{i:02}/mlp/fc2'),
        # DINOv2
        *_norm(f'{_LAYER}.norm1', 'block{i:02}/norm1'),
        *_norm(f'{_LAYER}.norm2', 'block{i:02}/norm2'),
        *_linear(f'{_LAYER}.mlp.fc1', 'block{i:02}/mlp/fc1'),
        *_linear(f'{_LAYER}.mlp.fc2', 'block{i:02}/mlp/fc2'),
        _rule(f'{_LAYER}.layer_scale1.lambda1', 'block{i:02}/layer_scale1/scale'),
        _rule(f'{_LAYER}.layer_scale2.lambda1', 'block{i:02}/layer_scale2/scale'),
        *_norm('layernorm', 'head/norm'),
        *_linear('classifier', 'head/logits'),
        *_linear('cls_classifier', 'head/logits'),
        *_linear('distillation_classifier', 'head/dist_logits'),
    ),
    ignored=_HF_POOLER,
    prefixes=('', 'vit.', 'deit.', 'dinov2.', 'dinov2_with_registers.'),
)

_STAGE = 'encoder.stages.{s}.layers.{b}'

# ResNets in transformers.
HUGGING_FACE_RESNET = Format(
    "transformers' naming of ResNets",
    (
        *_conv('embedder.embedder.convolution', 'stem'),
        *_batch_norm('embedder.embedder.normalization', 'stem_norm'),
        *_conv(f'{_STAGE}.layer.{{n}}.convolution', 'stage{s+1}_block{b+1}/conv{n+1}'),
        *_batch_norm(
            f'{_STAGE}.layer.{{n}}.normalization', 'stage{s+1}_block{b+1}/norm{n+1}'
        ),
        *_conv(f'{_STAGE}.shortcut.convolution', 'stage{s+1}_block{b+1}/shortcut'),
        *_batch_norm(
            f'{_STAGE}.shortcut.normalization', 'stage{s+1}_block{b+1}/shortcut_norm'
        ),
        *_linear('classifier.1', 'head'),
    ),
    ignored={'num_batches_tracked': 'a counter'},
    prefixes=('resnet.', ''),
)


# Google's files have Flax's layouts already.


def _flax(theirs: str, ours: str, *leaves: str) -> Iterator[Rule]:
    for leaf in leaves:
        yield _rule(f'{theirs}/{leaf}', f'{ours}/{leaf}')


def _map_norm(theirs: str, ours: str) -> Iterator[Rule]:
    """GroupNorms of the hybrids are stored as maps of one pixel."""
    yield _rule(f'{theirs}/scale', f'{ours}/scale', layout=MAP)
    yield _rule(f'{theirs}/bias', f'{ours}/bias', layout=MAP)


_BLOCK = 'Transformer/encoderblock_{i}'
_UNIT = 'block{s}/unit{b}'

# ViT, AugReg and hybrids.
GOOGLE_VIT = Format(
    "the naming of Google's ViT",
    (
        _rule('cls', 'class_token/cls'),
        Positions('Transformer/posembed_input/pos_embedding'),
        *_flax('embedding', 'patches/embed', 'kernel', 'bias'),
        *_flax(f'{_BLOCK}/LayerNorm_0', 'block{i:02}/norm1', 'scale', 'bias'),
        *(
            rule
            for name in (*_QKV, 'out')
            for rule in _flax(
                f'{_BLOCK}/MultiHeadDotProductAttention_1/{name}',
                f'{_ATTENTION}/{name}',
                *_LINEAR,
            )
        ),
        *_flax(f'{_BLOCK}/LayerNorm_2', 'block{i:02}/norm2', 'scale', 'bias'),
        *_flax(f'{_BLOCK}/MlpBlock_3/Dense_0', 'block{i:02}/mlp/fc1', *_LINEAR),
        *_flax(f'{_BLOCK}/MlpBlock_3/Dense_1', 'block{i:02}/mlp/fc2', *_LINEAR),
        *_flax('Transformer/encoder_norm', 'head/norm', 'scale', 'bias'),
        *_flax('pre_logits', 'head/pre_logits', *_LINEAR),
        *_flax('head', 'head/logits', *_LINEAR),
        *_flax('conv_root', 'stem/stem', 'kernel'),
        *_map_norm('gn_root', 'stem/stem_norm'),
        *_flax(f'{_UNIT}/conv{{n}}', 'stem/stage{s}_block{b}/conv{n}', 'kernel'),
        *_map_norm(f'{_UNIT}/gn{{n}}', 'stem/stage{s}_block{b}/norm{n}'),
        *_flax(f'{_UNIT}/conv_proj', 'stem/stage{s}_block{b}/shortcut', 'kernel'),
        *_map_norm(f'{_UNIT}/gn_proj', 'stem/stage{s}_block{b}/shortcut_norm'),
    ),
    prefixes=('', 'opt/target/', 'params/'),
    # Flax's GELU is the approximation unless it is told otherwise.
    facts={'activation': 'gelu_tanh'},
)

_BIT_UNIT = 'resnet/block{s}/unit{b:02}'
_STANDARDIZED = 'standardized_conv2d'


def _bit_norm(theirs: str, ours: str) -> Iterator[Rule]:
    yield _rule(f'{theirs}/group_norm/gamma', f'{ours}/scale')
    yield _rule(f'{theirs}/group_norm/beta', f'{ours}/bias')


# BiT, written by TensorFlow.
GOOGLE_BIT = Format(
    "the naming of Google's BiT",
    (
        *_flax(f'resnet/root_block/{_STANDARDIZED}', 'stem', 'kernel'),
        *(
            rule
            for n, letter in enumerate('abc', start=1)
            for rule in (
                *_bit_norm(f'{_BIT_UNIT}/{letter}', f'stage{{s}}_block{{b}}/norm{n}'),
                *_flax(
                    f'{_BIT_UNIT}/{letter}/{_STANDARDIZED}',
                    f'stage{{s}}_block{{b}}/conv{n}',
                    'kernel',
                ),
            )
        ),
        *_flax(
            f'{_BIT_UNIT}/a/proj/{_STANDARDIZED}',
            'stage{s}_block{b}/shortcut',
            'kernel',
        ),
        *_bit_norm('resnet', 'norm'),
        _rule('resnet/head/conv2d/kernel', 'head/kernel', layout=CONV_HEAD_LAST),
        _rule('resnet/head/conv2d/bias', 'head/bias'),
    ),
)

FORMATS = (
    TIMM,
    TIMM_BIT,
    TORCHVISION,
    HUGGING_FACE,
    HUGGING_FACE_RESNET,
    GOOGLE_VIT,
    GOOGLE_BIT,
)
