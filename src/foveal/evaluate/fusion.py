"""Scores of several models, or of the parts of one label, made into one: on probabilities, whatever made them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveal.core.errors import DataError, UsageError

Array = NDArray[Any]

STEPS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
"""What a weight is multiplied by in a step of the search."""


def product_scores(parts: Sequence[Array], pairs: Array | None = None) -> Array:
    """Probabilities of a label of independent parts, such as verb and noun: p(v, n) = p(v) p(n).

    Args:
        parts: for each part its probabilities [n, V_i].
        pairs: which combinations there are [K, P], one index per part; None: all of them, the last part fastest.

    Returns:
        [n, K], float64, with rows that sum to 1.

    Raises:
        DataError: parts of different lengths, or a pair of more or other parts than there are.
    """
    scores = [np.asarray(part, np.float64) for part in parts]
    if len({len(part) for part in scores}) != 1:
        raise DataError(f"the parts have {', '.join(str(len(part)) for part in scores)} rows: expected equally many")
    if pairs is None:
        pairs = np.indices([part.shape[1] for part in scores]).reshape(len(scores), -1).T
    pairs = np.asarray(pairs, np.int64)
    if pairs.ndim != 2 or pairs.shape[1] != len(scores):
        raise DataError(f"pairs of shape {pairs.shape}: expected [K, {len(scores)}], one index for each part")
    for position, part in enumerate(scores):
        if pairs[:, position].min() < 0 or pairs[:, position].max() >= part.shape[1]:
            raise DataError(f"pairs name entry {pairs[:, position].max()} of part {position}, of {part.shape[1]}")
    joint = np.prod([part[:, pairs[:, position]] for position, part in enumerate(scores)], axis=0)
    total = joint.sum(1, keepdims=True)
    return np.where(total > 0, joint / np.where(total > 0, total, 1), 1 / len(pairs))


def pair_index(labels: Array, pairs: Array) -> Array:
    """Labels [n, P] -> the row of `pairs` [K, P] that each is, int64 [n].

    Raises:
        DataError: a label that is none of the pairs.
    """
    rows = {tuple(pair): row for row, pair in enumerate(np.asarray(pairs).tolist())}
    found = [rows.get(tuple(label), -1) for label in np.asarray(labels).tolist()]
    if -1 in found:
        unseen = np.asarray(labels)[found.index(-1)].tolist()
        raise DataError(
            f"label {unseen} is none of the {len(rows)} pairs, and {found.count(-1)} labels are like it: "
            "give all pairs, or leave these clips out"
        )
    return np.array(found, np.int64)


def fuse(
    members: Sequence[Array], weights: Sequence[float] | None = None, classes: Sequence[Sequence[str]] | None = None
) -> Array:
    """Weighted mean of the probabilities [n, C] of several models, float64.

    Args:
        weights: one per member, none negative; they need not sum to 1. None: all alike.
        classes: each member's names of its columns, to make sure that they are the same in the same order.

    Raises:
        DataError: members of different shapes, or whose classes differ or are in another order.
        UsageError: a negative weight, weights that are all zero, or not one for each member.
    """
    scores = [np.asarray(member, np.float64) for member in members]
    if not scores or len({member.shape for member in scores}) != 1:
        raise DataError(f"members of shapes {', '.join(str(m.shape) for m in scores) or 'none'}: expected equal ones")
    named = [list(names) for names in classes or ()]
    for number, names in enumerate(named):
        if names != named[0]:
            raise DataError(
                f"member {number} has classes {', '.join(names)}, member 0 {', '.join(named[0])}: "
                "expected the same in the same order"
            )
    w = np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64)
    if len(w) != len(scores):
        raise UsageError(f"{len(w)} weights for {len(scores)} members: expected one each")
    if not np.isfinite(w).all() or (w < 0).any() or not w.any():
        raise UsageError(f"weights {', '.join(f'{value:g}' for value in w)}: expected none negative and one above zero")
    return np.tensordot(w / w.sum(), np.stack(scores), 1)


def search_weights(members: Sequence[Array], labels: Array, rounds: int = 50) -> Array:
    """Weights [M], summing to 1, that lower the negative log-likelihood of the fused answers on held-out `labels`.

    From equal weights on, the best change of one weight by one of STEPS is made until none helps: the order of the
    members does not matter. Neither training nor test data may be given.

    Raises:
        DataError: no held-out data.
    """
    y = np.asarray(labels)
    if not len(y):
        raise DataError("no held-out clips to choose weights on: use equal weights")

    def loss(w: Array) -> float:
        return float(-np.log(np.maximum(fuse(members, w.tolist())[np.arange(len(y)), y], 1e-12)).mean())

    w = np.full(len(members), 1 / len(members))
    best = loss(w)
    for _ in range(rounds):
        tried: list[tuple[float, Array]] = []
        for member in range(len(w)):
            for step in STEPS:
                other = w.copy()
                other[member] *= step
                if other.sum() > 0:
                    tried.append((loss(other), other / other.sum()))
        lowest, chosen = min(tried, key=lambda each: each[0])
        if lowest >= best - 1e-9:
            break
        best, w = lowest, chosen
    return w
