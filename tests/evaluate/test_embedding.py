"""Recall@K, mAP@R and NMI by plain loops; ties, exclusions, galleries and chunks."""

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from foveal.core.errors import DataError
from foveal.evaluate import embedding
from foveal.evaluate.embedding import cluster_nmi, nmi, retrieval


def naive(X: np.ndarray, labels: np.ndarray, groups: np.ndarray, k: int) -> tuple[float, float, int]:
    """One query after another; equally similar ones of another kind come first."""
    X = X / np.linalg.norm(X, axis=1, keepdims=True)
    hits, precisions = [], []
    for i in range(len(X)):
        others = [j for j in range(len(X)) if groups[j] != groups[i]]
        R = sum(labels[j] == labels[i] for j in others)
        if not R:
            continue
        similar = {j: round(float(X[i].astype(np.float64) @ X[j]), 6) for j in others}
        order = sorted(others, key=lambda j: (-similar[j], labels[j] == labels[i]))
        hits.append(any(labels[j] == labels[i] for j in order[:k]))
        found, total = 0, 0.0
        for place, j in enumerate(order[:R], 1):
            if labels[j] == labels[i]:
                found += 1
                total += found / place
        precisions.append(total / R)
    return float(np.mean(hits)), float(np.mean(precisions)), len(hits)


def drawn(seed: int, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Features of few values, so that many are equally similar."""
    rng = np.random.default_rng(seed)
    X = rng.integers(-1, 2, (n, 3)).astype(np.float32)
    X[np.abs(X).sum(1) == 0] = 1
    return X, rng.integers(0, 6, n)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("groups", [1, 3])
def test_by_a_loop(seed: int, groups: int, monkeypatch: pytest.MonkeyPatch):
    X, labels = drawn(seed)
    if seed % 2:
        X = X + np.random.default_rng(seed).normal(0, 0.1, X.shape).astype(np.float32)
    own = np.arange(40) // groups
    monkeypatch.setattr(embedding, "CELLS", 200)
    found = retrieval(X, labels, (1, 3), groups=own)
    for k in (1, 3):
        recall, precision, queries = naive(X, labels, own, k)
        assert found.recall[k] == pytest.approx(recall)
        assert found.map_at_r == pytest.approx(precision, abs=1e-6)
        assert (found.queries, found.skipped) == (queries, 40 - queries)


def test_equal_vectors_find_nothing():
    found = retrieval(np.ones((6, 2)), np.array([0, 0, 1, 1, 2, 2]))
    assert found.recall[1] == 0
    assert found.map_at_r == 0


def test_a_gallery():
    X, labels = drawn(0)
    found = retrieval(X[:10], labels[:10], gallery=(np.concatenate([X[:10], X]), np.concatenate([labels[:10], labels])))
    assert found.queries == 10
    sure = retrieval(np.eye(3), np.arange(3), gallery=(np.eye(3), np.arange(3)))
    assert (sure.recall[1], sure.map_at_r) == (1, 1)
    with pytest.raises(DataError, match="groups or a gallery, not both"):
        retrieval(X, labels, groups=labels, gallery=(X, labels))


def test_nothing_to_find():
    with pytest.raises(DataError, match="labels that occur once cannot be measured"):
        retrieval(np.eye(4), np.arange(4))


def test_nmi_is_scikit_learns():
    rng = np.random.default_rng(0)
    for _ in range(5):
        a, b = rng.integers(0, 5, 60), rng.integers(0, 4, 60)
        assert nmi(a, b) == pytest.approx(normalized_mutual_info_score(a, b))
    assert nmi(np.zeros(5, int), np.zeros(5, int)) == 1
    kinds = np.arange(60) % 4
    assert cluster_nmi(np.eye(4)[kinds] + rng.normal(0, 0.01, (60, 4)), kinds + 3) == pytest.approx(1)
