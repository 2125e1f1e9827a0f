"""A CNN on scikit-learn's digits, the size of configs/digits_convit.py.

data      8x8 grey digits, 1,438 to train on, 359 held out; scikit-learn ships them
model     5 convolutions 3x3 with GroupNorm, one of stride 2; 0.14M
recipe    AdamW, 2,500 steps of 64 images, shifts by one pixel; the same for the
          CNN, the ViT and the ConViT (configs/digits_*.py)
expected  99.3 ± 0.4% (seeds 0 to 2, experiments/convit_table2)

  vit_jax train --config=configs/digits_cnn.py --workdir=/tmp/digits_cnn
"""

from vit_jax.config import choose_variant, default_config


def get_config(variant=None):
    smoke = choose_variant(variant, 'smoke') == 'smoke'
    config = default_config()
    config.model.name = 'CNN'
    config.model.kwargs = {'widths': (40, 40, 72, 72, 72)}
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
