"""Retrieval between images and texts: Recall@K and median rank, which no order of ties can raise.

What is equally similar is taken in random order, and the mean over all such orders is what is reported: a model that
finds everything alike scores what chance does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foveal.core.errors import DataError
from foveal.evaluate.metrics import interval, multiplicities

KS = (1, 5, 10)
Array = np.ndarray


def best_ranks(similarity: Array, relevant: Array, excluded: Array | None = None, ks: Sequence[int] = KS) -> Array:
    """Of each query: the rank of the first relevant candidate, and the chance that it is among the first K.

    Args:
        similarity: [n, m], queries by candidates.
        relevant: bool [n, m].
        excluded: bool [n, m], candidates that a query is not asked about (itself, say); they take no rank.

    Returns:
        float64 [n, 1 + len(ks)]; NaN for queries that have nothing to find. With g candidates above the best relevant
        one, and t as similar as it, r of them relevant, the expected rank is g + (t + 1) / (r + 1), and the chance for
        K is 1 - C(t - r, K - g) / C(t, K - g).

    Raises:
        DataError: shapes that do not fit, or similarities that are no numbers.
    """
    if relevant.shape != similarity.shape or (excluded is not None and excluded.shape != similarity.shape):
        raise DataError(f"similarities {similarity.shape} and relevance {relevant.shape}: expected one shape")
    if not np.isfinite(similarity).all():
        raise DataError("a similarity is not a finite number: the embeddings hold NaN")
    allowed = np.ones_like(relevant) if excluded is None else ~excluded
    wanted = relevant & allowed
    found = np.full((len(similarity), 1 + len(ks)), np.nan)
    some = np.flatnonzero(wanted.any(1))
    scores = np.where(allowed, similarity.astype(np.float64), -np.inf)
    best = np.where(wanted, scores, -np.inf).max(1)
    above = (scores > best[:, None]).sum(1)
    tied = (scores == best[:, None]) & allowed
    t, r = tied.sum(1), (tied & wanted).sum(1)
    found[some, 0] = above[some] + (t[some] + 1) / (r[some] + 1)
    for column, k in enumerate(ks, 1):
        left = np.clip(k - above, 0, t)
        missed = np.ones(len(similarity))
        for drawn in range(int(left.max(initial=0))):
            inside = drawn < left
            missed = np.where(inside, missed * np.clip(t - r - drawn, 0, None) / np.maximum(t - drawn, 1), missed)
        found[some, column] = 1 - missed[some]
    return found


def retrieval(
    similarity: Array,
    relevant: Array,
    *,
    excluded: Array | None = None,
    ks: Sequence[int] = KS,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Recall@K and median rank of one direction, with 95% bootstrap intervals over queries.

    Returns:
        n (queries with something to find), candidates, r_at_K and median_rank as {value, low, high}, chance of R@1.

    Raises:
        DataError: no query has anything to find; see also `best_ranks`.
    """
    found = best_ranks(similarity, relevant, excluded, ks)
    kept = ~np.isnan(found[:, 0])
    if not kept.any():
        raise DataError("no query has anything to find: expected a relevant candidate for at least one")
    rows = found[kept]
    allowed = np.ones_like(relevant) if excluded is None else ~excluded
    share = (relevant & allowed).sum(1)[kept] / allowed.sum(1)[kept]
    values: dict[str, Any] = {"n": len(rows), "candidates": similarity.shape[1], "chance": float(share.mean())}
    samples: list[Array] = []
    for weights in multiplicities(len(rows), resamples, 0) if resamples else ():
        samples.append(np.concatenate([rows[:, 1:].T @ weights / len(rows), medians(rows[:, 0], weights)[None]]))
    edges = interval(np.concatenate(samples, axis=1)) if samples else None
    for column, name in enumerate([*(f"r_at_{k}" for k in ks), "median_rank"]):
        value = float(np.median(rows[:, 0])) if name == "median_rank" else float(rows[:, 1 + column].mean())
        low, high = (None, None) if edges is None else (float(edge[column]) for edge in edges)
        values[name] = {"value": value, "low": low, "high": high}
    return values


def medians(ranks: Array, weights: Array) -> Array:
    """Median of ranks [n], each taken weights [n, R] times: [R]."""
    order = np.argsort(ranks)
    reached = weights[order].cumsum(0)
    return ranks[order[(reached >= reached[-1] / 2).argmax(0)]]


def same_text(own: Sequence[Sequence[str]], texts: Sequence[str]) -> Array:
    """Which of `texts` are among an image's own: bool [images, texts]."""
    place: dict[str, list[int]] = {}
    for column, text in enumerate(texts):
        place.setdefault(text, []).append(column)
    relevant = np.zeros((len(own), len(texts)), bool)
    for row, mine in enumerate(own):
        for text in mine:
            relevant[row, place.get(text, [])] = True
    return relevant


def both_ways(similarity: Array, relevant: Array, *, resamples: int = 1000) -> Mapping[str, Any]:
    """`retrieval` of texts for images [n, m], and of images for texts."""
    return {
        "image_to_text": retrieval(similarity, relevant, resamples=resamples),
        "text_to_image": retrieval(similarity.T, relevant.T, resamples=resamples),
    }
