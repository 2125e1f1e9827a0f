"""ConViT of Ti width on CIFAR-10.

data      CIFAR-10, a TFDS dataset prepared as array_record in --config.dataset.data_dir
model     ConViT-Ti/4 (an 8x8 grid), 10 of 12 layers GPSA; 5.4M parameters
recipe    AdamW, 100 epochs in batches of 512, shifts by 4 pixels, mirroring,
          stochastic depth 0.1, label smoothing 0.1, bfloat16
expected  not run; `:small`, 0.14M parameters, on a tenth of the images: 49.8% accuracy,
          see experiments/cifar10_sample_efficiency

  vit_jax train --config=configs/cifar10_convit.py --workdir=/tmp/cifar10_convit \\
      --config.dataset.data_dir=/data/tfds
"""

from vit_jax.config import choose_variant, default_config

STEPS_PER_EPOCH = 50_000 / 512


def get_config(variant=None):
    variant = choose_variant(variant, 'smoke', 'small')
    config = default_config()
    config.model.name = 'ConViT-Ti/4'
    config.model.kwargs = {'drop_path_rate': 0.1}
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
    if variant == 'smoke':  # generated images, a smaller model
        config.model.kwargs = {
            'drop_path_rate': 0.1,
            'width': 24,
            'depth': 2,
            'mlp_dim': 48,
            'num_local_layers': 1,
        }
        config.dataset.name = 'synthetic:size=32,num_examples=64'
        config.batch_size = 16
        config.num_epochs = None
        config.num_steps = 3
        config.optim.warmup_steps = 1
    if variant == 'small':  # minutes on a CPU, to try things out; not the recipe
        config.model.kwargs = {
            'width': 64,
            'depth': 4,
            'mlp_dim': 128,
            'num_heads': 4,
            'num_local_layers': 3,
        }
        config.batch_size = 64
        config.num_epochs = None
        config.num_steps = 1500
        config.optim.warmup_steps = 100
        config.dtype = 'float32'
    return config
