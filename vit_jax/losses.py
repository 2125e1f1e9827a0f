"""Losses per example, in float32."""

import jax
import jax.numpy as jnp
import optax

from vit_jax.typing import Array


def smooth_labels(label: Array, num_classes: int, share: float = 0.0) -> Array:
    """Targets of which a share is spread evenly over all classes.

    "Rethinking the Inception Architecture", arXiv 1512.00567, section 7.

    Args:
      label: `[B]` int.
      num_classes: V.
      share: in [0, 1).

    Returns:
      `[B, V]` float32, each row of sum 1.

    >>> smooth_labels(jnp.array([1]), 4, 0.5)
    Array([[0.125, 0.625, 0.125, 0.125]], dtype=float32)
    """
    return optax.smooth_labels(jax.nn.one_hot(label, num_classes), share)


def label_cross_entropy(logits: Array, label: Array, smoothing: float = 0.0) -> Array:
    """Cross entropy against labels, smoothed as by `smooth_labels`.

    The same as `cross_entropy` of these targets, which would take as much memory as
    the logits where V is large.

    Args:
      logits: `[..., V]`.
      label: `[...]` int.
      smoothing: share of the target that is spread evenly over all classes.

    Returns:
      `[...]` float32.

    >>> label_cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), 0.1).round(4)  # log 4
    Array([1.3863], dtype=float32)
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    hit = jnp.take_along_axis(log_probs, label[..., None], axis=-1)[..., 0]
    return -(1.0 - smoothing) * hit - smoothing * jnp.mean(log_probs, axis=-1)


def hinge(margin: Array) -> Array:
    """max(0, 1 - margin), float32.

    Of a discriminator, "Geometric GAN", arXiv 1705.02894, and SAGAN, arXiv 1805.08318,
    equation 4: `hinge(logits)` of real images, `hinge(-logits)` of generated ones.

    >>> hinge(jnp.array([-0.5, 0.25, 2.0]))
    Array([1.5 , 0.75, 0.  ], dtype=float32)
    """
    return jnp.maximum(1.0 - margin.astype(jnp.float32), 0.0)


def cross_entropy(logits: Array, target: Array) -> Array:
    """Cross entropy against a distribution over classes.

    Args:
      logits: `[B, V]`.
      target: `[B, V]`, each row of sum 1.

    Returns:
      `[B]` float32.
    """
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), target)
