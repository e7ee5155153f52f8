"""k-means (Lloyd 1982) with k-means++ seeds (Arthur and Vassilvitskii 2007)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ROWS = 1 << 24
"""Distances held at once."""


def nearest(X: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the nearest centre [k, D] of each row [n, D], and the squared distance to it."""
    half = centres.square().sum(1) / 2
    number, score = [], []
    for part in X.split(max(1, ROWS // len(centres))):
        best = (part @ centres.T - half).max(1)
        number.append(best.indices)
        score.append(best.values)
    return torch.cat(number), (X.square().sum(1) - 2 * torch.cat(score)).clamp_min(0)


def plus_plus(X: Tensor, k: int, rng: np.random.Generator) -> Tensor:
    """k rows of X, each drawn with a chance in proportion to its squared distance to those before it."""
    chosen = [int(rng.integers(len(X)))]
    far = (X - X[chosen[0]]).square().sum(1)
    for _ in range(k - 1):
        share = far.double().cumsum(0)
        drawn = int(torch.searchsorted(share, float(rng.random()) * float(share[-1]), right=True))
        chosen.append(min(drawn, len(X) - 1))
        far = torch.minimum(far, (X - X[chosen[-1]]).square().sum(1))
    return X[chosen]


def lloyd(X: Tensor, centres: Tensor, most: int = 100) -> tuple[Tensor, float]:
    """Labels [n] after alternating until they stay the same (or `most` times), and the sum of squared distances.

    A centre that loses all its rows moves to the row farthest from its own.
    """
    labels, apart = nearest(X, centres)
    for _ in range(most):
        centres = means(X, labels, len(centres), apart)
        new, apart = nearest(X, centres)
        if torch.equal(new, labels):
            break
        labels = new
    return labels, float(apart.sum())


def means(X: Tensor, labels: Tensor, k: int, apart: Tensor) -> Tensor:
    """Mean row of each label [k, D]; of a label without rows, the rows with the largest `apart` [n]."""
    total = torch.zeros(k, X.shape[1], dtype=X.dtype).index_add_(0, labels, X)
    count = torch.bincount(labels, minlength=k)
    empty = torch.nonzero(count == 0)[:, 0]
    total[empty] = X[apart.topk(len(empty)).indices]
    return total / count.clamp_min(1)[:, None]


def kmeans(X: Tensor, k: int, seed: int, *, labels: Tensor | None = None, restarts: int = 10) -> Tensor:
    """Labels 0..k-1 of the rows of X [n, D], int64 [n].

    Args:
        labels: of an earlier clustering: one run from its means, which keeps the labels' meaning. Without, the best of
            `restarts` runs from k-means++ seeds.
    """
    X = X.float()
    if labels is not None:
        return lloyd(X, means(X, labels, k, torch.zeros(len(X))))[0]
    rng = np.random.default_rng(seed)
    return min((lloyd(X, plus_plus(X, k, rng)) for _ in range(restarts)), key=lambda found: found[1])[0]
