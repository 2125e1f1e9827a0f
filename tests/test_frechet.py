"""The Frechet distance of Gaussians, against closed forms and SciPy's matrix root."""

import numpy as np
import pytest
import scipy.linalg

from vit_jax.errors import UserError
from vit_jax.frechet import frechet_distance, moments

D = 5


def random_gaussian(seed, rank=D):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(D, rank))
    return rng.normal(size=D), x @ x.T


def test_of_numbers():
    """(1 - 4)^2 + (3 - 2)^2, of deviations 3 and 2."""
    found = frechet_distance([1.0], [[9.0]], [4.0], [[4.0]])
    assert found == pytest.approx(10.0)


def test_of_covariances_that_commute():
    """In any basis: the sum of the squared differences of deviations."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(D, D)))
    deviations = rng.uniform(0.1, 3.0, (2, D))
    mean1, mean2 = rng.normal(size=(2, D))
    cov1, cov2 = (basis @ np.diag(s**2) @ basis.T for s in deviations)
    expected = ((mean1 - mean2) ** 2).sum() + (
        (deviations[0] - deviations[1]) ** 2
    ).sum()
    found = frechet_distance(mean1, cov1, mean2, cov2)
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize('rank', [D, 2])
def test_of_any_covariances(rank):
    """Also where they have no inverse, as of fewer images than features."""
    (mean1, cov1), (mean2, cov2) = random_gaussian(1, rank), random_gaussian(2)
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)
    found = frechet_distance(mean1, cov1, mean2, cov2)
    assert found == pytest.approx(expected, rel=1e-6)
    turned = frechet_distance(mean2, cov2, mean1, cov1)
    assert turned == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize('rank', [D, 2])
def test_nothing_is_away_from_itself(rank):
    mean, cov = random_gaussian(3, rank)
    assert abs(frechet_distance(mean, cov, mean, cov)) < 1e-6 * np.trace(cov)


def test_a_shift_counts_squared():
    mean, cov = random_gaussian(4)
    assert frechet_distance(mean, cov, mean + 2.0, cov) == pytest.approx(4.0 * D)


def test_moments_by_loops():
    x = np.random.default_rng(5).normal(2.0, 3.0, (7, 3)).astype(np.float32)
    mean = sum(row.astype(np.float64) for row in x) / 7
    cov = sum(np.outer(row - mean, row - mean) for row in x) / 6
    found = moments(x)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(found.cov, cov, rtol=1e-10)
    assert moments(x[:, :1]).cov.shape == (1, 1)


def test_one_example_has_no_covariance():
    with pytest.raises(UserError, match='needs two examples, not 1'):
        moments(np.zeros((1, 3)))
