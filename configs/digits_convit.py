"""ConViT on scikit-learn's digits, from a fresh clone on a laptop.

task      8x8 grey digits, 1,438 to train on, 359 held out
model     ConViT, patch 2 (16 tokens), width 64, 4 layers of which 3 GPSA, 4 heads
"""

from vit_jax.config import choose_variant, default_config


def get_config(arg=None):
    variant = choose_variant(arg, 'smoke')
    config = default_config()
    config.unlock()
    config.model.name = 'ConViT-Ti/2'
    config.model.kwargs = {
        'width': 64,
        'depth': 4,
        'mlp_dim': 128,
        'num_heads': 4,
        'num_local_layers': 3,
    }
    config.dataset.name = 'digits'
    config.augment.crop = 'pad'
    config.augment.pad = 1
    config.batch_size = 64
    config.num_steps = 2500
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 100
    config.optim.label_smoothing = 0.1
    config.optim.clip_norm = 1.0
    config.eval.every_steps = 500
    config.checkpoint.every_steps = 500
    if variant == 'smoke':
        config.num_steps = 3
        config.optim.warmup_steps = 1
    return config.lock()
