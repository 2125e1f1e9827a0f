"""A small SAGAN on scikit-learn's digits; `:plain` is the same without attention.

data      8x8 grey digits, 1,438 to train on, 359 held out; scikit-learn ships them
model     residual generator and discriminator, every kernel spectrally normalised,
          self-attention on the 8x8 maps of both; 0.07M
recipe    hinge losses, Adam without momentum at 2e-4 and 8e-4, 8,000 steps of 64
          images; samples are of the average over the last 1,000 steps
expected  Fréchet distance 0.35 ± 0.03, `:plain` 0.27 ± 0.02, held-out digits 0.85
          (seeds 0 to 2, experiments/sagan)

  vit_jax train --config=configs/digits_cnn.py --workdir=/tmp/digits_cnn
  vit_jax train --config=configs/digits_sagan.py --workdir=/tmp/digits_sagan \\
      --config.gan.classifier=/tmp/digits_cnn
"""

from vit_jax.config import choose_variant, default_config


def get_config(variant=None):
    variant = choose_variant(variant, 'smoke', 'plain')
    config = default_config('gan')
    config.model.name = 'SAGAN'
    config.model.kwargs = {
        'image_shape': (8, 8, 1),
        'latent_dim': 32,
        'generator_widths': (32, 32),
        'discriminator_widths': (32, 32),
        'attention': variant != 'plain',
    }
    config.dataset.name = 'digits'
    config.batch_size = 64
    config.num_steps = 3 if variant == 'smoke' else 8000
    config.optim.learning_rate = 2e-4
    config.optim.rules = (('discriminator/', 4.0, None),)  # learns four times as fast
    config.optim.schedule = 'constant'
    config.optim.weight_decay = 0.0
    config.optim.b1 = 0.0
    config.optim.b2 = 0.9
    config.optim.ema_decay = 0.999
    config.eval.every_steps = 1000
    config.checkpoint.every_steps = 1000
    return config
