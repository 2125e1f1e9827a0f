"""The road from convolution to attention on digits, one module swapped at each step.

data      8x8 grey digits, 1,438 to train on, 359 held out; scikit-learn ships them
model     a step of STEPS below, 0.13M to 0.15M parameters
recipe    AdamW, 1,000 steps of 64 images, shifts by one pixel; the same for each
expected  99.5% (cnn) to 49.9% (no_positions): experiments/digits_road

  vit_jax train --config=configs/digits_road.py:sagan --workdir=/tmp/road/sagan
"""

from vit_jax.config import choose_variant, default_config

CNN = {'widths': (40, 40, 72, 72, 72)}
# Three stages of two blocks; each stage but the first halves the map, from 8x8. The
# widths make the parameters as many as elsewhere.
RESNET = {'stage_sizes': (2, 2, 2), 'bottleneck': False, 'stem': 'small'}
# A 4x4 grid of patches.
VIT = {'width': 64, 'depth': 4, 'mlp_dim': 128, 'num_heads': 4}

STEPS = {
    'cnn': ('CNN', CNN),
    'sagan': ('CNN', {**CNN, 'attention_after': (2,)}),
    'resnet': ('ResNet-18', {**RESNET, 'width': 14}),
    'resnet_late': ('ResNet-18', {**RESNET, 'width': 20, 'attention_stages': (3,)}),
    'resnet_local': (
        'ResNet-18',
        {
            **RESNET,
            'width': 24,
            'attention': 'local',
            'attention_kwargs': {'kernel_size': 3, 'num_heads': 4},
            'attention_stages': (1, 2, 3),
        },
    ),
    'no_positions': ('ViT-Ti/2', {**VIT, 'posemb': 'none'}),
    'integer': ('ViT-Ti/2', {**VIT, 'posemb': 'integer'}),
    'sincos': ('ViT-Ti/2', {**VIT, 'posemb': 'sincos2d'}),
    'learned': ('ViT-Ti/2', {**VIT, 'posemb': 'learned'}),
    'convit': ('ConViT-Ti/2', {**VIT, 'num_local_layers': 3}),
}


def get_config(variant=None):
    step = choose_variant(variant, 'smoke', *STEPS) or 'cnn'
    smoke = step == 'smoke'
    config = default_config()
    config.model.name, config.model.kwargs = STEPS['resnet_late' if smoke else step]
    config.dataset.name = 'digits'
    config.augment.crop = 'pad'
    config.augment.pad = 1
    config.batch_size = 64
    config.num_steps = 3 if smoke else 1000
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 1 if smoke else 100
    config.optim.label_smoothing = 0.1
    config.optim.clip_norm = 1.0
    config.eval.every_steps = 500
    config.checkpoint.every_steps = 500
    return config
