import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.losses import cross_entropy, hinge, smooth_labels

LABEL = np.array([4, 0, 2])


def make_logits(scale=3.0):
    return scale * np.random.default_rng(0).normal(size=(3, 5))


def reference(logits, label, smoothing):
    """Row by row, in float64."""
    losses = []
    for row, k in zip(logits.astype(float), label):
        log_p = row - row.max()
        log_p = log_p - np.log(np.exp(log_p).sum())
        target = np.full(len(row), smoothing / len(row))
        target[k] += 1 - smoothing
        losses.append(-(target * log_p).sum())
    return losses


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.7])
@pytest.mark.parametrize('scale', [0.1, 3.0, 300.0])
def test_cross_entropy_equals_the_sums(smoothing, scale):
    logits = make_logits(scale)
    target = smooth_labels(jnp.asarray(LABEL), 5, smoothing)
    losses = cross_entropy(jnp.asarray(logits), target)
    assert losses.shape == (3,)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, reference(logits, LABEL, smoothing), rtol=1e-5)


def test_equal_logits_cost_the_logarithm_of_the_classes():
    target = smooth_labels(jnp.array([0, 6]), 7, 0.3)
    losses = cross_entropy(jnp.full((2, 7), 11.0), target)
    np.testing.assert_allclose(losses, np.log([7, 7]), rtol=1e-6)


def test_gradient_is_probability_minus_target():
    logits = make_logits()
    smooth = smooth_labels(jnp.asarray(LABEL), 5, 0.2)
    grads = jax.grad(lambda x: cross_entropy(x, smooth).sum())(jnp.asarray(logits))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    target = 0.8 * np.eye(5)[LABEL] + 0.2 / 5
    np.testing.assert_allclose(grads, p - target, atol=1e-6)


def test_the_hinge_by_hand():
    """Of margins below and above 1; its slope is -1 where it is not 0."""
    margin = jnp.array([-2.0, 0.0, 0.5, 1.5, 3.0])
    assert hinge(margin).tolist() == [3.0, 1.0, 0.5, 0.0, 0.0]
    slope = jax.grad(lambda x: hinge(x).sum())(margin)
    assert slope.tolist() == [-1.0, -1.0, -1.0, 0.0, 0.0]
    assert hinge(margin.astype(jnp.bfloat16)).dtype == jnp.float32


def test_bfloat16_logits_are_summed_in_float32():
    """A hundred classes of which one is likely: bfloat16 sums lose the others."""
    logits = np.zeros((1, 1000), np.float32)
    logits[0, 0] = 8.0
    target = smooth_labels(jnp.array([0]), 1000)
    losses = cross_entropy(jnp.asarray(logits, jnp.bfloat16), target)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, reference(logits, [0], 0.0), rtol=1e-5)
