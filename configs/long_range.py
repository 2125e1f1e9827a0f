"""Transformer and LSTM on symbols far apart: copying, and associative recall.

data      generated: `copy:length=64`, ten symbols among blanks, to be written again, or
          `recall:length=64`, four pairs of a key and a value among blanks, whose keys
          are given and values to be written; a character is a token
model     `:transformer` of width 64, 1 + 1 layers, norms first, sines as positions;
          `:lstm` of 1 + 1 layers, the encoder both ways, with attention and input
          feeding; `:lstm_plain`, the same without attention; 0.09M parameters each
recipe    AdamW, 1,500 steps of up to 528 tokens a side, cosine, one shape of batches
expected  see experiments/long_range

  vit_jax train --config=configs/long_range.py:lstm --workdir=/tmp/copy \\
      --config.dataset.name=copy:length=64
"""

from vit_jax.config import choose_variant, default_config

# 5% apart in parameters, at most.
MODELS = {
    'transformer': (
        'Transformer-tiny',
        {'width': 64, 'mlp_dim': 128, 'norm_first': True, 'max_length': 1024},
    ),
    'lstm': ('LSTM-tiny', {'width': 64}),
    'lstm_plain': ('LSTM-tiny', {'width': 76, 'attention': False}),
}


def get_config(variant=None):
    variant = choose_variant(variant, *MODELS, 'smoke')
    config = default_config('translate')
    name, fields = MODELS.get(variant, MODELS['transformer'])
    config.model.name = name
    config.model.kwargs = {'depth': 1, 'dropout_rate': 0.0, **fields}
    config.dataset.name = 'copy:length=64'
    config.text.tokenizer = 'char'
    config.text.vocab_size = 128
    config.text.buckets = ()
    config.text.tokens_per_batch = 528  # 8 rows of length 64
    config.text.extra_length = 0
    config.text.score = 'exact_match'
    config.num_steps = 1500
    config.optim.learning_rate = 2e-3
    config.optim.weight_decay = 0.01
    config.optim.warmup_steps = 100
    config.optim.clip_norm = 1.0
    config.eval.every_steps = 500
    config.checkpoint.every_steps = 500
    if variant == 'smoke':
        config.num_steps = 3
        config.optim.warmup_steps = 1
        config.text.tokens_per_batch = 144
        config.dataset.name = 'copy:length=16,num_examples=64'
        config.dataset.eval_split = 'train'
    return config
