"""How good an embedding is for search: Recall@K, mAP@R and NMI, none of which a lucky order of ties can raise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from foveal.blocks.kmeans import kmeans
from foveal.core.errors import DataError

CELLS = 1 << 23
"""Similarities held at once."""
DIGITS = 6
"""Similarities equal to so many decimals are equal: float32 does not tell them apart."""


@dataclass(frozen=True)
class Ranked:
    """What was measured, over the queries that have something to find.

    Attributes:
        recall: K -> share of queries with one of their kind among the first K.
        map_at_r: mean over queries of average precision over the first R, R being how many of their kind there are.
        queries: how many were counted.
        skipped: how many had nothing to find.
    """

    recall: dict[int, float]
    map_at_r: float
    queries: int
    skipped: int


def unit(X: np.ndarray) -> np.ndarray:
    """Rows [n, D] of length 1, float32; rows of zeros stay."""
    X = np.asarray(X, np.float32)
    return X / np.linalg.norm(X, axis=1, keepdims=True).clip(1e-12)


def retrieval(
    X: np.ndarray,
    labels: np.ndarray,
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    groups: np.ndarray | None = None,
    gallery: tuple[np.ndarray, np.ndarray] | None = None,
) -> Ranked:
    """Search for each row among the others, or in a gallery, by cosine similarity.

    Among equally similar ones those of another kind come first. Memory does not grow with n squared.

    Args:
        X: [n, D].
        labels: int64 [n].
        groups: int64 [n]; images of the query's own group (other shots of the same thing) are left out of the search.
        gallery: features [m, D] and labels [m] to search in place of X; groups are then not allowed.

    Raises:
        DataError: no query has anything to find.
    """
    if groups is not None and gallery is not None:
        raise DataError("groups tell queries from a gallery made of themselves: give groups or a gallery, not both")
    queries = unit(X)
    found, kinds = (queries, labels) if gallery is None else (unit(gallery[0]), np.asarray(gallery[1]))
    own = np.arange(len(X)) if groups is None else groups
    ranks: list[np.ndarray] = []
    precisions: list[np.ndarray] = []
    step = max(1, CELLS // max(1, len(found)))
    for start in range(0, len(queries), step):
        rows = np.arange(start, min(start + step, len(queries)))
        S = np.round(queries[rows] @ found.T, DIGITS)
        right = labels[rows][:, None] == kinds
        if gallery is None:
            hidden = own[rows][:, None] == own
            S[hidden] = -np.inf
            right &= ~hidden
        some = right.any(1)
        S, right = S[some], right[some]
        best = np.where(right, S, -np.inf).max(1, keepdims=True)
        ranks.append(((best <= S) & ~right & np.isfinite(S)).sum(1))
        precisions.append(average_precision(S, right))
    rank, precision = np.concatenate(ranks), np.concatenate(precisions)
    if not len(rank):
        raise DataError("no image has another of its kind to be found: labels that occur once cannot be measured")
    return Ranked(
        {int(k): float((rank < k).mean()) for k in ks}, float(precision.mean()), len(rank), len(X) - len(rank)
    )


def average_precision(S: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Average precision [b] over the first R of similarities [b, m], R [b] being how many are right."""
    order = np.lexsort((right, -S), axis=1)
    R = right.sum(1)
    most = int(R.max(initial=0))
    hits = np.take_along_axis(right, order[:, :most], 1) & (np.arange(most) < R[:, None])
    return (hits.cumsum(1) / np.arange(1, most + 1) * hits).sum(1) / R


def nmi(a: np.ndarray, b: np.ndarray) -> float:
    """Normalised mutual information of two labellings [n], by the mean of their entropies; 1 when both are constant."""
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1)
    joint /= len(a)
    rows, columns = joint.sum(1), joint.sum(0)
    there = joint > 0
    information = (joint[there] * np.log(joint[there] / np.outer(rows, columns)[there])).sum()
    entropy = -sum(float((p[p > 0] * np.log(p[p > 0])).sum()) for p in (rows, columns)) / 2
    return float(information / entropy) if entropy > 0 else 1.0


def cluster_nmi(X: np.ndarray, labels: np.ndarray, seed: int = 0) -> float:
    """NMI of the labels [n] and k-means clusters of the directions of X [n, D], as many as there are labels."""
    _, kinds = np.unique(labels, return_inverse=True)
    found = kmeans(torch.from_numpy(unit(X)), int(kinds.max()) + 1, seed, restarts=3)
    return nmi(kinds, found.numpy())
