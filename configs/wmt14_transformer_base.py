"""The Transformer of "Attention Is All You Need", base model, on WMT14 English-German.

data      WMT14: 4.5M pairs of sentences, wmt14_translate/de-en of TFDS, prepared as
          array_record in --config.dataset.data_dir; newstest2013
          to validate, newstest2014 to test
model     Transformer-base: 6 + 6 layers, width 512; 37,000 subwords shared by source,
          target and output; 63M parameters (65M with those of the paper's vocabulary)
recipe    arXiv 1706.03762, section 5: Adam, 100,000 steps of 25,000 tokens a side, rate
          d^-0.5 min(step^-0.5, step 4000^-1.5), label smoothing 0.1, dropout 0.1; mean
          of the last 5 checkpoints; beam 4, length penalty 0.6
published 27.3 BLEU on newstest2014 (tokenized, compounds split, as sacrebleu does not),
          12 hours on 8 P100
differs   bfloat16; Adam's epsilon 1e-8 (1e-9 there); BPE of raw text (tokenized there)
expected  not run here

  vit_jax train --config=configs/wmt14_transformer_base.py --workdir=/data/runs/base \\
      --config.dataset.data_dir=/data/tfds
  vit_jax evaluate --workdir=/data/runs/base@last:5 --config.text.beam=4 \\
      --config.dataset.eval_split=test
"""

from vit_jax.config import choose_variant, default_config


def get_config(variant=None):
    variant = choose_variant(variant, 'smoke')
    config = default_config('translate')
    config.model.name = 'Transformer-base'
    config.model.kwargs = {'max_length': 512}
    config.dataset.name = 'wmt14_translate/de-en?src=en&tgt=de'
    config.dataset.eval_split = 'validation'
    config.text.vocab_size = 37_000
    config.text.tokenizer = 'bpe'
    config.text.buckets = (16, 24, 32, 48, 64, 96, 128, 256)
    config.text.tokens_per_batch = 25_000
    config.num_steps = 100_000
    config.optim.schedule = 'rsqrt'
    config.optim.warmup_steps = 4000
    config.optim.learning_rate = (512 * 4000) ** -0.5
    config.optim.b2 = 0.98
    config.optim.weight_decay = 0.0
    config.optim.label_smoothing = 0.1
    config.dtype = 'bfloat16'
    config.eval.every_steps = 5000
    config.checkpoint.every_steps = 1400  # ten minutes there
    config.checkpoint.keep = 5
    config.checkpoint.average = 5
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
