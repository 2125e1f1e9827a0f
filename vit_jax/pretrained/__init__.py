"""Weights that others published, and their way back."""

from vit_jax.pretrained.load import load_params, load_variables
from vit_jax.pretrained.report import Report

__all__ = ['Report', 'load_params', 'load_variables']
