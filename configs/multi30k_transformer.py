"""A tiny Transformer on Multi30k, English to German.

data      29,000 descriptions of pictures, Multi30k (arXiv 1605.00459): train, val and
          test_2016_flickr, .en and .de, in multi30k/ in --config.dataset.data_dir
model     Transformer-tiny: 4 + 4 layers, width 128, MLP 256, 4 heads, dropout 0.3;
          10,000 subwords of both languages together; 2.6M parameters
recipe    arXiv 2105.14462: Adam, 8,000 updates of 4,096 tokens a side, 2,000 steps of
          warm-up to 5e-3, then falling with the root of the step; label smoothing 0.1;
          mean of the last 10 epochs; beam 5
published 41.02 BLEU on test_2016_flickr (text only); whether in lower case it does not
          say, so both are printed; experiments/multi30k tells what else differs
expected  `:cpu`, 1,600 updates in an hour on 2 cores: 30.9 BLEU greedily, 32.3 by a
          beam of five, see experiments/multi30k; the full recipe: not run

  vit_jax train --config=configs/multi30k_transformer.py --workdir=/tmp/multi30k \\
      --config.dataset.data_dir=/data/text
  vit_jax evaluate --workdir=/tmp/multi30k@last:10 --config.text.beam=5 \\
      --config.dataset.eval_split=test_2016_flickr
"""

from vit_jax.config import choose_variant, default_config


def get_config(variant=None):
    variant = choose_variant(variant, 'smoke', 'cpu', 'cpu_lstm', 'lstm')
    config = default_config('translate')
    config.model.name = 'Transformer-tiny'
    config.dataset.name = 'text:multi30k?src=en&tgt=de'
    config.dataset.eval_split = 'val'
    config.text.vocab_size = 10_000
    config.text.buckets = (12, 16, 20, 24, 32, 64)
    config.text.tokens_per_batch = 4096
    config.num_steps = 8000
    config.optim.schedule = 'rsqrt'
    config.optim.learning_rate = 5e-3
    config.optim.warmup_steps = 2000
    config.optim.b2 = 0.98
    config.optim.weight_decay = 0.0
    config.optim.label_smoothing = 0.1
    config.eval.every_steps = 500
    config.checkpoint.every_steps = 137  # an epoch
    config.checkpoint.keep = 10
    config.checkpoint.average = 10
    if variant in ('lstm', 'cpu_lstm'):
        config.model.name = 'LSTM-tiny'
    if variant in ('cpu', 'cpu_lstm'):  # a fifth of the updates
        config.num_steps = 1600
        config.model.kwargs = {'dropout_rate': 0.1}
        config.optim.schedule = 'cosine'
        config.optim.learning_rate = 2e-3
        config.optim.warmup_steps = 200
        config.optim.clip_norm = 1.0
        config.eval.every_steps = 400
        config.checkpoint.every_steps = 400
        config.checkpoint.average = 0
    elif variant == 'smoke':
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
