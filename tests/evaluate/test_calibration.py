"""The temperature against a grid, its corners, and the classifier that ships."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from foveal.core.errors import FovealError
from foveal.core.method import Classifier
from foveal.evaluate.calibration import (
    COLDEST,
    HOTTEST,
    Calibrated,
    calibration_record,
    ece,
    fit_temperature,
    negative_log_likelihood,
    reliability,
    to_probabilities,
)
from foveal.evaluate.ood import Energy, Mahalanobis
from foveal.features.graph import to_onnx


def world(n: int, C: int, temperature: float, seed: int = 0):
    """Logits whose labels are drawn from softmax(z / temperature)."""
    rng = np.random.default_rng(seed)
    z = 3 * rng.normal(size=(n, C))
    P = to_probabilities(z, "single-label", temperature)
    return z, (P.cumsum(1) > rng.random((n, 1))).argmax(1)


def smoothed_loss(z: np.ndarray, y: np.ndarray, T: float, multi: bool = False) -> float:
    """Straight from the definition, through torch's losses."""
    logits, spread = torch.from_numpy(z) / T, 1 / (len(z) + 2)
    if multi:
        target = torch.from_numpy(y.astype(float)) * (1 - spread) + spread / 2
        return float(nn.functional.binary_cross_entropy_with_logits(logits, target))
    return float(nn.functional.cross_entropy(logits, torch.from_numpy(y), label_smoothing=spread))


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("C", [2, 5])
def test_no_temperature_on_a_grid_is_better(temperature: float, C: int):
    z, y = world(400, C, temperature)
    T = fit_temperature(z, y, "single-label")
    best = smoothed_loss(z, y, T)
    assert all(best <= smoothed_loss(z, y, other) + 1e-12 for other in T * np.geomspace(0.5, 2, 41))
    assert pytest.approx(temperature, rel=0.25) == T


def test_multi_label_temperature():
    rng = np.random.default_rng(0)
    z = 3 * rng.normal(size=(300, 4))
    y = (rng.random((300, 4)) < to_probabilities(z, "multi-label", 2.0)).astype(np.uint8)
    T = fit_temperature(z, y, "multi-label")
    best = smoothed_loss(z, y, T, multi=True)
    assert all(best <= smoothed_loss(z, y, other, multi=True) + 1e-12 for other in T * np.geomspace(0.5, 2, 41))
    assert pytest.approx(2.0, rel=0.2) == T


def test_calibrating_lowers_the_error_on_other_images():
    z, y = world(2000, 4, 2.5)
    T = fit_temperature(z[:1000], y[:1000], "single-label")
    record = calibration_record(z[1000:], y[1000:], "single-label", T, "test images")
    assert record["ece_after"] < 0.5 * record["ece_before"]
    assert record["nll_after"] < record["nll_before"]
    assert record["n"] == sum(row["n"] for row in record["after"]) == 1000


def test_scaling_logits_scales_the_temperature():
    z, y = world(300, 3, 1.0)
    assert fit_temperature(4 * z, y, "single-label") == pytest.approx(4 * fit_temperature(z, y, "single-label"))
    shift = np.random.default_rng(1).normal(size=(300, 1)) * 50
    assert fit_temperature(z + shift, y, "single-label") == pytest.approx(fit_temperature(z, y, "single-label"))


def test_a_model_without_mistakes_is_not_made_certain():
    y = np.arange(200) % 2
    z = np.eye(2)[y] * 5.0
    P = to_probabilities(z, "single-label", fit_temperature(z, y, "single-label"))
    assert P.min(1) == pytest.approx(np.full(200, 0.5 / 202), rel=1e-6)


def test_bounds_hold():
    y = np.arange(200) % 2
    assert fit_temperature(np.eye(2)[1 - y] * 9.0, y, "single-label") == HOTTEST
    assert fit_temperature(np.eye(2)[y] * 0.01, y, "single-label") == COLDEST


@pytest.mark.parametrize("task", ["single-label", "multi-label"])
def test_infinite_and_huge_logits(task):
    z, y = world(200, 3, 1.5)
    labels = np.eye(3, dtype=np.uint8)[y] if task == "multi-label" else y
    expected = fit_temperature(z, labels, task)
    if task == "multi-label":
        padded = np.concatenate([z, np.full((200, 1), -np.inf)], 1)
        labels = np.concatenate([labels, np.zeros((200, 1), np.uint8)], 1)
        assert fit_temperature(padded, labels, task) == pytest.approx(expected)
    else:
        impossible = np.concatenate([z, np.full((200, 1), -np.inf)], 1)
        assert fit_temperature(impossible, y, task) == pytest.approx(expected)
        hopeless = z.copy()
        hopeless[0, y[0]] = -np.inf
        assert fit_temperature(hopeless, y, task) == pytest.approx(expected, rel=0.05)
    for size in (1e30, 1e300):
        assert (
            COLDEST <= fit_temperature(z * size, labels if task == "single-label" else labels[:, :3], task) <= HOTTEST
        )


def test_nothing_to_learn_from():
    y = np.arange(10) % 2
    assert fit_temperature(np.zeros((10, 2)), y, "single-label") == 1.0
    assert fit_temperature(np.zeros((0, 2)), y[:0], "single-label") == 1.0
    certain = np.log(np.eye(2)[y] + 0.0, where=np.eye(2)[y] > 0, out=np.full((10, 2), -np.inf))
    assert fit_temperature(certain, y, "single-label") == 1.0


def test_nan_is_refused():
    with pytest.raises(FovealError, match="logits hold NaN"):
        fit_temperature(np.array([[np.nan, 1.0]]), np.array([0]), "single-label")


def test_reliability_rows_add_up_to_the_calibration_error():
    z, y = world(500, 3, 2.0)
    P = to_probabilities(z, "single-label")
    rows = reliability(P, y, "single-label")
    total = sum(row["n"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / 500
    assert total == pytest.approx(ece(P, y, "single-label"))
    assert all(row["low"] <= row["confidence"] <= row["high"] for row in rows)


def test_negative_log_likelihood_equals_torch():
    z, y = world(50, 3, 1.0)
    ours = negative_log_likelihood(to_probabilities(z, "single-label"), y, "single-label")
    assert ours == pytest.approx(float(nn.functional.cross_entropy(torch.from_numpy(z), torch.from_numpy(y))))


def test_probabilities_survive_logits_that_overflow():
    P = to_probabilities(np.array([[1e4, 0.0, -np.inf]]), "single-label")
    assert P.tolist() == [[1.0, 0.0, 0.0]]


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.flatten(1))


def model(task, ood: nn.Module) -> Calibrated:
    torch.manual_seed(0)
    return Calibrated(Classifier(Flat(), nn.Linear(6, 3)), 1.7, ood, task).eval()


def fitted_mahalanobis() -> Mahalanobis:
    rng = np.random.default_rng(0)
    return Mahalanobis.fit(rng.normal(size=(60, 6)).astype(np.float32), np.arange(60) % 3)


@pytest.mark.parametrize("task", ["single-label", "multi-label"])
def test_calibrated_answers(task):
    made = model(task, Energy(1.7))
    images = torch.randn(5, 3, 8, 8)
    P, score = made(images)
    logits = made.classifier(images)
    expected = (logits / 1.7).softmax(1) if task == "single-label" else (logits / 1.7).sigmoid()
    assert torch.allclose(P, expected)
    assert score.shape == (5,)
    features = made.classifier.features(images)
    again = made.judge(features, logits)
    assert torch.equal(again[0], P)
    assert torch.equal(again[1], score)


@pytest.mark.parametrize("ood", [Energy(1.7), fitted_mahalanobis()], ids=["energy", "mahalanobis"])
def test_calibrated_exports_to_onnx_for_any_batch(ood: nn.Module, tmp_path):
    made = model("single-label", ood)
    path = tmp_path / "model.onnx"
    names = ["probabilities", "score"]
    dynamic = {name: {0: "N"} for name in ("images", *names)}
    to_onnx(made, (torch.randn(2, 3, 8, 8),), path, ["images"], names, dynamic)
    session = onnxruntime.InferenceSession(path)
    for n in (1, 7):
        images = torch.randn(n, 3, 8, 8)
        P, score = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        ours = made(images)
        np.testing.assert_allclose(P, ours[0].detach(), atol=1e-5)
        np.testing.assert_allclose(score, ours[1].detach(), rtol=1e-4, atol=1e-5)


def test_state_dict_holds_everything():
    one, other = model("single-label", fitted_mahalanobis()), model("single-label", Mahalanobis.empty(shapes()))
    other.load_state_dict(one.state_dict())
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(one(images)[1], other(images)[1])
    assert torch.equal(one(images)[0], other(images)[0])


def shapes() -> dict[str, torch.Size]:
    return {name: value.shape for name, value in fitted_mahalanobis().state_dict().items()}
