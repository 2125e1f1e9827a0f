"""A ResNet on CIFAR-10, the size of configs/cifar10_convit.py.

data      CIFAR-10, a TFDS dataset prepared as array_record in --config.dataset.data_dir
model     ResNet-18 of width 44 behind a 3x3 stem; 5.3M parameters
recipe    AdamW, 100 epochs in batches of 512, shifts by 4 pixels, mirroring,
          label smoothing 0.1, bfloat16
expected  not run

  vit_jax train --config=configs/cifar10_resnet.py --workdir=/tmp/cifar10_resnet \\
      --config.dataset.data_dir=/data/tfds
"""

from vit_jax.config import choose_variant, default_config

STEPS_PER_EPOCH = 50_000 / 512


def get_config(variant=None):
    smoke = choose_variant(variant, 'smoke') == 'smoke'
    config = default_config()
    config.model.name = 'ResNet-18'
    config.model.kwargs = {'width': 44, 'stem': 'small'}
    config.dataset.name = 'cifar10'
    config.augment.crop = 'pad'
    config.augment.pad = 4
    config.augment.flip = True
    config.batch_size = 512
    config.num_epochs = 100.0
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = round(5 * STEPS_PER_EPOCH)
    config.optim.label_smoothing = 0.1
    config.optim.clip_norm = 1.0
    config.dtype = 'bfloat16'
    if smoke:  # generated images, a smaller model
        config.model.kwargs = {'width': 8, 'stem': 'small', 'stage_sizes': (1, 1)}
        config.dataset.name = 'synthetic:size=32,num_examples=64'
        config.batch_size = 16
        config.num_epochs = None
        config.num_steps = 3
        config.optim.warmup_steps = 1
    return config
