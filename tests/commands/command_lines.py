"""Configs and overrides of the runs that commands look at."""

import pathlib

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
# A small ConViT.
DIGITS = [
    f'--config={CONFIGS}/digits_convit.py:smoke',
    '--config.model.kwargs.depth=2',
    '--config.model.kwargs.num_local_layers=1',
]
# Three classes of colour images.
COLOUR = [
    f'--config={CONFIGS}/digits_cnn.py:smoke',
    '--config.dataset.name=synthetic:size=10,num_classes=3,num_examples=20',
    '--config.model.kwargs.widths=(8,16)',
    '--config.model.kwargs.strides=(1,2)',
    '--config.num_steps=2',
    '--config.batch_size=16',
]
# A small Transformer that writes dates.
DATES = [
    f'--config={CONFIGS}/dates_transformer.py:smoke',
    '--config.model.kwargs.width=16',
    '--config.model.kwargs.mlp_dim=16',
]
