"""The Transformer of "Attention Is All You Need", big model, on WMT14 English-German.

data      as configs/wmt14_transformer_base.py
model     Transformer-big: 6 + 6 layers, width 1024, 16 heads; 214M parameters
recipe    as the base model, but 300,000 steps, dropout 0.3, the rate of its width, and
          the mean of the last 20 checkpoints
published 28.4 BLEU on newstest2014 (see the base model), 3.5 days on 8 P100
differs   bfloat16; Adam's epsilon 1e-8 (1e-9 there); BPE of raw text (tokenized there)
expected  not run here

  vit_jax train --config=configs/wmt14_transformer_big.py --workdir=/data/runs/big \\
      --config.dataset.data_dir=/data/tfds
  vit_jax evaluate --workdir=/data/runs/big@last:20 --config.text.beam=4 \\
      --config.dataset.eval_split=test
"""

from vit_jax.config import choose_variant, default_config


def get_config(variant=None):
    variant = choose_variant(variant, 'smoke')
    config = default_config('translate')
    config.model.name = 'Transformer-big'
    config.model.kwargs = {'max_length': 512}
    config.dataset.name = 'wmt14_translate/de-en?src=en&tgt=de'
    config.dataset.eval_split = 'validation'
    config.text.vocab_size = 37_000
    config.text.tokenizer = 'bpe'
    config.text.buckets = (16, 24, 32, 48, 64, 96, 128, 256)
    config.text.tokens_per_batch = 25_000
    config.num_steps = 300_000
    config.optim.schedule = 'rsqrt'
    config.optim.warmup_steps = 4000
    config.optim.learning_rate = (1024 * 4000) ** -0.5
    config.optim.b2 = 0.98
    config.optim.weight_decay = 0.0
    config.optim.label_smoothing = 0.1
    config.dtype = 'bfloat16'
    config.eval.every_steps = 10_000
    config.checkpoint.every_steps = 600  # ten minutes there
    config.checkpoint.keep = 20
    config.checkpoint.average = 20
    if variant == 'smoke':
        config.model.kwargs = {'width': 16, 'depth': 1, 'mlp_dim': 24, 'num_heads': 2}
        config.dataset.name = 'dates:num_examples=64'
        config.dataset.eval_split = 'train'
        config.text.tokenizer = 'char'
        config.text.vocab_size = 128
        config.text.buckets = (40,)
        config.text.tokens_per_batch = 640
        config.text.extra_length = 0
        config.num_steps = 3
        config.optim.warmup_steps = 1
        config.checkpoint.average = 0
    return config
