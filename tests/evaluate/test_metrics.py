"""Metrics against scikit-learn and torchmetrics, intervals against a bootstrap written as a loop."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from foveal.core.errors import DataError, FovealError
from foveal.evaluate import metrics as module
from foveal.evaluate.calibration import ece
from foveal.evaluate.metrics import auroc, interval, measure, multiplicities

HEADLINES = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")


def single(n: int, C: int, seed: int = 0, digits: int | None = None):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, C, n)
    z = rng.normal(size=(n, C))
    z[np.arange(n), y] += 1
    if digits is not None:
        z = z.round(digits)
    P = np.exp(z)
    return P / P.sum(1, keepdims=True), y


def several(n: int, C: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    y = (rng.random((n, C)) < 0.3).astype(np.uint8)
    return 1 / (1 + np.exp(-(rng.normal(size=(n, C)) + 2 * y - 1))), y


def names(C: int) -> list[str]:
    return [f"class {c}" for c in range(C)]


@pytest.mark.parametrize("digits", [None, 0])
@pytest.mark.parametrize("C", [2, 3, 7])
def test_single_label_equals_scikit_learn(C: int, digits: int | None):
    P, y = single(300, C, digits=digits)
    found = measure(P, y, names(C), "single-label", resamples=0)
    guess = P.argmax(1)
    assert found["accuracy"]["value"] == pytest.approx(sk.accuracy_score(y, guess))
    assert found["balanced_accuracy"]["value"] == pytest.approx(sk.balanced_accuracy_score(y, guess))
    assert found["macro_f1"]["value"] == pytest.approx(sk.f1_score(y, guess, average="macro"))
    score = P[:, 1] if C == 2 else P
    assert found["auroc"]["value"] == pytest.approx(sk.roc_auc_score(y, score, multi_class="ovr"))
    assert found["confusion"] == sk.confusion_matrix(y, guess).tolist()
    precision, recall, f1, support = sk.precision_recall_fscore_support(y, guess)
    for c, row in enumerate(found["per_class"].values()):
        assert [row["precision"], row["recall"], row["f1"]] == pytest.approx([precision[c], recall[c], f1[c]])
        assert row["support"] == support[c]
        assert row["auroc"] == pytest.approx(sk.roc_auc_score(y == c, P[:, c] if C > 2 else P[:, 1] * (2 * c - 1)))


def test_multi_label_equals_scikit_learn():
    P, y = several(300, 4)
    found = measure(P, y, names(4), "multi-label", resamples=0)
    guess = P >= 0.5
    assert found["accuracy"]["value"] == pytest.approx(sk.accuracy_score(y, guess))
    balanced = [sk.balanced_accuracy_score(y[:, c], guess[:, c]) for c in range(4)]
    assert found["balanced_accuracy"]["value"] == pytest.approx(np.mean(balanced))
    assert found["macro_f1"]["value"] == pytest.approx(sk.f1_score(y, guess, average="macro"))
    assert found["auroc"]["value"] == pytest.approx(sk.roc_auc_score(y, P))
    assert found["map"]["value"] == pytest.approx(sk.average_precision_score(y, P))
    assert "confusion" not in found


def test_average_precision_with_ties_equals_scikit_learn():
    P, y = several(200, 3, seed=1)
    P = P.round(1)
    found = measure(P, y, names(3), "multi-label", resamples=0)
    assert found["map"]["value"] == pytest.approx(sk.average_precision_score(y, P))
    assert found["auroc"]["value"] == pytest.approx(sk.roc_auc_score(y, P))


def test_calibration_error_equals_torchmetrics():
    P, y = single(400, 3)
    theirs = multiclass_calibration_error(torch.from_numpy(P), torch.from_numpy(y), 3, n_bins=15)
    assert ece(P, y, "single-label") == pytest.approx(float(theirs), abs=1e-6)
    assert measure(P, y, names(3), "single-label", resamples=0)["ece"]["value"] == pytest.approx(
        float(theirs), abs=1e-6
    )


def test_multi_label_calibration_error_is_the_mean_of_binary_ones():
    P, y = several(400, 3)

    def binary(p: np.ndarray, t: np.ndarray) -> float:
        place = np.minimum((p * 15).astype(int), 14)
        return sum(abs(p[place == k].sum() - t[place == k].sum()) for k in range(15)) / len(p)

    expected = np.mean([binary(P[:, c], y[:, c]) for c in range(3)])
    assert ece(P, y, "multi-label") == pytest.approx(expected)
    assert measure(P, y, names(3), "multi-label", resamples=0)["ece"]["value"] == pytest.approx(expected)
    certain = np.ones(50)
    theirs = binary_calibration_error(torch.from_numpy(P[:, 0]).clamp(0.5), torch.from_numpy(y[:, 0]), n_bins=15)
    assert float(theirs) == pytest.approx(ece(P[:, :1].clip(0.5), y[:, :1], "multi-label"), abs=1e-6)
    assert ece(certain[:, None], certain[:, None], "multi-label") == 0.0


def naive(P: np.ndarray, y: np.ndarray, task: str, resamples: int, seed: int) -> dict[str, tuple[float, float]]:
    """The same resamples, one at a time, through scikit-learn."""
    draws: dict[str, list[float]] = {"accuracy": [], "balanced_accuracy": [], "macro_f1": [], "auroc": [], "ece": []}
    W = np.hstack(list(multiplicities(len(P), resamples, seed))).astype(int)
    for column in W.T:
        rows = np.repeat(np.arange(len(P)), column)
        p, t = P[rows], y[rows]
        guess = p.argmax(1)
        draws["accuracy"].append(sk.accuracy_score(t, guess))
        draws["balanced_accuracy"].append(sk.balanced_accuracy_score(t, guess))
        draws["macro_f1"].append(sk.f1_score(t, guess, average="macro", zero_division=0))
        draws["auroc"].append(sk.roc_auc_score(t, p[:, 1] if p.shape[1] == 2 else p, multi_class="ovr"))
        draws["ece"].append(ece(p, t, "single-label"))
    centre = ece(P, y, "single-label") - np.mean(draws["ece"])
    draws["ece"] = np.clip(np.array(draws["ece"]) + centre, 0, 1).tolist()
    return {name: tuple(np.quantile(values, [0.025, 0.975])) for name, values in draws.items()}


@pytest.mark.parametrize("C", [2, 3])
def test_intervals_equal_a_naive_bootstrap(C: int):
    P, y = single(120, C, digits=1)
    found = measure(P, y, names(C), "single-label", seed=3, resamples=60)
    for name, (low, high) in naive(P, y, "single-label", 60, 3).items():
        assert (found[name]["low"], found[name]["high"]) == pytest.approx((low, high), abs=2e-6), name


def test_recall_intervals_equal_a_naive_bootstrap():
    P, y = single(90, 3)
    found = measure(P, y, names(3), "single-label", resamples=50)
    W = np.hstack(list(multiplicities(90, 50, 0)))
    for c, row in enumerate(found["per_class"].values()):
        recalls = [(w * (y == c) * (P.argmax(1) == c)).sum() / (w * (y == c)).sum() for w in W.T]
        assert (row["recall_low"], row["recall_high"]) == pytest.approx(
            tuple(np.quantile(recalls, [0.025, 0.975])), abs=1e-6
        )


def test_resamples_draw_every_image_alike_and_n_at_a_time():
    W = np.hstack(list(multiplicities(50, 400, 1)))
    assert W.shape == (50, 400)
    assert (W.sum(0) == 50).all()
    assert W.mean() == 1
    assert W.var() == pytest.approx(1 - 1 / 50, abs=0.05)


def test_chunks_do_not_change_the_sizes_of_resamples(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CHUNK", 120)
    chunks = list(multiplicities(50, 5, 0))
    assert [chunk.shape for chunk in chunks] == [(50, 2), (50, 2), (50, 1)]
    assert (np.hstack(chunks).sum(0) == 50).all()


def test_intervals_cover_the_truth():
    """An accuracy of 0.8 lies in 95% of the intervals, up to the noise of 200 worlds."""
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(200):
        right = rng.random(150) < 0.8
        P = np.where(right[:, None], [[0.9, 0.1]], [[0.1, 0.9]])
        entry = measure(P, np.zeros(150, int), names(2), "single-label", seed=seed, resamples=200)["accuracy"]
        inside += entry["low"] <= 0.8 <= entry["high"]
    assert 180 <= inside <= 199


def test_same_seed_same_intervals_and_another_seed_others():
    P, y = single(100, 3)
    one = measure(P, y, names(3), "single-label", seed=1, resamples=100)
    assert one == measure(P, y, names(3), "single-label", seed=1, resamples=100)
    assert one["accuracy"]["low"] != measure(P, y, names(3), "single-label", seed=2, resamples=37)["auroc"]["low"]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(2, 5), st.integers(0, 10_000), st.booleans())
def test_any_world_gives_json_and_ordered_intervals(n: int, C: int, seed: int, multi: bool):
    P, y = several(n, C, seed) if multi else single(n, C, seed, digits=0)
    found = measure(P, y, names(C), "multi-label" if multi else "single-label", resamples=20)
    json.dumps(found, allow_nan=False)
    for name in HEADLINES:
        entry = found[name]
        if entry["value"] is not None:
            assert 0 <= entry["value"] <= 1
            if entry["low"] is not None:
                assert entry["low"] <= entry["high"] + 1e-9
                assert entry["low"] >= -1e-9
                assert entry["high"] <= 1 + 1e-6


def test_order_of_images_and_names_of_classes_do_not_matter():
    P, y = single(150, 3)
    order, swap = np.random.default_rng(0).permutation(150), np.array([2, 0, 1])
    plain = measure(P, y, names(3), "single-label", resamples=0)
    moved = measure(P[order][:, np.argsort(swap)], swap[y[order]], names(3), "single-label", resamples=0)
    for name in HEADLINES:
        assert moved[name]["value"] == pytest.approx(plain[name]["value"])


def test_absent_class_is_left_out_and_said():
    P, y = single(80, 3)
    y = np.where(y == 2, 0, y)
    found = measure(P, y, names(3), "single-label", resamples=30)
    present = [sk.roc_auc_score(y == c, P[:, c]) for c in (0, 1)]
    assert found["auroc"]["value"] == pytest.approx(np.mean(present))
    assert found["per_class"]["class 2"]["auroc"] is None
    assert found["per_class"]["class 2"]["recall"] is None
    assert found["notes"] == ["no image of class 2: left out of balanced accuracy and AUROC"]
    assert found["balanced_accuracy"]["value"] == pytest.approx(
        np.mean([(P.argmax(1)[y == c] == c).mean() for c in (0, 1)])
    )


def test_only_one_class_in_the_labels():
    P, _ = single(30, 2)
    found = measure(P, np.zeros(30, int), names(2), "single-label", resamples=10)
    assert found["auroc"] == {"value": None, "low": None, "high": None}
    assert "every image is class 0" in found["notes"][1]


def test_label_that_no_image_has_and_label_that_all_have():
    P, y = several(60, 3)
    y[:, 0], y[:, 1] = 0, 1
    found = measure(P, y, names(3), "multi-label", resamples=10)
    assert found["auroc"]["value"] == pytest.approx(sk.roc_auc_score(y[:, 2], P[:, 2]))
    assert len(found["notes"]) == 2
    json.dumps(found, allow_nan=False)


def test_class_never_guessed_has_no_precision():
    P = np.tile([[0.9, 0.1]], (10, 1))
    row = measure(P, np.arange(10) % 2, names(2), "single-label", resamples=0)["per_class"]["class 1"]
    assert (row["precision"], row["recall"], row["f1"]) == (None, 0.0, 0.0)


def test_perfect_answers():
    y = np.arange(12) % 3
    found = measure(np.eye(3)[y], y, names(3), "single-label", resamples=50)
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auroc"):
        assert found[name] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["ece"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_area_of_a_score():
    assert auroc(np.array([1.0, 2, 3, 4]), np.array([0, 0, 1, 1])) == 1
    assert auroc(np.array([1.0, 1, 1, 1]), np.array([0, 1, 0, 1])) == 0.5
    assert np.isnan(auroc(np.array([1.0, 2]), np.array([0, 0])))


def test_interval_ignores_what_is_undefined():
    samples = np.array([[5.0, np.nan, 1.0, 3.0], [np.nan] * 4])
    low, high = interval(samples)
    assert (low[0], high[0]) == pytest.approx(tuple(np.quantile([1, 3, 5], [0.025, 0.975])))
    assert np.isnan(low[1])


def test_many_classes_take_fewer_resamples_for_ranks_and_say_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "WORK", 1)
    monkeypatch.setattr(module, "CHUNK", 50 * 100)
    P, y = single(100, 4)
    found = measure(P, y, names(4), "single-label", resamples=400)
    assert found["bootstrap"]["auroc_resamples"] == 100
    assert found["auroc"]["low"] < found["auroc"]["value"] < found["auroc"]["high"]


def test_arguments_stay_as_they_were():
    P, y = single(40, 3)
    P0, y0 = P.copy(), y.copy()
    P.flags.writeable = y.flags.writeable = False
    measure(P, y, names(3), "single-label", resamples=10)
    assert np.array_equal(P, P0)
    assert np.array_equal(y, y0)


def test_wrong_input_says_what_came_and_what_was_expected():
    P, y = single(10, 3)
    with pytest.raises(DataError, match=r"probabilities \[10, 3\], labels \[9\] and 3 classes do not fit"):
        measure(P, y[:9], names(3), "single-label")
    with pytest.raises(DataError, match=r"expected 0\.\.C-1"):
        measure(P, y + 3, names(3), "single-label")
    with pytest.raises(DataError, match="at least one image"):
        measure(P[:0], y[:0], names(3), "single-label")
    P[2] = np.nan
    with pytest.raises(FovealError, match="1 of 10 images have probabilities that are not finite"):
        measure(P, y, names(3), "single-label")
