"""From convolution to attention: pure Flax modules and one training loop."""

__version__ = '0.1.0'

from vit_jax.models import build_model, list_models

__all__ = ['build_model', 'list_models']
