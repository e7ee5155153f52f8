"""Probabilities that mean what they say: temperature scaling (Guo et al. 2017), and the classifier that ships."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foveal.core.errors import FovealError
from foveal.core.method import Classifier, Task
from foveal.evaluate.metrics import BINS, bin_of, calibration_gaps, number

Array = NDArray[Any]

COLDEST, HOTTEST = 0.05, 20.0


def fit_temperature(logits: Array, labels: Array, task: Task) -> float:
    """The temperature T in 0.05..20 that minimises the negative log-likelihood of logits / T.

    A share of 1 / (n + 2) of each label is spread evenly (the rule of succession, as in Platt 1999): a model without
    a mistake on n images has not shown that it makes none, and would otherwise be made certain of everything.

    The likelihood is convex in 1/T, so its derivative has one root: Newton steps, kept inside a bracket. Whatever no
    temperature can change is left out: classes, rows or (multi-label) entries that an infinite logit decides.

    Args:
        logits: [n, C], of images that were not trained on. Infinite and huge values are fine, NaN is not.
        labels: [n], or [n, C] when multi-label.

    Returns:
        T; 1.0 when the images say nothing about it.

    Raises:
        FovealError: NaN among the logits.
    """
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if np.isnan(z).any():
        raise FovealError("logits hold NaN, so no temperature can be fitted: the model diverged, lower its rate")
    likelihood = LabelLikelihood if task == "multi-label" else ClassLikelihood
    slope = likelihood(z, y, 1 / (len(z) + 2))
    if slope.scale == 0.0:
        return 1.0
    low, high, b = slope.scale / HOTTEST, slope.scale / COLDEST, slope.scale
    if slope(low)[0] >= 0:
        return HOTTEST
    if slope(high)[0] <= 0:
        return COLDEST
    for _ in range(200):
        first, second = slope(b)
        low, high = (b, high) if first < 0 else (low, b)
        step = b - first / second if second > 0 else np.inf
        following = step if low < step < high else 0.5 * (low + high)
        if abs(following - b) <= 1e-12 * b:
            break
        b = following
    return float(np.clip(slope.scale / b, COLDEST, HOTTEST))


class ClassLikelihood:
    """First and second derivative, in b, of the mean loss of softmax(b z / scale); `scale` is the largest gap in z."""

    def __init__(self, z: Array, y: Array, spread: float) -> None:
        rows = np.arange(len(z))
        kept = np.isfinite(z[rows, y.astype(np.int64)]) & (z < np.inf).all(1)
        z, y = z[kept], y[kept].astype(np.int64)
        gap = z - z.max(1, keepdims=True, initial=-np.inf)
        self.possible = np.isfinite(gap)
        gap = np.where(self.possible, gap, 0.0)
        self.scale = float(np.abs(gap).max(initial=0.0))
        self.gap = gap / (self.scale or 1.0)
        target = (1 - spread) * self.gap[np.arange(len(y)), y] + spread * self.gap.sum(1) / self.possible.sum(1)
        self.target = float(target.mean()) if len(y) else 0.0

    def __call__(self, b: float) -> tuple[float, float]:
        p = np.where(self.possible, np.exp(b * self.gap), 0.0)
        p /= p.sum(1, keepdims=True)
        mean = (p * self.gap).sum(1)
        return float(mean.mean()) - self.target, float(((p * self.gap**2).sum(1) - mean**2).mean())


class LabelLikelihood:
    """The same for sigmoid(b z / scale), over all pairs of image and label."""

    def __init__(self, z: Array, y: Array, spread: float) -> None:
        kept = np.isfinite(z)
        z, y = z[kept], y[kept].astype(np.float64)
        self.scale = float(np.abs(z).max(initial=0.0))
        self.z = z / (self.scale or 1.0)
        self.target = float((((1 - spread) * y + spread / 2) * self.z).mean()) if len(z) else 0.0

    def __call__(self, b: float) -> tuple[float, float]:
        p = 0.5 * (1 + np.tanh(0.5 * b * self.z))
        return float((p * self.z).mean()) - self.target, float((p * (1 - p) * self.z**2).mean())


def to_probabilities(logits: Array, task: Task, temperature: float = 1.0) -> Array:
    """Softmax (sigmoid when multi-label) of logits / temperature, [n, C] float64."""
    z = torch.from_numpy(np.asarray(logits, dtype=np.float64)) / temperature
    return (z.sigmoid() if task == "multi-label" else z.softmax(1)).numpy()


def ece(probabilities: Array, labels: Array, task: Task, bins: int = BINS) -> float:
    """Expected calibration error in 0..1 (Guo et al. 2017, eq. 3): of the top label, or the mean over classes of
    each class's own when multi-label. NaN without images.

    Args:
        probabilities: [n, C].
        labels: [n], or [n, C] when multi-label.
        bins: of equal width.
    """
    P, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if not len(P):
        return float("nan")
    return float(np.mean([np.abs(gap.sum(0)).sum() / len(P) for gap in calibration_gaps(P, y, task, bins)]))


def reliability(probabilities: Array, labels: Array, task: Task, bins: int = BINS) -> list[dict[str, float]]:
    """The bins of a reliability diagram that hold anything.

    Returns:
        Rows of `low`, `high` (the bin), `n`, `confidence` (mean) and `accuracy` (share that was right). When
        multi-label, every pair of image and label counts as one.
    """
    P, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if task == "multi-label":
        confidence, outcome = P.ravel(), y.ravel().astype(np.float64)
    else:
        confidence, outcome = P.max(1), (P.argmax(1) == y).astype(np.float64)
    place = bin_of(confidence, bins)
    count, p, right = (np.bincount(place, weights, minlength=bins) for weights in (None, confidence, outcome))
    return [
        {
            "low": k / bins,
            "high": (k + 1) / bins,
            "n": int(count[k]),
            "confidence": float(p[k] / count[k]),
            "accuracy": float(right[k] / count[k]),
        }
        for k in np.flatnonzero(count).tolist()
    ]


def calibration_record(
    logits: Array, labels: Array, task: Task, temperature: float, measured_on: str
) -> dict[str, Any]:
    """What the temperature does to one set of images: for calibration.json and the reliability diagram.

    Returns:
        `measured_on`, `n`, `ece_before`, `ece_after`, `nll_before`, `nll_after` (nats per image; None when
        infinite), and `before`, `after`: rows of `reliability`.
    """
    record: dict[str, Any] = {"measured_on": measured_on, "n": len(logits)}
    for when, T in (("before", 1.0), ("after", temperature)):
        P = to_probabilities(logits, task, T)
        record[f"ece_{when}"] = number(ece(P, labels, task))
        record[f"nll_{when}"] = number(negative_log_likelihood(P, labels, task))
        record[when] = reliability(P, labels, task)
    return record


def negative_log_likelihood(probabilities: Array, labels: Array, task: Task) -> float:
    """Mean over images of -log p(labels), in nats; multi-label sums over the labels of an image."""
    P, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    with np.errstate(divide="ignore"):
        if task == "multi-label":
            return float(-np.log(np.where(y.astype(bool), P, 1 - P)).sum(1).mean())
        return float(-np.log(P[np.arange(len(P)), y.astype(np.int64)]).mean())


class Calibrated(nn.Module):
    """The model that ships: normalised images [B, 3, H, W] -> (probabilities [B, C], unknown score [B]).

    A higher score is more unknown. Everything it has learnt is parameters and buffers, and nothing in `forward`
    depends on values, so it exports to ONNX as it is.

    Args:
        classifier: images to logits.
        temperature: what logits are divided by.
        ood: (features [B, D], logits [B, C]) -> score [B]; see `foveal.evaluate.ood`.
    """

    temperature: Tensor

    def __init__(self, classifier: Classifier, temperature: float, ood: nn.Module, task: Task = "single-label") -> None:
        super().__init__()
        self.classifier = classifier
        self.ood = ood
        self.task: Task = task
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.classifier.features(images)
        return self.judge(features, self.classifier.head(features))

    def judge(self, features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The same from features [B, D] and their logits [B, C], for those who have them already."""
        scaled = logits / self.temperature
        probabilities = scaled.sigmoid() if self.task == "multi-label" else scaled.softmax(1)
        return probabilities, self.ood(features, logits)
