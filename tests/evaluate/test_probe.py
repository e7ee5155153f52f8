"""The probes of pretraining, against a count by hand and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from foveal.evaluate import probe
from foveal.evaluate.probe import effective_rank, neighbour_accuracy


def blobs(apart: float, n: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    return rng.normal(size=(n, 8)) + apart * np.eye(8)[y], y


@pytest.mark.parametrize("apart", [0.0, 1.0, 4.0])
def test_neighbours_vote_as_scikit_learn_s_do(apart: float, monkeypatch: pytest.MonkeyPatch):
    X, y = blobs(apart)
    X_unit = X - X.mean(0)
    X_unit /= np.linalg.norm(X_unit, axis=1, keepdims=True)
    answers = []
    for row in range(len(X)):
        others = np.arange(len(X)) != row
        knn = KNeighborsClassifier(5, metric="cosine", weights=lambda distance: 2 - distance)
        answers.append(knn.fit(X_unit[others], y[others]).predict(X_unit[[row]])[0])
    expected = balanced_accuracy_score(y, answers)
    assert neighbour_accuracy(X, y, k=5) == pytest.approx(expected)
    monkeypatch.setattr(probe, "CHUNK", 7)
    assert neighbour_accuracy(X, y, k=5) == pytest.approx(expected)


def test_neighbours_tell_what_is_apart_and_guess_what_is_not():
    assert neighbour_accuracy(*blobs(8.0)) == 1.0
    assert neighbour_accuracy(*blobs(0.0)) < 0.5


def test_a_rare_class_counts_as_much_as_the_others():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(100, 4))
    y = np.array([0] * 95 + [1] * 5)
    assert neighbour_accuracy(X, y) == pytest.approx(0.5)  # all answers 0: right on 95, wrong on 5


def test_the_rank_of_a_line_a_ball_and_nothing():
    rng = np.random.default_rng(0)
    line = rng.normal(size=(500, 1)) * rng.normal(size=(1, 6)) + 3
    assert effective_rank(line) == pytest.approx(1, abs=1e-6)
    assert effective_rank(rng.normal(size=(5000, 6))) == pytest.approx(6, abs=0.05)
    assert effective_rank(np.ones((10, 6))) == 1.0


def test_the_rank_does_not_depend_on_scale_or_place():
    X = np.random.default_rng(1).normal(size=(50, 5)) * [1, 2, 3, 4, 5]
    assert effective_rank(100 * X + 7) == pytest.approx(effective_rank(X))
