"""A Transformer that writes dates as ISO does, from the many ways people write them.

data      20,000 generated pairs such as '3rd of March 1998' -> '1998-03-03'
model     Transformer of width 64, 2 + 2 layers, characters as tokens; 0.2M parameters
recipe    AdamW, 2,000 steps of up to 4,096 tokens a side, cosine
expected  not measured yet

  vit_jax train --config=configs/dates_transformer.py --workdir=/tmp/dates
  echo 'Tuesday, 3rd of March 1998' | vit_jax translate --weights=/tmp/dates
"""

from vit_jax.config import choose_variant, default_config


def get_config(variant=None):
    variant = choose_variant(variant, 'smoke')
    config = default_config('translate')
    config.model.name = 'Transformer-tiny'
    config.model.kwargs = {
        'width': 64,
        'depth': 2,
        'mlp_dim': 128,
        'dropout_rate': 0.0,
        'norm_first': True,
    }
    config.dataset.name = 'dates'
    config.text.tokenizer = 'char'
    config.text.vocab_size = 128
    config.text.buckets = (16, 24, 40)
    config.text.tokens_per_batch = 4096
    config.text.extra_length = 0
    config.text.score = 'exact_match'
    config.num_steps = 1000
    config.optim.learning_rate = 2e-3
    config.optim.weight_decay = 0.01
    config.optim.warmup_steps = 100
    config.optim.clip_norm = 1.0
    config.eval.every_steps = 250
    config.checkpoint.every_steps = 500
    if variant == 'smoke':
        config.num_steps = 3
        config.optim.warmup_steps = 1
        config.text.buckets = (40,)
        config.text.tokens_per_batch = 640
        config.dataset.name = 'dates:num_examples=64'
        config.dataset.eval_split = 'train'
    return config
