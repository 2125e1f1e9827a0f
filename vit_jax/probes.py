"""What the features of a model are worth: k-NN, few-shot and linear probes.

The model is frozen and its classifier left out; each example is computed once, without
augmentation, and all that follows is classical. `extract_features` does the former, and
`knn`, `few_shot` and `linear_probe` the latter, as functions of arrays.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple
from warnings import catch_warnings, simplefilter

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.build import Run
from vit_jax.data.watch import Watch
from vit_jax.errors import UserError
from vit_jax.features import (
    check_features,
    collect_rows,
    compile_rows,
    headless,
    image_features,
)
from vit_jax.typing import Array, Batch, Variables

# Similarities that are held at once, of some queries with all training examples.
MAX_SIMILARITIES = 2**25
# Strengths that `few_shot` and `linear_probe` choose from, strong to weak.
RIDGE_L2 = tuple(4.0**i for i in range(8, -8, -1))
LOGISTIC_L2 = tuple(10.0**i for i in range(1, -7, -1))
HELD_OUT = 5  # every so many training examples, one on which `l2` is chosen


class Features(NamedTuple):
    """Features of a split, in its order.

    Attributes:
      features: `[N, D]` float32.
      labels: `[N]` int32.
    """

    features: np.ndarray
    labels: np.ndarray


def extract_features(
    run: Run, variables: Variables, data: Watch, split: str = ''
) -> Features:
    """The features of every example, computed on all devices of the run.

    Args:
      run: of which the model, the normalisation and the devices count.
      variables: of its model; those of the classifier are not used.
      data: host batches, `run.probe_data()` or `run.eval_data()`; closed at the end.
      split: their name, for errors.

    Raises:
      UserError: for a model whose features are not one vector for an image, and for
        features that are not finite.
    """
    seen = run.metadata['preprocessing']
    model = headless(run.model)

    def step(variables: Variables, batch: Batch) -> tuple[Array, ...]:
        features = image_features(
            variables, batch['image'], model, tuple(seen['mean']), tuple(seen['std'])
        )
        return features, batch['label'], batch['weight']

    with closing(data):
        program = compile_rows(step, run.parallel)
        features, labels, weights = collect_rows(program, variables, data, run.parallel)
    real = weights > 0  # others only fill the last batch
    features, labels = features[real], labels[real]
    check_features(run.model, features, split or 'given')
    return Features(features, labels)


# --- Nearest neighbours -----------------------------------------------------------


def knn(
    train: Features, features: np.ndarray, k: int = 20, temperature: float = 0.07
) -> np.ndarray:
    """The class that the most similar training examples vote for.

    "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
    arXiv 1805.01978, section 3.4, with the k = 20 and temperature of DINO,
    arXiv 2104.14294: each of the k neighbours votes for its class with
    exp(cosine similarity / temperature).

    Args:
      train: neighbours and their classes.
      features: `[M, D]`, of the queries.
      k: how many vote. Of equally similar ones, the first in the split do.
      temperature: small ones let the nearest decide.

    Returns:
      `[M]` int32; of classes with equally many votes, that of the lowest number.

    Raises:
      UserError: for more neighbours than there are.

    >>> train = Features(np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), np.arange(3))
    >>> knn(train, np.array([[2.0, 0.1], [0.1, 2.0]]), k=1)
    array([0, 2], dtype=int32)
    """
    if k > len(train.labels):
        raise UserError(
            f'k={k} neighbours are more than the {len(train.labels)} training examples'
        )
    neighbours, labels = _unit(jnp.asarray(train.features)), jnp.asarray(train.labels)
    num_classes = int(train.labels.max()) + 1
    rows = max(1, MAX_SIMILARITIES // len(train.labels))
    votes = partial(_vote, k=k, num_classes=num_classes)
    chunks = [
        votes(neighbours, labels, jnp.asarray(features[i : i + rows]), temperature)
        for i in range(0, len(features), rows)
    ]
    return np.concatenate(jax.device_get(chunks))


def _unit(x: Array) -> Array:
    """Rows of length 1; zeros stay zeros."""
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.maximum(norm, jnp.finfo(x.dtype).tiny)


@partial(jax.jit, static_argnames=('k', 'num_classes'))
def _vote(
    neighbours: Array,
    labels: Array,
    queries: Array,
    temperature: Array | float,
    k: int,
    num_classes: int,
) -> Array:
    similarity = jnp.matmul(_unit(queries), neighbours.T, precision='highest')
    nearest, rows = jax.lax.top_k(similarity, k)  # of equal ones the first
    # Relative to the nearest, which changes no winner: exp cannot overflow.
    votes = jnp.exp((nearest - nearest[:, :1]) / temperature)
    count = len(queries)
    totals = jnp.zeros((count, num_classes), votes.dtype)
    totals = totals.at[jnp.arange(count)[:, None], labels[rows]].add(votes)
    return jnp.argmax(totals, axis=-1).astype(jnp.int32)


# --- Linear classifiers -----------------------------------------------------------


def few_shot(
    train: Features, features: np.ndarray, shots: int, seed: int
) -> np.ndarray:
    """Classes by least squares from a few examples of each.

    "An Image is Worth 16x16 Words", arXiv 2010.11929, section 4.1: ridge regression,
    in closed form, from features to {-1, 1} for each class. Features are standardised
    by these examples, the intercept is free, and the strength of the penalty is that of
    `RIDGE_L2` with the smallest squared error where each example is left out once:
    nothing but the examples has a say in it.

    Args:
      train: to choose the examples from.
      features: `[M, D]`, to be classified.
      shots: examples of each class.
      seed: of their choice.

    Returns:
      `[M]` class numbers.

    Raises:
      UserError: for a class that has fewer, and for a single class.
    """
    from sklearn.linear_model import RidgeClassifierCV  # takes a second
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    chosen = choose_shots(train.labels, shots, seed)
    _check_classes(train.labels[chosen])
    classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(RIDGE_L2))
    examples = train.features[chosen].astype(np.float64)
    classifier.fit(examples, train.labels[chosen])
    return classifier.predict(features.astype(np.float64))


def choose_shots(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Numbers of as many examples of each class, at random.

    Args:
      labels: `[N]`.
      shots: of each class.
      seed: of the choice.

    Raises:
      UserError: for a class that has fewer.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < shots:
            raise UserError(
                f'class {label} has {len(members)} training examples, fewer than the '
                f'{shots} shots asked for'
            )
        chosen.append(rng.choice(members, shots, replace=False))
    return np.concatenate(chosen)


class LinearProbe(NamedTuple):
    """A logistic regression on features.

    Attributes:
      predicted: `[M]` class numbers.
      l2: strength of its penalty.
      converged: whether the optimizer came to its end.
    """

    predicted: np.ndarray
    l2: float
    converged: bool


def linear_probe(
    train: Features,
    features: np.ndarray,
    l2: float | None = None,
    seed: int = 0,
    max_iter: int = 1000,
) -> LinearProbe:
    """Classes by logistic regression, fitted by L-BFGS.

    Features are standardised. The loss is the mean cross entropy and half of `l2` times
    the squared norm of the weights, so that `l2` means the same for any number of
    examples.

    Args:
      train: to fit.
      features: `[M, D]`, to be classified.
      l2: None for the one of `LOGISTIC_L2` that is best on every fifth training
        example, when it is fitted to the others; the strongest of those that are
        equally good. It is then fitted to all.
      seed: of which examples these are.
      max_iter: steps of L-BFGS, after which it ends in any case.

    Raises:
      UserError: for too few examples, or a single class.
    """
    if l2 is None:
        order = np.random.default_rng(seed).permutation(len(train.labels))
        held_out, rest = order[::HELD_OUT], np.delete(order, np.s_[::HELD_OUT])
        fits = _fit(train.features[rest], train.labels[rest], LOGISTIC_L2, max_iter)
        unseen = train.features[held_out], train.labels[held_out]
        l2 = LOGISTIC_L2[int(np.argmax([fit.score(*unseen) for fit in fits]))]
    (fit,) = _fit(train.features, train.labels, (l2,), max_iter)
    converged = int(fit[-1].n_iter_.max()) < max_iter
    return LinearProbe(fit.predict(features), l2, converged)


def _fit(
    features: np.ndarray, labels: np.ndarray, strengths: Sequence[float], max_iter: int
) -> Iterator[Any]:
    """A classifier for each strength; it is the last one, gone on from."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression  # takes a second
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    _check_classes(labels)
    scaler = StandardScaler().fit(features)
    x = scaler.transform(features).astype(np.float64)
    classifier = LogisticRegression(max_iter=max_iter, warm_start=True)
    for l2 in strengths:
        classifier.set_params(C=1.0 / (l2 * len(labels)))
        with catch_warnings():
            simplefilter('ignore', ConvergenceWarning)  # the caller tells of it
            classifier.fit(x, labels)
        yield make_pipeline(scaler, classifier)


def _check_classes(labels: np.ndarray) -> None:
    if len(np.unique(labels)) < 2:
        raise UserError('a linear classifier needs training examples of two classes')
