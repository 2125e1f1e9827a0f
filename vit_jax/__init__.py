"""From convolution to attention: pure Flax modules and one training loop."""

__version__ = '0.1.0'

from vit_jax.maps import attention_maps
from vit_jax.models import build_model, list_models
from vit_jax.pretrained import load_params, load_variables

__all__ = [
    'attention_maps',
    'build_model',
    'list_models',
    'load_params',
    'load_variables',
]
