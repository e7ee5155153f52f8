"""Whether a backbone learnt anything: what its features say of labels it never saw, and whether they have collapsed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CHUNK = 1024


def neighbour_accuracy(X: NDArray[np.floating], y: NDArray[np.integer], k: int = 10) -> float:
    """Balanced accuracy, 0..1, of a vote of each image's k nearest others, weighted by their similarity.

    Args:
        X: features [n, D]; similarity is the cosine of what is left when their mean is taken off.
        y: labels [n].
    """
    unit = centred(X)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True).clip(1e-12)
    names, labels = np.unique(y, return_inverse=True)
    k = min(k, len(X) - 1)
    right = np.zeros(len(X), bool)
    for start in range(0, len(X), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(X)))
        similar = unit[rows] @ unit.T
        similar[np.arange(len(rows)), rows] = -np.inf
        nearest = np.argpartition(-similar, k - 1, axis=1)[:, :k]
        weights = np.take_along_axis(similar, nearest, 1) + 1
        votes = np.zeros((len(rows), len(names)))
        np.add.at(votes, (np.arange(len(rows))[:, None], labels[nearest]), weights)
        right[rows] = votes.argmax(1) == labels[rows]
    return float(np.mean([right[labels == each].mean() for each in range(len(names))]))


def effective_rank(X: NDArray[np.floating]) -> float:
    """In how many directions features [n, D] vary: exp of the entropy of the shares of their singular values.

    1 means that they have collapsed into a line, min(n - 1, D) that all directions are used alike (RankMe, Garrido et
    al. 2023, of centred features).
    """
    values = np.linalg.svd(centred(X), compute_uv=False)
    share = values / max(float(values.sum()), 1e-12)
    share = share[share > 1e-12]
    return float(np.exp(-(share * np.log(share)).sum()))


def centred(X: NDArray[np.floating]) -> NDArray[np.float64]:
    X = np.asarray(X, np.float64)
    return X - X.mean(0)
