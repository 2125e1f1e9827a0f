"""SAGAN on CIFAR-10, not conditional on classes; `:plain`: the same without attention.

data      CIFAR-10, a TFDS dataset prepared as array_record in --config.dataset.data_dir
model     residual generator (256 channels) and discriminator (128) as of arXiv
          1802.05957, every kernel spectrally normalised, self-attention on the 16x16
          maps of both; 4.9M
recipe    arXiv 1805.08318: hinge losses, Adam without momentum at 1e-4 and 4e-4; here
          50,000 steps of 128 images, mirroring; samples are of an average
expected  not run; see experiments/sagan

  vit_jax train --config=configs/cifar10_cnn.py --workdir=/tmp/cifar10_cnn \\
      --config.dataset.data_dir=/data/tfds
  vit_jax train --config=configs/cifar10_sagan.py --workdir=/tmp/cifar10_sagan \\
      --config.dataset.data_dir=/data/tfds --config.gan.classifier=/tmp/cifar10_cnn
"""

from vit_jax.config import choose_variant, default_config


def get_config(variant=None):
    variant = choose_variant(variant, 'smoke', 'plain')
    config = default_config('gan')
    config.model.name = 'SAGAN'
    config.model.kwargs = {'attention': variant != 'plain'}
    config.dataset.name = 'cifar10'
    config.augment.flip = True
    config.batch_size = 128
    config.num_steps = 50_000
    config.optim.learning_rate = 1e-4
    config.optim.rules = (('discriminator/', 4.0, None),)  # learns four times as fast
    config.optim.schedule = 'constant'
    config.optim.weight_decay = 0.0
    config.optim.b1 = 0.0
    config.optim.b2 = 0.9
    config.optim.ema_decay = 0.9999
    config.eval.every_steps = 5000
    config.checkpoint.every_steps = 5000
    if variant == 'smoke':  # generated images, a smaller model
        config.model.kwargs = {
            'latent_dim': 8,
            'generator_widths': (16, 16, 16),
            'discriminator_widths': (16, 16, 16),
        }
        config.dataset.name = 'synthetic:size=32,num_examples=64'
        config.batch_size = 16
        config.num_steps = 3
        config.optim.ema_decay = 0.9
    return config
