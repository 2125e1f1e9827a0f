"""Probes of features, against loops in float64 and closed forms."""

import dataclasses
from contextlib import closing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from vit_jax import probes
from vit_jax.build import build
from vit_jax.config import default_config
from vit_jax.errors import UserError
from vit_jax.parallel import Parallel
from vit_jax.probes import Features

D = 5


def blobs(num_examples, num_classes=3, noise=1.0, seed=0):
    """Classes around centres of their own, not centred and not of equal variance."""
    centres = np.random.default_rng(7).normal(size=(num_classes, D))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_examples).astype(np.int32)
    x = centres[labels] + noise * rng.normal(size=(num_examples, D))
    return Features(np.float32(x * np.arange(1, D + 1) + 3), labels)


# --- Nearest neighbours -------------------------------------------------------


def knn_by_hand(train, queries, k, temperature):
    predicted = []
    for query in queries.astype(np.float64):
        similarities = [
            np.dot(query, x) / (np.linalg.norm(query) * np.linalg.norm(x))
            for x in train.features.astype(np.float64)
        ]
        nearest = sorted(range(len(similarities)), key=lambda i: -similarities[i])[:k]
        votes = np.zeros(train.labels.max() + 1)
        for i in nearest:
            votes[train.labels[i]] += np.exp(similarities[i] / temperature)
        predicted.append(np.argmax(votes))
    return predicted


@pytest.mark.parametrize(('k', 'temperature'), [(1, 0.07), (7, 0.07), (7, 10.0)])
def test_knn_is_a_weighted_vote(k, temperature, monkeypatch):
    train, test = blobs(53), blobs(31, seed=1)
    expected = knn_by_hand(train, test.features, k, temperature)
    predicted = probes.knn(train, test.features, k, temperature)
    np.testing.assert_array_equal(predicted, expected)
    # A few queries at a time, the last of them fewer.
    monkeypatch.setattr(probes, 'MAX_SIMILARITIES', 53 * 7 + 1)
    chunked = probes.knn(train, test.features, k, temperature)
    np.testing.assert_array_equal(chunked, predicted)


def test_neighbours_and_temperature_count():
    """One near example of class 1, three less near ones of class 0."""
    x = np.array([[1.0, 0.1], [1.0, 0.5], [1.0, -0.5], [1.0, 0.6]], np.float32)
    train, query = Features(x, np.array([1, 0, 0, 0])), np.float32([[5.0, 0.0]])
    assert probes.knn(train, query, k=1) == [1]
    assert probes.knn(train, query, k=4, temperature=0.05) == [1]
    assert probes.knn(train, query, k=4, temperature=1.0) == [0]
    assert probes.knn(train, query, k=4, temperature=1e-4) == [1]  # exp(1e4): no NaN


def test_ties_go_to_the_first_example_and_the_lowest_class():
    x = np.array([[2.0, 0.0], [1.0, 0.0], [3.0, 0.0]], np.float32)
    train, query = Features(x, np.array([2, 1, 1])), np.float32([[1.0, 0.0]])
    assert probes.knn(train, query, k=1) == [2]
    assert probes.knn(train, query, k=2) == [1]


def test_more_neighbours_than_examples():
    with pytest.raises(UserError, match=r'^k=54 neighbours are more than the 53 train'):
        probes.knn(blobs(53), blobs(2).features, k=54)


# --- Few shots ----------------------------------------------------------------


def ridge_by_hand(x, labels, queries, strengths):
    """Closed form; the strength by leaving each example out in turn."""
    mean, std = x.mean(0), x.std(0)
    x, queries = (x - mean) / std, (queries - mean) / std
    targets = np.where(labels[:, None] == np.unique(labels), 1.0, -1.0)

    def solve(x, targets, l2):
        shift, offset = x.mean(0), targets.mean(0)
        x = x - shift
        gram = x.T @ x + l2 * np.eye(x.shape[1])
        weights = np.linalg.solve(gram, x.T @ (targets - offset))
        return lambda queries: (queries - shift) @ weights + offset

    def error(l2):
        rest = ~np.eye(len(x), dtype=bool)
        left_out = [solve(x[r], targets[r], l2)(x[~r])[0] for r in rest]
        return np.sum((np.array(left_out) - targets) ** 2)

    best = min(strengths, key=error)
    return best, np.unique(labels)[np.argmax(solve(x, targets, best)(queries), axis=1)]


@pytest.mark.parametrize(('shots', 'num_classes'), [(2, 3), (5, 3), (7, 5)])
def test_few_shot_is_ridge_regression_in_closed_form(shots, num_classes):
    train, test = blobs(149, num_classes), blobs(83, num_classes, seed=1)
    chosen = probes.choose_shots(train.labels, shots, seed=4)
    x = train.features[chosen].astype(np.float64)
    best, expected = ridge_by_hand(
        x, train.labels[chosen], test.features.astype(np.float64), probes.RIDGE_L2
    )
    assert min(probes.RIDGE_L2) < best < max(probes.RIDGE_L2)
    predicted = probes.few_shot(train, test.features, shots, seed=4)
    np.testing.assert_array_equal(predicted, expected)
    assert np.mean(predicted == test.labels) > 1 / num_classes


def test_shots_are_of_every_class_and_differ_by_seed():
    labels = blobs(97, 3).labels
    chosen = probes.choose_shots(labels, 5, seed=0)
    assert len(set(chosen)) == 15
    assert np.bincount(labels[chosen]).tolist() == [5, 5, 5]
    assert chosen.tolist() == probes.choose_shots(labels, 5, seed=0).tolist()
    assert set(chosen) != set(probes.choose_shots(labels, 5, seed=1))


def test_too_few_examples_for_the_shots():
    with pytest.raises(
        UserError, match=r'^class 2 has 1 training examples, fewer than'
    ):
        probes.choose_shots(np.array([0, 0, 2, 0]), 2, seed=0)


# --- Linear probe -------------------------------------------------------------


def loss_of(features, labels, weights, bias, l2):
    logits = features @ weights.T + bias
    logits -= logits.max(1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -log_probs[np.arange(len(labels)), labels].mean() + l2 / 2 * np.sum(
        weights**2
    )


def test_the_linear_probe_minimises_what_it_says():
    """No small step in any direction lowers the loss, and none of its parts is off."""
    train, l2 = blobs(61), 0.03
    (fit,) = probes._fit(train.features, train.labels, (l2,), 1000)
    mean, std = train.features.mean(0), train.features.std(0)
    x = ((train.features - mean) / std).astype(np.float64)
    weights, bias = fit[-1].coef_, fit[-1].intercept_
    lowest = loss_of(x, train.labels, weights, bias, l2)
    rng = np.random.default_rng(0)
    for _ in range(20):
        step = 0.03 * rng.normal(size=weights.shape), 0.03 * rng.normal(size=bias.shape)
        moved = loss_of(x, train.labels, weights + step[0], bias + step[1], l2)
        assert moved > lowest
    # With another strength the minimum lies elsewhere.
    assert loss_of(x, train.labels, weights * 0.97, bias, 2 * l2) < loss_of(
        x, train.labels, weights, bias, 2 * l2
    )
    queries = blobs(29, seed=1).features
    expected = np.argmax((queries - mean) / std @ weights.T + bias, axis=1)
    probe = probes.linear_probe(train, queries, l2)
    np.testing.assert_array_equal(probe.predicted, expected)
    assert (probe.l2, probe.converged) == (l2, True)


def test_the_strength_is_chosen_on_examples_held_out():
    """Few examples and much noise: the loss on what was fitted would choose none."""
    train, test = blobs(60, noise=2.0), blobs(400, noise=2.0, seed=1)
    chosen = probes.linear_probe(train, test.features)
    assert chosen.l2 in probes.LOGISTIC_L2
    order = np.random.default_rng(0).permutation(60)
    held_out, rest = order[::5], [i for n, i in enumerate(order) if n % 5]
    assert len(rest) == 48
    mean, std = train.features[rest].mean(0), train.features[rest].std(0)
    scores = {}
    for l2 in probes.LOGISTIC_L2:  # each from a fresh start
        classifier = LogisticRegression(C=1 / (48 * l2), max_iter=1000)
        classifier.fit((train.features[rest] - mean) / std, train.labels[rest])
        held = (train.features[held_out] - mean) / std
        scores[l2] = classifier.score(held, train.labels[held_out])
    assert chosen.l2 == max(scores, key=scores.get)
    assert scores[chosen.l2] > min(scores.values())


def test_a_probe_that_does_not_converge_says_so():
    probe = probes.linear_probe(blobs(61), blobs(7).features, 1e-6, max_iter=2)
    assert not probe.converged


def test_a_single_class():
    train = Features(np.ones((6, D), np.float32), np.zeros(6, np.int32))
    for classify in (
        lambda: probes.linear_probe(train, train.features),
        lambda: probes.few_shot(train, train.features, 2, seed=0),
    ):
        with pytest.raises(UserError, match=r'examples of two classes$'):
            classify()


# --- Features -----------------------------------------------------------------


def make_run(**values):
    config = default_config()
    config.model.name = 'ViT-Ti/3'
    config.model.kwargs = {'width': 8, 'depth': 1, 'mlp_dim': 12, 'num_heads': 2}
    config.dataset.name = 'synthetic:size=6,channels=1,num_examples=37,num_classes=3'
    config.dataset.normalize = 'half'
    config.augment.crop = 'pad'  # which a probe must not do
    config.augment.flip = True
    config.batch_size = 16
    config.num_steps = 1
    config.update_from_flattened_dict(values)
    return build(config)


@pytest.fixture(scope='module')
def variables():
    shapes = make_run().state_shape.variables
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), shapes)


def features_by_hand(run, variables, split):
    """Example by example, through the parts of the model."""
    source = run.dataset.open(split)
    images = np.stack([source[i]['image'] for i in range(len(source))])
    model = run.model.clone(num_classes=None)
    pixels = np.float32(images / 255 * 2 - 1)
    labels = [source[i]['label'] for i in range(len(source))]
    return jax.jit(model.apply)(variables, pixels), labels


@pytest.mark.parametrize(
    ('mode', 'num_devices', 'split'),
    [('jit', 1, 'train'), ('jit', 8, 'test'), ('pmap', 8, 'train')],
)
def test_features_of_every_example_once_and_in_order(
    variables, mode, num_devices, split
):
    run = make_run()
    parallel = Parallel(mode, tuple(jax.devices()[:num_devices]))
    run = dataclasses.replace(run, parallel=parallel)
    data = run.probe_data() if split == 'train' else run.eval_data()
    features, labels = probes.extract_features(run, variables, data)
    expected, expected_labels = features_by_hand(run, variables, split)
    assert features.shape == (37, 8)
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert labels.tolist() == expected_labels


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_features_that_are_not_finite(variables, value):
    """Of images of class 1, by their first pixel: rows that only fill do not count."""
    run = make_run()

    class Net(nn.Module):
        num_classes: int | None = None

        def __call__(self, images, train):
            x = images.reshape(len(images), -1)[:, :3]
            return x.at[:, 2].set(jnp.where(x[:, 0] > 0.1, value, x[:, 2]))

    source = run.dataset.open('test')
    pixels = np.array([source[i]['image'][0, 0, 0] for i in range(37)])
    bad = np.count_nonzero(np.float32(pixels) / 255 * 2 - 1 > 0.1)
    assert 0 < bad < 37
    run = dataclasses.replace(run, model=Net(3))
    for split, name in (('test', 'test'), ('', 'given')):
        with pytest.raises(UserError) as caught:
            probes.extract_features(run, {}, run.eval_data(), *filter(None, [split]))
        assert str(caught.value) == (
            f'the features of {bad} of 37 {name} examples are not finite: the weights '
            'hold NaN, or are too large for config.dtype'
        )


def test_probe_data_is_the_part_that_is_trained_on():
    with closing(make_run(**{'dataset.train_fraction': 0.5}).probe_data()) as data:
        count = sum(batch['weight'].sum() for batch in data)
    assert 15 <= count <= 21


def test_a_model_without_a_classifier_to_leave_out():
    class Net:
        pass

    with pytest.raises(UserError, match=r'^Net has no field num_classes'):
        probes.headless(Net())
