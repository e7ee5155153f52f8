"""Is this image like anything seen in training? Two scores, and the choice between them on held-out images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from foveal.core.errors import BundleError, DataError
from foveal.core.method import Task
from foveal.evaluate.metrics import auroc, number

Array = NDArray[Any]

ROWS = 1024
"""Rows taken into float64 at once."""


class Energy(nn.Module):
    """Free energy of the logits, -T logsumexp(z / T) (Liu et al. 2020, eq. 4). Higher is more unknown."""

    name = "energy"
    temperature: Tensor

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        return -self.temperature * torch.logsumexp(logits / self.temperature, 1)

    @classmethod
    def empty(cls, shapes: Mapping[str, torch.Size]) -> Energy:
        """An instance to load a state dict into."""
        return cls()


class JointEnergy(Energy):
    """Sum over labels of their energies, -T sum softplus(z / T), for several labels per image (Wang et al. 2021)."""

    name = "joint-energy"

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        return -self.temperature * F.softplus(logits / self.temperature).sum(1)


class Mahalanobis(nn.Module):
    """Squared distance to the nearest class mean under one shrunk covariance, over the width (Lee et al. 2018).

    About 1 for images like those of training, whatever the width; higher is more unknown.

    Buffers: `center` [D], `whitener` [D, D] (inverse Cholesky factor, upper triangular), `means` [M, D] (whitened,
    relative to `center`), one for each class that has images.
    """

    name = "mahalanobis"
    center: Tensor
    whitener: Tensor
    means: Tensor

    def __init__(self, center: Tensor, whitener: Tensor, means: Tensor) -> None:
        super().__init__()
        self.register_buffer("center", center)
        self.register_buffer("whitener", whitener)
        self.register_buffer("means", means)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        x = (features - self.center) @ self.whitener
        squares = x.square().sum(1, keepdim=True) - 2 * x @ self.means.T + self.means.square().sum(1)
        return squares.amin(1).clamp_min(0) / self.center.shape[0]

    @classmethod
    def empty(cls, shapes: Mapping[str, torch.Size]) -> Mahalanobis:
        """An instance to load a state dict into, from the shapes of its buffers."""
        return cls(*(torch.zeros(shapes[name]) for name in ("center", "whitener", "means")))

    @classmethod
    def fit(cls, X: Array, groups: Array) -> Mahalanobis:
        """Means and pooled covariance with Ledoit-Wolf shrinkage (2004), computed in float64.

        Args:
            X: features [n, D]; read in slices, never copied whole.
            groups: class of each row, [n] int64; classes may be missing.
        """
        return cls.fit_and_score(X, groups, score=False)[0]

    @classmethod
    def fit_and_score(cls, X: Array, groups: Array, score: bool = True) -> tuple[Mahalanobis, Array]:
        """As `fit`, and the score of every training row under the fit that lacks this row, [n] float64.

        Leaving row i out of n_c in its class takes n_c / (n_c - 1) x x^T off the scatter (x: its distance from the
        class mean), so its score follows from the whole fit by the Sherman-Morrison formula. The amount of
        shrinkage is that of the whole fit.
        """
        n, D = X.shape
        present, own = np.unique(groups, return_inverse=True)
        sizes = torch.from_numpy(np.bincount(own, minlength=len(present)))
        index = torch.from_numpy(own)
        slices = [slice(first, first + ROWS) for first in range(0, n, ROWS)]

        def rows(part: slice) -> Tensor:
            return torch.from_numpy(np.asarray(X[part], dtype=np.float64))

        means = torch.zeros(len(present), D, dtype=torch.float64)
        for part in slices:
            means.index_add_(0, index[part], rows(part))
        means /= sizes[:, None]
        if not torch.isfinite(means).all():
            raise DataError("features are not finite, so no unknown score can be fitted: check the backbone's weights")

        scatter = torch.zeros(D, D, dtype=torch.float64)
        fourth = 0.0
        for part in slices:
            x = rows(part) - means[index[part]]
            scatter.addmm_(x.T, x)
            fourth += float(x.square().sum(1).square().sum())
        covariance = scatter / n
        size = float(covariance.diagonal().mean())
        share = shrinkage(covariance, size, fourth, n)
        target = share * size if size > 0 else 1.0
        precision_of = (1 - share) * covariance
        precision_of.diagonal().add_(target)
        eye = torch.eye(D, dtype=torch.float64)
        whitener = torch.linalg.solve_triangular(torch.linalg.cholesky(precision_of), eye, upper=False).T
        center = means.mean(0)
        fitted = cls(center.float(), whitener.float().contiguous(), ((means - center) @ whitener).float())
        if not score:
            return fitted, np.zeros(0)

        scores = np.empty(n)
        for part in slices:
            x = (rows(part) - center).float() @ fitted.whitener
            scores[part] = left_out(x, fitted.means, index[part], sizes, (1 - share) / n) / D
        return fitted, scores


def shrinkage(covariance: Tensor, size: float, fourth: float, n: int) -> float:
    """The share of the identity in the Ledoit-Wolf estimate, 1e-6..1 (never 0: the covariance must have an inverse).

    Args:
        covariance: [D, D], of n centred rows.
        size: its mean diagonal.
        fourth: sum over rows of |x|^4.
    """
    square = float(covariance.square().sum())
    distance = square - covariance.shape[0] * size**2
    noise = (fourth - n * square) / n**2
    return float(np.clip(noise / distance, 1e-6, 1.0)) if distance > 1e-12 * square else 1.0


def left_out(x: Tensor, means: Tensor, own: Tensor, sizes: Tensor, unit: float) -> Array:
    """Squared distance of each row to the nearest mean when the row is left out of the fit.

    Args:
        x: whitened rows [n, D].
        means: whitened means [M, D].
        own: each row's mean [n].
        sizes: rows of each mean [M].
        unit: weight of one outer product in the covariance.
    """
    count = sizes[own].double()
    residual = x - means[own]
    length = residual.square().sum(1).double()
    products = residual @ means.T
    onto = ((residual * x).sum(1, keepdim=True) - products).double()
    squares = (x.square().sum(1, keepdim=True) - 2 * x @ means.T + means.square().sum(1)).double()
    grown = count / (count - 1).clamp_min(1)
    rest = (1 - unit * grown * length).clamp_min(1e-6)
    squares = squares + (unit * grown / rest)[:, None] * onto.square()
    alone = grown.square() * length / rest
    if len(means) > 1:
        alone = torch.where(count > 1, alone, torch.inf)
    squares[torch.arange(len(x)), own] = alone
    return squares.amin(1).clamp_min(0).numpy()


SCORES: dict[str, type[Energy] | type[Mahalanobis]] = {
    score.name: score for score in (Energy, JointEnergy, Mahalanobis)
}


def empty_score(name: str, shapes: Mapping[str, torch.Size]) -> nn.Module:
    """The score called `name` in a record of `choose_ood`, ready to load a state dict of these shapes.

    Raises:
        BundleError: no score has this name.
    """
    if name not in SCORES:
        raise BundleError(
            f"unknown-image score '{name}' is not one of {', '.join(SCORES)}: upgrade foveal or fit again"
        )
    return SCORES[name].empty(shapes)


def choose_ood(
    train_features: Array,
    train_labels: Array,
    known_features: Array | None,
    known_logits: Array,
    garbage_features: Array,
    garbage_logits: Array,
    *,
    task: Task = "single-label",
    temperature: float = 1.0,
    recall: float = 0.95,
    fitted_on: str = "held-out images",
) -> tuple[Energy | Mahalanobis, dict[str, Any]]:
    """Fit both scores and keep the one that tells held-out known images from garbage better (by AUROC).

    Args:
        train_features: [n, D]. train_labels: [n], or [n, C] when multi-label.
        known_features: [m, D] of images not trained on; None when the known images are the training images
            themselves with out-of-fold logits, whose Mahalanobis scores are then leave-one-out.
        known_logits: [m, C], of a model that was not trained on these images.
        garbage_features: [g, D]; garbage_logits: [g, C], of images no user's photo looks like.
        temperature: of the energy.
        recall: share of known images that must stay below the threshold.
        fitted_on: what the known images are, for the record.

    Returns:
        The score, and a record ready for calibration.json: `name`, `threshold` (unknown is a score above it),
        `recall` (share of known images at or below it), `garbage_caught`, `auroc` by name of score, `known` and
        `garbage` (numbers of images), `histogram` (`edges`, `known`, `garbage`), `fitted_on`.

    Raises:
        DataError: no known or no garbage images, or features that are not finite.
    """
    if not len(known_logits) or not len(garbage_logits):
        raise DataError(
            f"choosing the unknown score needs held-out and garbage images: got {len(known_logits)} and "
            f"{len(garbage_logits)}"
        )
    multi = task == "multi-label"
    groups = np.zeros(len(train_features), dtype=np.int64) if multi else np.asarray(train_labels)
    mahalanobis, train_scores = Mahalanobis.fit_and_score(train_features, groups, score=known_features is None)
    energy = (JointEnergy if multi else Energy)(temperature)

    results: list[tuple[Energy | Mahalanobis, Array, Array]] = []
    for score in (mahalanobis, energy):
        if score is mahalanobis and known_features is None:
            known = train_scores
        else:
            known = run(score, known_features, known_logits)
        results.append((score, finite(known), finite(run(score, garbage_features, garbage_logits))))

    def quality(result: tuple[Energy | Mahalanobis, Array, Array]) -> tuple[float, float]:
        _, known, garbage = result
        return area(known, garbage), float((garbage > threshold_at(known, recall)).mean())

    score, known, garbage = max(results, key=quality)
    threshold = threshold_at(known, recall)
    record = {
        "name": score.name,
        "threshold": threshold,
        "recall": float((known <= threshold).mean()),
        "garbage_caught": float((garbage > threshold).mean()),
        "auroc": {candidate.name: number(area(k, g)) for candidate, k, g in results},
        "known": len(known),
        "garbage": len(garbage),
        "histogram": histogram(known, garbage),
        "fitted_on": fitted_on,
    }
    return score, record


def area(known: Array, garbage: Array) -> float:
    """AUROC of telling garbage from known."""
    return auroc(np.concatenate([known, garbage]), np.arange(len(known) + len(garbage)) >= len(known))


def run(score: nn.Module, features: Array | None, logits: Array) -> Array:
    """Scores [n] of features and logits, in slices."""
    parts = []
    with torch.inference_mode():
        for first in range(0, len(logits), ROWS):
            z = torch.from_numpy(np.asarray(logits[first : first + ROWS], dtype=np.float32))
            x = (
                z
                if features is None
                else torch.from_numpy(np.asarray(features[first : first + ROWS], dtype=np.float32))
            )
            parts.append(score(x, z).double().numpy())
    return np.concatenate(parts)


def finite(scores: Array) -> Array:
    """Infinite or undefined scores as float32's ends, so that they can be ranked and written to JSON."""
    top = float(np.finfo(np.float32).max)
    return np.nan_to_num(scores, nan=top, posinf=top, neginf=-top)


def threshold_at(known: Array, recall: float) -> float:
    """The smallest threshold that a new known image stays at or below with probability `recall`: the
    ceil(recall (n + 1))-th smallest of n scores (split conformal prediction), the largest for small n.

    Rounded up to float32, in which models answer.
    """
    place = min(math.ceil(recall * (len(known) + 1)), len(known)) - 1
    value = float(np.partition(known, place)[place])
    rounded = np.float32(value)
    return float(rounded if float(rounded) >= value else np.nextafter(rounded, np.float32(np.inf)))


def histogram(known: Array, garbage: Array, bins: int = 40) -> dict[str, Any]:
    """Counts of both over shared bins; the ends hold what lies beyond the central 98% of either.

    Bins are equal on a logarithmic axis (`log` is True) where positive scores span a factor of 30 or more.
    """
    low = float(min(np.quantile(known, 0.01), np.quantile(garbage, 0.01)))
    high = float(max(np.quantile(known, 0.99), np.quantile(garbage, 0.99)))
    if not high > low:
        low, high = low - 0.5, high + 0.5
    log = low > 0 and high / low >= 30
    edges = np.geomspace(low, high, bins + 1) if log else np.linspace(low, high, bins + 1)
    known, garbage = (np.histogram(np.clip(scores, edges[0], edges[-1]), edges)[0] for scores in (known, garbage))
    return {"edges": edges.tolist(), "known": known.tolist(), "garbage": garbage.tolist(), "log": log}
