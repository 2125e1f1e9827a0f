import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.metrics import classification_metrics, mean

ROWS, CLASSES = 11, 7


def make_batch(classes=CLASSES):
    rng = np.random.default_rng(6)
    return {
        'logits': rng.normal(size=(ROWS, classes)).astype(np.float32),
        'label': rng.integers(0, classes, ROWS),
        'weight': np.float32([1, 1, 0, 1, 0.5, 1, 0, 2, 1, 1, 1]),
        'losses': rng.exponential(size=ROWS).astype(np.float32),
    }


def reference(logits, label, weight, losses):
    sums = {'loss': 0.0, 'accuracy': 0.0, 'accuracy_top5': 0.0}
    for row, k, w, loss in zip(logits, label, weight, losses):
        rank = sum(other > row[k] for other in row)
        sums['loss'] += w * loss
        sums['accuracy'] += w * (rank == 0)
        sums['accuracy_top5'] += w * (rank < 5)
    return sums


def test_metrics_equal_the_sums():
    batch = make_batch()
    metrics = classification_metrics(**{k: jnp.asarray(v) for k, v in batch.items()})
    expected = reference(**batch)
    assert set(metrics) == set(expected)
    assert expected['accuracy'] > 0
    assert expected['accuracy_top5'] < 9.5
    for name, (total, weight) in metrics.items():
        assert total == pytest.approx(expected[name], rel=1e-6)
        assert weight == 9.5
        assert (total.shape, total.dtype) == ((), jnp.float32)


def test_rows_of_weight_zero_do_not_count():
    """Whatever they hold."""
    batch = make_batch()
    other = {k: v.copy() for k, v in batch.items()}
    for row in np.flatnonzero(batch['weight'] == 0):
        other['logits'][row] = 100.0
        other['label'][row] = 0
        other['losses'][row] = 1e6
    assert classification_metrics(**batch) == classification_metrics(**other)


@pytest.mark.parametrize(('classes', 'top5'), [(2, False), (5, False), (6, True)])
def test_top5_needs_more_than_five_classes(classes, top5):
    metrics = classification_metrics(**make_batch(classes))
    assert ('accuracy_top5' in metrics) == top5


@pytest.mark.parametrize('size', [1, 3, 4, ROWS])
def test_the_mean_does_not_depend_on_the_batches(size):
    batch = make_batch()
    parts = [
        classification_metrics(**{k: v[i : i + size] for k, v in batch.items()})
        for i in range(0, ROWS, size)
    ]
    expected = reference(**batch)
    result = mean(parts)
    assert set(result) == set(expected)
    for name, value in result.items():
        assert value == pytest.approx(expected[name] / 9.5, rel=1e-6)
        assert type(value) is float


def test_the_mean_is_summed_in_float64():
    """2**24 ones and then some: float32 stops counting there."""
    pairs = [{'loss': (np.float32(2**24), np.float32(2**24))}]
    pairs += [{'loss': (np.float32(0), np.float32(1))}] * 64
    assert mean(pairs) == {'loss': 2**24 / (2**24 + 64)}


def test_metrics_that_only_some_batches_have():
    pairs = [{'a': (6.0, 2.0)}, {'a': (1.0, 1.0), 'b': (5.0, 2.0)}]
    assert mean(pairs) == {'a': 7 / 3, 'b': 2.5}
    assert mean([]) == {}
