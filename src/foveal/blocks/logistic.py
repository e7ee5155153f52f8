"""L2-regularised logistic regression on features that stay where they are.

Minimises, in standardised features and with a free intercept, for strength c (scikit-learn's `C`):

    sum_i w_i loss(W x_i + b, y_i) + |W|^2 / (2 c)

where the loss is the cross-entropy of a softmax over all classes, of one sigmoid for two classes, or of one
sigmoid per class for several labels per image. Many problems at once (strengths, folds) share every pass over
the features, because a pass costs about the same for one column as for sixteen. Standardisation is folded into
the weights, so no second copy of the features is made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.blocks.statistics import class_moments
from foveal.core.seeds import derive

GRID = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0, 10.0)
FOLDS = 3
TUNING_ROWS = 8192
COLUMNS = 128
MEMORY = 10


@dataclass(frozen=True)
class Scaling:
    """Mean [D] and inverse standard deviation [D] of the features; 0 for a constant feature, which is ignored."""

    mean: Tensor
    inverse: Tensor

    @staticmethod
    def of(X: Tensor) -> Scaling:
        moments = class_moments(X)
        mean, deviation = moments.mean[0], moments.variance[0].sqrt()
        varies = deviation > 1e-6 * mean.abs()
        inverse = torch.where(varies, 1 / deviation.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        return Scaling(mean.float(), inverse.float())


@dataclass(frozen=True)
class Targets:
    """What the K columns of a problem should predict, in [0, 1]: values [K, n].

    Two classes need one column; more share a softmax; several labels per image take one sigmoid each.
    """

    values: Tensor
    kind: Literal["two", "softmax", "sigmoid"]

    @staticmethod
    def of(y: Tensor, classes: int) -> Targets:
        if y.ndim == 2:
            return Targets(y.T.float().contiguous(), "sigmoid")
        if classes == 2:
            return Targets(y[None].float(), "two")
        return Targets(F.one_hot(y, classes).T.float().contiguous(), "softmax")

    def per_class(self, columns: Tensor) -> Tensor:
        """What each class gets, [C, ...], from the columns [K, ...]."""
        return torch.cat([-columns / 2, columns / 2]) if self.kind == "two" else columns

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(1) if self.kind == "softmax" else logits.sigmoid()

    def curvature(self, p: Tensor, direction: Tensor, weights: Tensor) -> Tensor:
        """Second derivative [P] of the weighted loss along logits `direction` [P, K, n], at probabilities p."""
        if self.kind == "softmax":
            spread = (p * direction.square()).sum(1) - (p * direction).sum(1).square()
            return (spread * weights).sum(1)
        return ((p - p * p) * direction.square()).sum(1).mul(weights).sum(1)

    def losses(self, logits: Tensor) -> Tensor:
        """Loss [P, n] of each image at logits [P, K, n]."""
        values = self.values.expand_as(logits)
        if self.kind == "softmax":
            return -(logits.log_softmax(1) * values).sum(1)
        return F.binary_cross_entropy_with_logits(logits, values, reduction="none").sum(1)


class Directions:
    """L-BFGS memory for P independent problems (Nocedal, 1980): gradient -> descent direction."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, step: Tensor, change: Tensor) -> None:
        product = (step * change).sum((1, 2))
        inverse = torch.where(product > 0, 1 / product.clamp_min(1e-30), 0.0)[:, None, None]
        self.pairs = [*self.pairs[1 - MEMORY :], (step, change, inverse)]

    def __call__(self, gradient: Tensor) -> Tensor:
        q, scales = gradient.clone(), list[Tensor]()
        for step, change, inverse in reversed(self.pairs):
            scales.append(inverse * (step * q).sum((1, 2), keepdim=True))
            q -= scales[-1] * change
        if self.pairs:
            step, change, inverse = self.pairs[-1]
            q *= (step * change).sum((1, 2), keepdim=True) / change.square().sum((1, 2), keepdim=True).clamp_min(1e-30)
        for (step, change, inverse), scale in zip(self.pairs, reversed(scales), strict=True):
            q += step * (scale - inverse * (change * q).sum((1, 2), keepdim=True))
        return -q


def minimise(
    X: Tensor,
    targets: Targets,
    weights: Tensor,
    c: Tensor,
    scaling: Scaling,
    *,
    start: Tensor | None = None,
    tolerance: float = 1e-4,
    iterations: int = 300,
) -> tuple[Tensor, Tensor]:
    """Solve P problems at once by L-BFGS with an exact line search.

    Logits are linear in the parameters, so those along a direction are computed once and the line search needs
    no further pass over X: an iteration is two passes, whatever the steps tried.

    Args:
        X: features [n, D]; `weights` [P, n], 0 where a problem leaves a row out; `c` [P].
        start: parameters [P, K, D + 1] in standardised features, intercept last.
        tolerance: largest entry of the gradient, over the sum of weights, at which a problem counts as solved.

    Returns:
        Parameters [P, K, D + 1] as `start`, and the logits [P, K, n] of every row.
    """
    (K, n), D, P = targets.values.shape, X.shape[1], len(c)
    w, total = weights[:, None], weights.sum(1)
    decay = (1 / c)[:, None, None] * torch.cat([torch.ones(D), torch.zeros(1)])

    def logits(parameters: Tensor) -> Tensor:
        weight = parameters[..., :-1] * scaling.inverse
        bias = parameters[..., -1:] - (weight @ scaling.mean)[..., None]
        return (weight.reshape(P * K, D) @ X.T).view(P, K, n) + bias

    def gradient(residual: Tensor, parameters: Tensor) -> Tensor:
        by_bias = residual.sum(-1, keepdim=True)
        by_weight = (residual.reshape(P * K, n) @ X).view(P, K, D) - by_bias * scaling.mean
        return torch.cat([by_weight * scaling.inverse, by_bias], -1) + decay * parameters

    theta = torch.zeros(P, K, D + 1) if start is None else start
    z = torch.zeros(P, K, n) if start is None else logits(theta)
    p = targets.probabilities(z)
    g, directions = gradient((p - targets.values) * w, theta), Directions()
    for _ in range(iterations):
        if bool((g.abs().amax((1, 2)) <= tolerance * total).all()):
            break
        d = directions(g)
        along = logits(d)
        bend, lean = (decay * d * d).sum((1, 2)), (decay * theta * d).sum((1, 2))
        slope = (g * d).sum((1, 2))
        step = torch.where(slope < 0, -slope / (targets.curvature(p, along, weights) + bend).clamp_min(1e-30), 0.0)
        low, high = torch.zeros(P), torch.full((P,), torch.inf)
        for _ in range(10):
            p = targets.probabilities(torch.addcmul(z, along, step[:, None, None]))
            residual = (p - targets.values) * w
            rise = (residual * along).sum((1, 2)) + lean + step * bend
            steep = rise.abs() > 0.3 * slope.abs()
            if not bool(steep.any()):
                break
            low, high = torch.where(rise < 0, step, low), torch.where(rise > 0, step, high)
            newton = step - rise / (targets.curvature(p, along, weights) + bend).clamp_min(1e-30)
            middle = torch.where(high.isfinite(), (low + high) / 2, 2 * step)
            step = torch.where(steep, torch.where((newton > low) & (newton < high), newton, middle), step)
        move = step[:, None, None] * d
        if not bool(move.any()):
            break
        z, theta = torch.addcmul(z, along, step[:, None, None]), theta + move
        before, g = g, gradient(residual, theta)
        directions.add(move, g - before)
    return theta, z


@dataclass(frozen=True)
class Tuned:
    """A chosen strength, and the logits [m, C] that `rows` [m] got from models that had not seen them."""

    c: float
    rows: Tensor
    logits: Tensor
    start: Tensor
    """Mean parameters [1, K, D + 1] over the folds."""


def stratified_folds(y: Tensor, folds: int, seed: int) -> Tensor:
    """A fold number [n] for labels y [n] or [n, C]; each class (or number of labels) is spread evenly."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(derive(seed, "folds")))
    strata = y if y.ndim == 1 else y.sum(1)
    order = order[strata[order].argsort(stable=True)]
    fold = torch.empty(len(y), dtype=torch.int64)
    fold[order] = torch.arange(len(y)) % folds
    return fold


def choose_c(X: Tensor, y: Tensor, weights: Tensor, classes: int, scaling: Scaling, seed: int) -> Tuned:
    """The strength of GRID with the least weighted log-loss on held-out folds of the rows given.

    All strengths and folds are solved together while they are at most COLUMNS columns. With more classes, one
    fold is held out and strengths are tried from strong to weak regularisation until the loss rises. Beyond
    TUNING_ROWS rows a seeded sample is used.
    """
    rows = torch.arange(len(X))
    if len(X) > TUNING_ROWS:
        generator = torch.Generator().manual_seed(derive(seed, "rows"))
        rows = torch.randperm(len(X), generator=generator)[:TUNING_ROWS].sort().values
        X, y, weights = X[rows], y[rows], weights[rows]
    targets = Targets.of(y, classes)
    K, n = targets.values.shape
    folds = FOLDS if FOLDS * K <= COLUMNS else 1
    together = max(1, COLUMNS // (folds * K))
    held = stratified_folds(y, FOLDS, seed) == torch.arange(folds)[:, None]
    best: tuple[float, float, Tensor, Tensor] | None = None
    theta = torch.zeros(folds, 1, K, X.shape[1] + 1)
    for strengths in (GRID[i : i + together] for i in range(0, len(GRID), together)):
        P = folds * len(strengths)
        theta, z = minimise(
            X,
            targets,
            (weights * ~held).repeat_interleave(len(strengths), 0),
            torch.tensor(strengths).repeat(folds),
            scaling,
            start=theta[:, -1:].expand(-1, len(strengths), -1, -1).reshape(P, K, -1),
            tolerance=5e-3,
            iterations=15,
        )
        theta, z = theta.view(folds, len(strengths), K, -1), z.view(folds, len(strengths), K, n)
        unseen = (z * held[:, None, None]).sum(0)
        losses = (targets.losses(unseen) * weights * held.any(0)).sum(1)
        i = int(losses.argmin())
        if best is not None and float(losses[i]) >= best[0]:
            break
        best = float(losses[i]), strengths[i], unseen[i], theta[:, i].mean(0, keepdim=True)
    assert best is not None
    tested = held.any(0)
    return Tuned(best[1], rows[tested], targets.per_class(best[2][:, tested]).T, best[3])


@dataclass(frozen=True)
class Logistic:
    """Logits of features x [D] are weight [C, D] @ x + bias [C]; `tuned` when the strength c was chosen."""

    weight: Tensor
    bias: Tensor
    c: float
    tuned: Tuned | None


def logistic_regression(
    X: Tensor, y: Tensor, weights: Tensor, classes: int, *, c: float = 0.0, seed: int = 0, tolerance: float = 1e-4
) -> Logistic:
    """Fit features X [n, D] float32 to labels y [n] or [n, C], with strength c, or the best of GRID when c is 0."""
    if 2 * len(X) < X.shape[1]:
        return in_their_span(X, y, weights, classes, c=c, seed=seed, tolerance=tolerance)
    return solved(X, y, weights, classes, Scaling.of(X), c=c, seed=seed, tolerance=tolerance)


def in_their_span(X: Tensor, y: Tensor, weights: Tensor, classes: int, **how: Any) -> Logistic:
    """The same solution for fewer rows than features, which lies in the rows' span: with X = R Q, Q's n rows
    orthonormal, the penalty on W = V Q is that on V, and n columns are solved for instead of D."""
    scaling = Scaling.of(X)
    Q, R = torch.linalg.qr(((X - scaling.mean) * scaling.inverse).T)
    found = solved(R.T.contiguous(), y, weights, classes, Scaling(torch.zeros(len(X)), torch.ones(len(X))), **how)
    weight = found.weight @ Q.T * scaling.inverse
    return replace(found, weight=weight, bias=found.bias - weight @ scaling.mean)


def solved(
    X: Tensor, y: Tensor, weights: Tensor, classes: int, scaling: Scaling, *, c: float, seed: int, tolerance: float
) -> Logistic:
    targets = Targets.of(y, classes)
    tuned = None if c else choose_c(X, y, weights, classes, scaling, seed)
    strength = tuned.c if tuned else c
    theta, _ = minimise(
        X,
        targets,
        weights[None],
        torch.tensor([strength]),
        scaling,
        start=tuned.start if tuned else None,
        tolerance=tolerance,
    )
    weight = theta[0, :, :-1] * scaling.inverse
    bias = theta[0, :, -1] - weight @ scaling.mean
    return Logistic(targets.per_class(weight), targets.per_class(bias), strength, tuned)
