"""Writes published.npz: tiny models of timm and transformers, as they save them.

    pip install torch==2.13.0 numpy==2.4.6
    pip install --no-deps timm==1.0.31 torchvision==0.28.0
    pip install safetensors==0.8.0 huggingface_hub pyyaml transformers==5.23.0
    python tests/golden/make_published.py

The models are built by their public classes, all parameters and statistics are
random, and the arrays are those of `state_dict()`, or of the file that
`save_pretrained` writes. Nothing of the libraries' source is used here.
"""

import os
import tempfile
from functools import partial

import numpy as np
import torch
from recording import draw, save
from safetensors.torch import load_file

# timm and transformers import torchvision, which expects two operators that a build of
# PyTorch for the CPU may lack; no model here calls them.
_operators = torch.library.Library('torchvision', 'DEF')
for _name in ('nms', 'qnms'):
    _operators.define(
        f'{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
    )

import transformers as hf  # noqa: E402
from timm.layers import GroupNormAct, StdConv2d, StdConv2dSame  # noqa: E402
from timm.models.resnet import BasicBlock, Bottleneck, ResNet  # noqa: E402
from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from timm.models.vision_transformer_hybrid import HybridEmbed  # noqa: E402

B, V = 2, 7
RECTANGLE = {'image_size': (6, 20), 'patch_size': (2, 4)}  # a grid of 3x5
SQUARE = {'image_size': (8, 8), 'patch_size': 2}  # transformers' DINOv2 takes no other
RESNET_SIZE = (13, 22)
VIT = {'embed_dim': 12, 'depth': 2, 'num_heads': 3, 'mlp_ratio': 1.5}
# As published, but for the number of groups.
GROUP_NORM = partial(GroupNormAct, num_groups=4)


def randomize(model, rng):
    """Every parameter and statistic leaves the value it starts from."""
    for name, x in model.state_dict().items():
        if not x.is_floating_point():
            continue
        scale = x.ndim == 1 and name.endswith('weight')  # of a norm
        new = draw(rng, *x.shape, scale=0.3, centre=1.0 if scale else 0.0)
        if name.endswith('var'):
            new = (new.abs() + 0.5).float()  # what is stored is what is computed with
        x.copy_(new.detach())
    return model.eval()


def record(
    seed, model, size, output=lambda out: out, arrays=torch.nn.Module.state_dict
):
    """What is saved, an image, the output, and the epsilons of the norms."""
    rng = np.random.default_rng(seed)
    randomize(model, rng)
    image = draw(rng, B, 3, *size).detach()
    with torch.no_grad():
        out = output(model(image))
    kinds = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.BatchNorm2d)
    eps = {}
    for kind in kinds:
        found = {m.eps for m in model.modules() if isinstance(m, kind)}
        if found:
            (value,) = found
            field = 'layer_norm_eps' if kind is torch.nn.LayerNorm else 'norm_eps'
            eps[f'eps/{field}'] = torch.tensor(value)
    named = {f'arrays/{name}': x for name, x in arrays(model).items()}
    return {'image': image, 'out': out, **eps, **named}


def pretrained(model):
    """The arrays of the file that transformers writes, under the names it has there."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(os.path.join(folder, 'model.safetensors'))


def vit_of_transformers(seed, config_class, model_class, sizes, output, **options):
    config = config_class(hidden_size=12, num_attention_heads=3, **sizes, **options)
    return record(seed, model_class(config), sizes['image_size'], output, pretrained)


def logits(out):
    return out.logits


def features(out):
    return out.pooler_output


def resnet_of_transformers(seed):
    config = hf.ResNetConfig(
        embedding_size=4, hidden_sizes=[16, 32], depths=[2, 1], num_labels=V
    )
    model = hf.ResNetForImageClassification(config)
    return record(seed, model, RESNET_SIZE, logits, pretrained)


def resnet(seed, block, layers):
    model = ResNet(
        block,
        layers,
        num_classes=V,
        channels=(4, 8),
        stem_type='deep',  # the only way to a stem that is narrower than 64
        stem_width=2,
    )
    model.conv1 = torch.nn.Conv2d(3, 4, 7, stride=2, padding=3, bias=False)
    model.layer3 = model.layer4 = torch.nn.Identity()
    return record(seed, model, RESNET_SIZE)


def bit(seed):
    model = ResNetV2(
        (2, 1),
        channels=(32, 64),
        num_classes=V,
        stem_chs=8,
        stem_type='fixed',
        norm_layer=GROUP_NORM,
        conv_layer=partial(StdConv2d, eps=1e-8),
    )
    return record(seed, model, RESNET_SIZE)


def vit(seed, size, **options):
    model = VisionTransformer(img_size=size, num_classes=V, **VIT, **options)
    return record(seed, model, size)


def hybrid(seed, size, layers, patch_size):
    """As vit_small_r26_s32_224 is made, or, without layers, vit_tiny_r_s16_p8_224."""
    parts = {
        'stem_type': 'same',
        'preact': False,
        'conv_layer': partial(StdConv2dSame, eps=1e-8),
        'norm_layer': GROUP_NORM,
    }
    if layers:
        backbone = ResNetV2(
            layers, (32, 64), num_classes=0, global_pool='', stem_chs=8, **parts
        )
    else:
        backbone = create_resnetv2_stem(3, 8, **parts)
    embed = partial(HybridEmbed, backbone=backbone)
    return vit(seed, size, embed_layer=embed, patch_size=patch_size)


if __name__ == '__main__':
    save(
        'published.npz',
        {
            'hf_vit': vit_of_transformers(
                0,
                hf.ViTConfig,
                hf.ViTForImageClassification,
                RECTANGLE,
                logits,
                num_hidden_layers=2,
                intermediate_size=18,
                num_labels=V,
            ),
            'hf_deit': vit_of_transformers(
                1,
                hf.DeiTConfig,
                hf.DeiTForImageClassificationWithTeacher,
                RECTANGLE,
                logits,
                num_hidden_layers=1,
                intermediate_size=18,
                num_labels=V,
            ),
            'hf_dinov2': vit_of_transformers(
                2,
                hf.Dinov2Config,
                hf.Dinov2Model,
                SQUARE,
                features,
                num_hidden_layers=1,
                mlp_ratio=2,
            ),
            'hf_registers': vit_of_transformers(
                3,
                hf.Dinov2WithRegistersConfig,
                hf.Dinov2WithRegistersModel,
                SQUARE,
                features,
                num_hidden_layers=2,
                mlp_ratio=2,
                num_register_tokens=4,
            ),
            'hf_resnet': resnet_of_transformers(4),
            'resnet': resnet(5, Bottleneck, (2, 1)),
            'resnet_basic': resnet(6, BasicBlock, (1, 1)),
            'bit': bit(7),
            'hybrid': hybrid(8, (16, 24), (2, 1), 1),
            'hybrid_stem': hybrid(9, (16, 24), (), 2),
            'siglip': vit(
                10, (6, 20), patch_size=(2, 4), global_pool='map', class_token=False
            ),
        },
    )
