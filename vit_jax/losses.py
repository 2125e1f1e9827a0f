"""Losses per example, in float32."""

import jax
import jax.numpy as jnp
import optax

from vit_jax.typing import Array


def softmax_cross_entropy(
    logits: Array, label: Array, label_smoothing: float = 0.0
) -> Array:
    """Cross entropy against labels of which a share is spread over all classes.

    "Rethinking the Inception Architecture", arXiv 1512.00567, section 7.

    Args:
      logits: `[B, V]`.
      label: `[B]` int.
      label_smoothing: the share, in [0, 1).

    Returns:
      `[B]` float32.
    """
    logits = logits.astype(jnp.float32)
    one_hot = jax.nn.one_hot(label, logits.shape[-1])
    target = optax.smooth_labels(one_hot, label_smoothing)
    return optax.softmax_cross_entropy(logits, target)
