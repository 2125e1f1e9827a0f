"""Writes models.npz: tiny DeiT, ConViT and DINOv2 models of the public library timm.

    pip install torch==2.13.0 numpy==2.4.6
    pip install --no-deps timm==1.0.31 torchvision==0.28.0
    pip install safetensors==0.8.0 huggingface_hub pyyaml
    python tests/golden/make_models.py

The models are built by their public classes, all parameters are random, and the
arrays are those of `state_dict()`. Nothing of the library's source is used here.
"""

import numpy as np
import torch
from recording import draw, randomize, record, save

# timm imports torchvision, which expects two operators that a build of PyTorch for
# the CPU may lack; no model here calls them.
_operators = torch.library.Library('torchvision', 'DEF')
for _name in ('nms', 'qnms'):
    _operators.define(
        f'{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
    )

from timm.models.convit import ConVit  # noqa: E402
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

B, V = 3, 7


def classify(seed, model, size):
    """Cross-entropy of random labels: eval mode, no dropout anywhere."""
    rng = np.random.default_rng(seed)
    randomize(model, rng)
    image = draw(rng, B, 3, *size)
    label = torch.tensor(rng.integers(V, size=B))
    logits = model(image)
    loss = torch.nn.functional.cross_entropy(logits, label)
    inputs = {'image': image, 'label': label}
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    (eps,) = {norm.eps for norm in norms}
    return record(model, inputs, logits, loss, eps=eps)


def vit(seed, model_class=VisionTransformer, **options):
    size, patch = (6, 20), (2, 4)  # a grid of 3x5
    model = model_class(
        img_size=size,
        patch_size=patch,
        num_classes=V,
        embed_dim=12,
        depth=2,
        num_heads=3,
        mlp_ratio=1.5,
        **options,
    )
    return classify(seed, model, size)


def convit(qkv_bias):
    model = ConVit(
        img_size=8,  # this class takes squares only
        patch_size=2,
        num_classes=V,
        embed_dim=5,  # per head
        depth=3,
        num_heads=4,
        mlp_ratio=1.1,
        qkv_bias=qkv_bias,
        local_up_to_layer=2,
    )
    return classify(1 + qkv_bias, model, (8, 8))


if __name__ == '__main__':
    save(
        'models.npz',
        {
            'deit': vit(0),
            'convit': convit(qkv_bias=False),
            'convit_bias': convit(qkv_bias=True),
            'distilled': vit(3, VisionTransformerDistilled),
            'dinov2': vit(4, init_values=1e-5),
            # The class token has no position of its own here.
            'registers': vit(5, init_values=1e-5, reg_tokens=4, no_embed_class=True),
        },
    )
