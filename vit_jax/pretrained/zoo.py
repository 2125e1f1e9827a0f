"""The table of weights that others published.

Image sizes, crops and interpolation are those of timm 1.0.31 for the same weights;
epsilons are those of the published code. Google trained with Flax's GELU, the tanh
approximation, wherever the weights lie by now; timm and transformers compute the exact
one with them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

# Mean and standard deviation of the pixels, in [0, 1].
HALF = ((0.5,), (0.5,))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# Who measured a top-1 accuracy, with the preprocessing that the row says.
SOURCES = {
    'ConViT': 'arXiv 2103.10697, table 1',
    'timm': 'https://github.com/huggingface/pytorch-image-models, results-imagenet.csv',
    'torchvision': 'https://docs.pytorch.org/vision/stable/models.html',
}

# Model -> the public implementation with which logits (or features) were compared, on
# the same random weights, by tests/pretrained/test_parity.py.
COMPARED = {
    **dict.fromkeys(
        (
            *('DeiT-Ti/16', 'DeiT-S/16', 'DeiT-S/16-distilled', 'ViT-B/16'),
            *('ConViT-Ti/16', 'ConViT-S/16', 'ConViT-B/16'),
            *('DINOv2-S/14', 'DINOv2-S/14-registers'),
            *('BiT-R50x1', 'R26+ViT-S/32'),
        ),
        'timm 1.0.31',
    ),
    'ResNet-50': 'torchvision 0.28.0',
}


class Weights(NamedTuple):
    """Weights that others published.

    Attributes:
      model: the name of `build_model`.
      top1: accuracy on ImageNet's validation set, in per cent; None where nobody
        published it of these weights.
      addresses: where they are; the same weights at each.
      source: who measured `top1`, a key of `SOURCES`.
      kwargs: fields in which the model differs from what its name says.
      num_classes: V; None for a backbone.
      class_names: 'imagenet'; None where the names are numbers.
      image_size: one side, in pixels.
      pixels: mean and standard deviation.
      crop_fraction: see `center_crop`.
      interpolation: 'bicubic' or 'bilinear'.
    """

    model: str
    top1: float | None
    addresses: tuple[str, ...]
    source: str | None = None
    kwargs: Mapping[str, Any] = {}
    num_classes: int | None = 1000
    class_names: str | None = 'imagenet'
    image_size: int = 224
    pixels: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    crop_fraction: float = 0.875
    interpolation: str = 'bicubic'


def _rows(
    addresses: tuple[str, ...],
    *rows: tuple[str, float | None, *tuple[str, ...]],
    **common: Any,
) -> tuple[Weights, ...]:
    """Rows (model, top-1, names that stand in the addresses) and what they share."""
    return tuple(
        Weights(model, top1, tuple(a.format(*names) for a in addresses), **common)
        for model, top1, *names in rows
    )


_META = 'https://dl.fbaipublicfiles.com'
_VIT = 'https://storage.googleapis.com/vit_models'
_BIT = 'https://storage.googleapis.com/bit_models'
_TORCH = 'https://download.pytorch.org/models'

# 21,843 classes that go by numbers.
_21K: dict[str, Any] = {'num_classes': 21843, 'class_names': None}
_BACKBONE: dict[str, Any] = {'num_classes': None, 'class_names': None}
_GOOGLE: dict[str, Any] = {
    'kwargs': {'activation': 'gelu_tanh'},
    'pixels': HALF,
    'crop_fraction': 0.9,
}
_DINO: dict[str, Any] = {**_BACKBONE, 'image_size': 518, 'crop_fraction': 1.0}
_TI = 'Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0'
_S32 = 'S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0'
_S16 = 'S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0'
_B32 = 'B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0'
_B32_384 = 'B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0'
_B16 = 'B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0'
_L16 = 'L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1'
_R_TI = 'R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0'
_R26 = 'R26_S_32-i21k-300ep-lr_0.001-aug_light0-wd_0.03-do_0.1-sd_0.1'
_R26_21K = 'R26_S_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0'
_R50 = 'R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1'
_R50_21K = 'R50_L_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0'
# How AugReg was fine-tuned: learning rate 0.01 or 0.03, size of the images.
_01, _03 = ('--imagenet2012-steps_20k-lr_0.01', '--imagenet2012-steps_20k-lr_0.03')

ZOO = (
    # ConViT, arXiv 2103.10697.
    *_rows(
        (f'{_META}/convit/{{0}}.pth', 'hf:timm/{0}.fb_in1k'),
        ('ConViT-Ti/16', 73.1, 'convit_tiny'),
        ('ConViT-S/16', 81.3, 'convit_small'),
        ('ConViT-B/16', 82.4, 'convit_base'),
        source='ConViT',
    ),
    # DeiT, arXiv 2012.12877.
    *_rows(
        (f'{_META}/deit/{{0}}-{{1}}.pth', 'hf:timm/{0}.fb_in1k'),
        ('DeiT-Ti/16', 72.172, 'deit_tiny_patch16_224', 'a1311bcf'),
        ('DeiT-S/16', 79.844, 'deit_small_patch16_224', 'cd65a155'),
        ('DeiT-B/16', 81.992, 'deit_base_patch16_224', 'b5f2ef4d'),
        ('DeiT-Ti/16-distilled', 74.5, 'deit_tiny_distilled_patch16_224', 'b40b3cf7'),
        ('DeiT-S/16-distilled', 81.218, 'deit_small_distilled_patch16_224', '649709d9'),
        ('DeiT-B/16-distilled', 83.386, 'deit_base_distilled_patch16_224', 'df68dfff'),
        source='timm',
        crop_fraction=0.9,
    ),
    *_rows(
        (f'{_META}/deit/{{0}}-{{1}}.pth', 'hf:timm/{0}.fb_in1k'),
        ('DeiT-B/16', 83.106, 'deit_base_patch16_384', '8de9b5d1'),
        source='timm',
        image_size=384,
        crop_fraction=1.0,
    ),
    # ViT, arXiv 2010.11929.
    *_rows(
        (
            f'{_VIT}/imagenet21k+imagenet2012/ViT-B_16-224.npz',
            'hf:timm/{0}.orig_in21k_ft_in1k',
        ),
        ('ViT-B/16', 81.786, 'vit_base_patch16_224'),
        source='timm',
        **_GOOGLE,
    ),
    *_rows(
        ('hf:google/{0}',),
        ('ViT-B/16', None, 'vit-base-patch16-224'),
        **_GOOGLE,
    ),
    *_rows(
        (
            f'{_VIT}/imagenet21k+imagenet2012/R50+ViT-B_16.npz',
            'hf:timm/{0}.orig_in21k_ft_in1k',
        ),
        ('R50+ViT-B/16', 84.976, 'vit_base_r50_s16_384'),
        source='timm',
        **{**_GOOGLE, 'image_size': 384, 'crop_fraction': 1.0},
    ),
    *_rows(
        ('hf:timm/{0}.orig_in21k',),
        ('R50+ViT-B/16', None, 'vit_base_r50_s16_224'),
        **_GOOGLE,
        **_BACKBONE,
    ),
    # "How to train your ViT?", arXiv 2106.10270: from ImageNet-21k to ImageNet,
    *_rows(
        ('augreg:{0}-res_224', 'hf:timm/{1}_224.augreg_in21k_ft_in1k'),
        ('ViT-Ti/16', 75.454, _TI + _03, 'vit_tiny_patch16'),
        ('ViT-S/32', 75.994, _S32 + _03, 'vit_small_patch32'),
        ('ViT-S/16', 81.384, _S16 + _03, 'vit_small_patch16'),
        ('ViT-B/32', 80.716, _B32 + _03, 'vit_base_patch32'),
        ('ViT-B/16', 84.532, _B16 + _01, 'vit_base_patch16'),
        ('ViT-L/16', 85.834, _L16 + _01, 'vit_large_patch16'),
        ('R+ViT-Ti/16', 71.798, _R_TI + _03, 'vit_tiny_r_s16_p8'),
        ('R26+ViT-S/32', 81.864, _R26 + _03, 'vit_small_r26_s32'),
        ('R50+ViT-L/32', 84.422, _R50 + _01, 'vit_large_r50_s32'),
        source='timm',
        **_GOOGLE,
    ),
    *_rows(
        ('augreg:{0}-res_384', 'hf:timm/{1}_384.augreg_in21k_ft_in1k'),
        ('ViT-B/32', 83.35, _B32_384 + _03, 'vit_base_patch32'),
        ('ViT-B/16', 85.996, _B16 + _01, 'vit_base_patch16'),
        source='timm',
        **{**_GOOGLE, 'image_size': 384, 'crop_fraction': 1.0},
    ),
    # and before that.
    *_rows(
        ('augreg:{0}', 'hf:timm/{1}_224.augreg_in21k'),
        ('ViT-Ti/16', None, _TI, 'vit_tiny_patch16'),
        ('ViT-S/32', None, _S32, 'vit_small_patch32'),
        ('ViT-S/16', None, _S16, 'vit_small_patch16'),
        ('ViT-B/32', None, _B32, 'vit_base_patch32'),
        ('ViT-B/16', None, _B16, 'vit_base_patch16'),
        ('ViT-L/16', None, _L16, 'vit_large_patch16'),
        ('R+ViT-Ti/16', None, _R_TI, 'vit_tiny_r_s16_p8'),
        ('R26+ViT-S/32', None, _R26_21K, 'vit_small_r26_s32'),
        ('R50+ViT-L/32', None, _R50_21K, 'vit_large_r50_s32'),
        **_GOOGLE,
        **_21K,
    ),
    # DINOv2, arXiv 2304.07193; with registers, arXiv 2309.16588.
    *_rows(
        (
            f'{_META}/dinov2/dinov2_vit{{0}}14/dinov2_vit{{0}}14_pretrain.pth',
            'hf:timm/vit_{1}_patch14_dinov2.lvd142m',
            'hf:facebook/dinov2-{1}',
        ),
        ('DINOv2-S/14', None, 's', 'small'),
        ('DINOv2-B/14', None, 'b', 'base'),
        ('DINOv2-L/14', None, 'l', 'large'),
        **_DINO,
    ),
    *_rows(
        (
            f'{_META}/dinov2/dinov2_vit{{0}}14/dinov2_vit{{0}}14_reg4_pretrain.pth',
            'hf:timm/vit_{1}_patch14_reg4_dinov2.lvd142m',
            'hf:facebook/dinov2-with-registers-{1}',
        ),
        ('DINOv2-S/14-registers', None, 's', 'small'),
        ('DINOv2-B/14-registers', None, 'b', 'base'),
        ('DINOv2-L/14-registers', None, 'l', 'large'),
        **_DINO,
    ),
    # torchvision's first weights; arXiv 1512.03385.
    *_rows(
        (f'{_TORCH}/{{0}}-{{1}}.pth', 'hf:timm/{0}.tv_in1k'),
        ('ResNet-18', 69.758, 'resnet18', 'f37072fd'),
        ('ResNet-34', 73.314, 'resnet34', 'b627a593'),
        ('ResNet-50', 76.13, 'resnet50', '0676ba61'),
        ('ResNet-101', 77.374, 'resnet101', '63fe2227'),
        ('ResNet-152', 78.312, 'resnet152', '394f9c45'),
        source='torchvision',
        interpolation='bilinear',
    ),
    # BiT-M, arXiv 1912.11370: from ImageNet-21k to ImageNet, and before that.
    *_rows(
        (
            f'{_BIT}/BiT-M-R{{0}}-ILSVRC2012.npz',
            'hf:timm/resnetv2_{0}_bit.goog_in21k_ft_in1k',
        ),
        ('BiT-R50x1', 80.34, '50x1'),
        ('BiT-R101x1', 82.342, '101x1'),
        ('BiT-R50x3', 84.02, '50x3'),
        source='timm',
        image_size=448,
        pixels=HALF,
        crop_fraction=1.0,
        interpolation='bilinear',
    ),
    *_rows(
        (f'{_BIT}/BiT-M-R{{0}}.npz', 'hf:timm/resnetv2_{0}_bit.goog_in21k'),
        ('BiT-R50x1', None, '50x1'),
        ('BiT-R101x1', None, '101x1'),
        ('BiT-R50x3', None, '50x3'),
        pixels=HALF,
        interpolation='bilinear',
        **_21K,
    ),
)
