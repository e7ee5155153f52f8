"""Ranks and Recall@K against enumeration of every order that ties allow."""

import itertools

import numpy as np
import pytest

from foveal.core.errors import DataError
from foveal.evaluate.pairs import best_ranks, both_ways, retrieval, same_text


def enumerated(scores: np.ndarray, relevant: np.ndarray, k: int) -> tuple[float, float]:
    """Mean over all orders of equal scores of the first relevant rank, and of whether it is within k."""
    ranks: list[int] = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            ranks.append(1 + min(order.index(column) for column in np.flatnonzero(relevant)))
    return float(np.mean(ranks)), float(np.mean([rank <= k for rank in ranks]))


def test_ties_count_as_every_order_of_them():
    rng = np.random.default_rng(0)
    similarity = rng.integers(0, 3, (12, 6)).astype(np.float32)
    relevant = rng.random((12, 6)) < 0.35
    relevant[:, 0] |= ~relevant.any(1)
    found = best_ranks(similarity, relevant, ks=(1, 2, 3))
    for row in range(12):
        for column, k in enumerate((1, 2, 3), 1):
            rank, within = enumerated(similarity[row], relevant[row], k)
            assert found[row, 0] == pytest.approx(rank)
            assert found[row, column] == pytest.approx(within)


def test_finding_everything_alike_is_chance():
    relevant = np.eye(20, dtype=bool)
    found = retrieval(np.zeros((20, 20)), relevant, resamples=0)
    assert found["r_at_1"]["value"] == pytest.approx(1 / 20) == found["chance"]
    assert found["r_at_10"]["value"] == pytest.approx(0.5)
    assert found["median_rank"]["value"] == pytest.approx(10.5)


def test_excluded_candidates_take_no_rank():
    similarity = np.array([[1.0, 0.5, 0.2], [0.3, 1.0, 0.4]])
    relevant = np.array([[False, True, False], [True, False, False]])
    itself = np.array([[True, False, False], [False, True, False]])
    assert best_ranks(similarity, relevant, ks=(1,)).tolist() == [[2, 0], [3, 0]]
    assert best_ranks(similarity, relevant, itself, ks=(1,)).tolist() == [[1, 1], [2, 0]]


def test_queries_with_nothing_to_find_are_not_counted():
    similarity, relevant = np.eye(3), np.array([[1, 0, 0], [0, 0, 0], [0, 0, 1]], bool)
    found = retrieval(similarity, relevant, resamples=50)
    assert found["n"] == 2
    assert found["r_at_1"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["median_rank"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    with pytest.raises(DataError, match="no query has anything to find"):
        retrieval(similarity, np.zeros((3, 3), bool))


def test_both_directions_and_equal_texts():
    relevant = same_text([("a", "b"), ("a",), ("c",)], ["a", "b", "c"])
    assert relevant.tolist() == [[True, True, False], [True, False, False], [False, False, True]]
    similarity = np.array([[0.9, 0.8, 0.1], [0.2, 0.3, 0.1], [0.1, 0.1, 0.9]])
    found = both_ways(similarity, relevant, resamples=0)
    assert found["image_to_text"]["r_at_1"]["value"] == pytest.approx(2 / 3)
    assert found["text_to_image"]["r_at_1"]["value"] == 1.0


def test_wrong_shapes_and_numbers():
    with pytest.raises(DataError, match="expected one shape"):
        best_ranks(np.zeros((2, 3)), np.zeros((3, 2), bool))
    with pytest.raises(DataError, match="not a finite number"):
        best_ranks(np.full((2, 2), np.nan), np.eye(2, dtype=bool))
