"""Unknown scores against scikit-learn and refitting; the choice between them; thresholds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf

from foveal.core.errors import BundleError, DataError
from foveal.evaluate import ood
from foveal.evaluate.metrics import auroc
from foveal.evaluate.ood import Energy, JointEnergy, Mahalanobis, choose_ood, empty_score, histogram, threshold_at

D = 12


def features(n: int, C: int = 3, seed: int = 0):
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(D, D))
    y = rng.integers(0, C, n)
    centres = np.random.default_rng(98).normal(size=(C, D)) * 4
    return (rng.normal(size=(n, D)) @ mix + centres[y]).astype(np.float32), y


def naive_score(X: np.ndarray, y: np.ndarray, Z: np.ndarray, share: float | None = None) -> np.ndarray:
    """From the definition, in float64, with scikit-learn's shrinkage (or a given one)."""
    X, Z = X.astype(np.float64), Z.astype(np.float64)
    present = np.unique(y)
    means = np.stack([X[y == c].mean(0) for c in present])
    R = X - means[np.searchsorted(present, y)]
    if share is None:
        covariance, _ = ledoit_wolf(R, assume_centered=True)
    else:
        S = R.T @ R / len(X)
        covariance = (1 - share) * S + share * np.trace(S) / D * np.eye(D)
    inverse = np.linalg.inv(covariance)
    V = Z[:, None] - means
    return np.einsum("ncd,de,nce->nc", V, inverse, V).min(1) / D


def score(module: torch.nn.Module, X: np.ndarray, logits: np.ndarray | None = None) -> np.ndarray:
    z = torch.zeros(len(X), 2) if logits is None else torch.from_numpy(logits)
    return module(torch.from_numpy(X), z).numpy()


def test_mahalanobis_equals_the_definition_with_scikit_learns_shrinkage(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ood, "ROWS", 50)
    X, y = features(180)
    Z, _ = features(40, seed=1)
    np.testing.assert_allclose(score(Mahalanobis.fit(X, y), Z * 3), naive_score(X, y, Z * 3), rtol=1e-4)


def test_known_images_score_about_one():
    X, y = features(2000)
    Z, _ = features(500, seed=1)
    assert score(Mahalanobis.fit(X, y), Z).mean() == pytest.approx(1, abs=0.1)


def test_fit_does_not_depend_on_slices(monkeypatch: pytest.MonkeyPatch):
    X, y = features(130)
    whole = Mahalanobis.fit(X, y)
    monkeypatch.setattr(ood, "ROWS", 7)
    for name, value in Mahalanobis.fit(X, y).state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_far_from_the_origin_nothing_is_lost():
    X, y = features(200)
    np.testing.assert_allclose(
        score(Mahalanobis.fit(X + 1000, y), X + 1000), score(Mahalanobis.fit(X, y), X), rtol=0.02
    )


def test_leave_one_out_scores_equal_refitting_without_the_row():
    X, y = features(90)
    _, scores = Mahalanobis.fit_and_score(X, y)
    share = ledoit_wolf(X - np.stack([X[y == c].mean(0) for c in range(3)])[y], assume_centered=True)[1]
    rows = range(0, 90, 9)
    expected = []
    for row in rows:
        kept = np.arange(90) != row
        # The whole fit's shrinkage target stays; its scatter is divided by n, so scale the smaller one alike.
        R = X[kept] - np.stack([X[kept & (y == c)].mean(0) for c in range(3)])[y[kept]]
        full = X - np.stack([X[y == c].mean(0) for c in range(3)])[y]
        S = R.astype(np.float64).T @ R / 90
        target = np.trace(full.astype(np.float64).T @ full / 90) / D
        inverse = np.linalg.inv((1 - share) * S + share * target * np.eye(D))
        V = X[row] - np.stack([X[kept & (y == c)].mean(0) for c in range(3)])
        expected.append(np.einsum("cd,de,ce->c", V, inverse, V).min() / D)
    np.testing.assert_allclose(scores[list(rows)], expected, rtol=1e-3)


def test_leave_one_out_scores_are_like_those_of_new_images():
    """In-sample scores are much too low where images are few; leave-one-out ones are not."""
    X, y = features(45)
    fitted, held = Mahalanobis.fit_and_score(X, y)
    fresh = score(fitted, features(3000, seed=5)[0])
    assert np.median(score(fitted, X)) < 0.85 * np.median(fresh)
    assert np.median(held) == pytest.approx(np.median(fresh), rel=0.25)


@pytest.mark.parametrize(
    "case", ["one class", "one image", "class of one", "flat feature", "all equal", "missing class"]
)
def test_corners_give_finite_scores(case: str):
    X, y = features(30)
    if case == "one class":
        y = np.zeros_like(y)
    elif case == "one image":
        X, y = X[:1], y[:1]
    elif case == "class of one":
        y = np.r_[2, np.zeros(29, int)]
    elif case == "flat feature":
        X[:, 3] = 7
    elif case == "all equal":
        X[:] = X[0]
    else:
        y = np.where(y == 1, 2, y)
    fitted, scores = Mahalanobis.fit_and_score(X, y)
    assert np.isfinite(scores).all()
    assert len(fitted.means) == len(np.unique(y))
    assert np.isfinite(score(fitted, X + 1)).all()


def test_features_that_are_not_finite_are_refused():
    X, y = features(10)
    X[0, 0] = np.nan
    with pytest.raises(DataError, match="features are not finite"):
        Mahalanobis.fit(X, y)


def test_fitting_leaves_features_alone_and_reads_memory_maps(tmp_path):
    X, y = features(60)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    np.testing.assert_array_equal(Mahalanobis.fit(mapped, y).whitener.numpy(), Mahalanobis.fit(X, y).whitener.numpy())


def test_energies_equal_their_formulas():
    z = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    expected = -2 * np.log(np.exp(z / 2).sum(1))
    np.testing.assert_allclose(score(Energy(2.0), z, z), expected, rtol=1e-5)
    joint = -2 * np.log1p(np.exp(z / 2)).sum(1)
    np.testing.assert_allclose(score(JointEnergy(2.0), z, z), joint, rtol=1e-5)


def test_a_score_is_rebuilt_from_its_name_and_shapes():
    X, y = features(50)
    for fitted in (Mahalanobis.fit(X, y), Energy(1.3), JointEnergy(0.7)):
        state = fitted.state_dict()
        made = empty_score(fitted.name, {name: value.shape for name, value in state.items()})
        made.load_state_dict(state)
        z = X[:, :2].copy()
        np.testing.assert_array_equal(score(made, X, z), score(fitted, X, z))
    with pytest.raises(BundleError, match="'oracle' is not one of energy, joint-energy, mahalanobis"):
        empty_score("oracle", {})


def chosen(garbage_features, garbage_logits, known=True, task="single-label", n=200):
    X, y = features(n)
    Z, held = features(n, seed=2)
    logits = np.eye(3, dtype=np.float32)[held] * 6 + np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    labels = np.eye(3, dtype=np.uint8)[y] if task == "multi-label" else y
    return choose_ood(X, labels, Z if known else None, logits, garbage_features, garbage_logits, task=task)


def garbage(shift: float, size: float, n: int = 80):
    rng = np.random.default_rng(4)
    return features(n, seed=6)[0] + np.float32(shift), (rng.normal(size=(n, 3)) * size).astype(np.float32)


def test_the_better_score_wins():
    _, record = chosen(*garbage(shift=40, size=6))
    assert record["name"] == "mahalanobis"
    _, record = chosen(*garbage(shift=0, size=0.1))
    assert record["name"] == "energy"
    assert record["auroc"]["energy"] > record["auroc"]["mahalanobis"]
    _, record = chosen(*garbage(shift=0, size=0.1), task="multi-label")
    assert record["name"] == "joint-energy"


@pytest.mark.parametrize("known", [True, False])
def test_record_is_what_the_score_does(known: bool):
    strange = garbage(shift=10, size=1)
    module, record = chosen(*strange, known=known)
    json.dumps(record, allow_nan=False)
    scores = score(module, *strange)
    assert record["garbage_caught"] == pytest.approx((scores > record["threshold"]).mean())
    assert record["recall"] >= 0.95
    assert sum(record["histogram"]["known"]) == record["known"] == 200
    assert sum(record["histogram"]["garbage"]) == record["garbage"] == 80
    assert len(record["histogram"]["edges"]) == 41


def test_threshold_keeps_its_promise_on_new_images():
    """With held-out scores, and with leave-one-out ones where images are few for the width."""
    for known in (True, False):
        module, record = chosen(*garbage(shift=40, size=6), known=known)
        assert record["name"] == "mahalanobis"
        kept = (score(module, features(4000, seed=11)[0]) <= record["threshold"]).mean()
        assert 0.9 < kept < 0.99


def test_threshold_is_the_conformal_quantile():
    scores = np.random.default_rng(0).permutation(100).astype(float)
    assert threshold_at(scores, 0.95) == 95
    assert threshold_at(scores[:5], 0.95) == scores[:5].max()
    awkward = np.array([0.1])
    assert threshold_at(awkward, 0.95) >= 0.1
    assert np.float32(threshold_at(awkward, 0.95)) == threshold_at(awkward, 0.95)


def test_scores_of_many_sizes_are_counted_on_a_logarithmic_axis():
    rng = np.random.default_rng(0)
    known, strange = rng.uniform(0.5, 2, 500), rng.uniform(50, 500, 60)
    counted = histogram(known, strange)
    assert counted["log"]
    assert np.ptp(np.diff(np.log(counted["edges"]))) < 1e-9
    assert max(counted["known"]) < 150
    assert not histogram(known - 1, strange)["log"]
    assert sum(histogram(np.ones(5), np.ones(3))["known"]) == 5


def test_infinite_logits_are_ranked():
    strange, logits = garbage(shift=0, size=0.1)
    logits[:40] = -np.inf
    _, record = chosen(strange, logits)
    json.dumps(record, allow_nan=False)
    assert record["auroc"]["energy"] > 0.9


def test_auroc_of_the_record():
    strange = garbage(shift=3, size=2)
    module, record = chosen(*strange)
    Z, held = features(200, seed=2)
    known_logits = np.eye(3, dtype=np.float32)[held] * 6 + np.random.default_rng(0).normal(size=(200, 3)).astype(
        np.float32
    )
    both = np.concatenate([score(module, Z, known_logits), score(module, *strange)])
    assert record["auroc"][record["name"]] == pytest.approx(auroc(both, np.arange(280) >= 200))


def test_without_garbage_there_is_no_choice():
    X, _ = features(5)
    with pytest.raises(DataError, match="got 200 and 0"):
        chosen(X[:0], X[:0, :3])
