"""How far apart two sets of features are: the Frechet distance of their Gaussians.

"GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
arXiv 1706.08500, section 4: the FID where the features are Inception's. With others
the numbers mean nothing beside published ones.
"""

from typing import NamedTuple

import numpy as np

from vit_jax.errors import UserError


class Moments(NamedTuple):
    """Of features, in float64.

    Attributes:
      mean: `[D]`.
      cov: `[D, D]`, over n - 1.
    """

    mean: np.ndarray
    cov: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Mean and covariance of features `[N, D]`.

    Raises:
      UserError: for fewer than two examples.

    >>> moments(np.array([[0.0, 1.0], [2.0, 1.0]])).cov.tolist()
    [[2.0, 0.0], [0.0, 0.0]]
    """
    if len(features) < 2:
        raise UserError(f'a covariance needs two examples, not {len(features)}')
    features = features.astype(np.float64)
    cov = np.cov(features, rowvar=False)
    return Moments(features.mean(axis=0), np.atleast_2d(cov))


def frechet_distance(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray
) -> float:
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)).

    The squared Frechet, or 2-Wasserstein, distance of two Gaussians (D. C. Dowson and
    B. V. Landau, Journal of Multivariate Analysis 12, 1982). The trace of the root is
    that of (A cov2 A)^(1/2) with A = cov1^(1/2), whose eigenvalues are real and not
    negative, also where a covariance has no inverse.

    Args:
      mean1, mean2: `[D]`.
      cov1, cov2: `[D, D]`, symmetric and positive semi-definite.

    >>> frechet_distance(np.zeros(2), np.eye(2), np.ones(2), 4 * np.eye(2))
    4.0
    """
    mean1, cov1, mean2, cov2 = (
        np.asarray(x, np.float64) for x in (mean1, cov1, mean2, cov2)
    )
    values, vectors = np.linalg.eigh(cov1)
    root = vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
    squares = np.linalg.eigvalsh(root @ cov2 @ root)
    overlap = np.sum(np.sqrt(np.maximum(squares, 0.0)))
    distance = np.sum((mean1 - mean2) ** 2)
    return float(distance + np.trace(cov1) + np.trace(cov2) - 2.0 * overlap)
