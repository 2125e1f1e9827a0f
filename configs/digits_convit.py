"""ConViT on scikit-learn's digits: from a fresh clone to a result on a laptop.

data      8x8 grey digits, 1,438 to train on, 359 held out; scikit-learn ships them
model     ConViT, patch 2 (a 4x4 grid), width 64, 4 layers of which 3 GPSA; 0.14M
recipe    AdamW, 2,500 steps of 64 images, shifts by one pixel; the same for the
          CNN, the ViT and the ConViT (configs/digits_*.py)
expected  98.1 ± 0.6% (seeds 0 to 2, experiments/convit_table2)

  vit_jax train --config=configs/digits_convit.py --workdir=/tmp/digits_convit
"""

from vit_jax.config import choose_variant, default_config


def get_config(variant=None):
    smoke = choose_variant(variant, 'smoke') == 'smoke'
    config = default_config()
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
    config.num_steps = 3 if smoke else 2500
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 1 if smoke else 100
    config.optim.label_smoothing = 0.1
    config.optim.clip_norm = 1.0
    config.eval.every_steps = 500
    config.checkpoint.every_steps = 500
    return config
