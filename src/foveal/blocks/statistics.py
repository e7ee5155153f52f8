"""Streaming statistics of labelled features in float64, for heads in closed form.

Features [n, D] are read in chunks and never copied whole. Two blocks of statistics merge exactly, in any order
(Chan, Golub and LeVeque, 1979), so new classes and new images need no old ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.core.errors import DataError

CHUNK = 512


def chunks(rows: int, size: int = CHUNK) -> Iterator[slice]:
    """Slices that cover `rows` rows in order."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def check_rows(X: Tensor, y: Tensor, weights: Tensor, several: bool = True) -> int:
    """Number of classes of features X [n, D] with labels y [n] or [n, C] and weights [n].

    Raises:
        DataError: shapes disagree, a value is not finite, a weight is not positive, a class has no image, or
            images have several labels and `several` is False.
    """
    if X.ndim != 2 or not len(X) or len(y) != len(X) or weights.shape != (len(X),):
        raise DataError(
            f"features {tuple(X.shape)}, labels {tuple(y.shape)} and weights {tuple(weights.shape)} disagree: "
            "expected [n, D], [n] or [n, C], and [n] with n of at least 1"
        )
    if not all(bool(X[rows].isfinite().all()) for rows in chunks(len(X))):
        raise DataError("features hold NaN or infinity: remove those rows, or check the backbone's weights")
    if not bool((weights > 0).all()):
        raise DataError("weights must be positive, one per image")
    if y.ndim == 2:
        if not several:
            raise DataError("several labels per image: this method takes one; use linear or nn-revisit")
        return y.shape[1]
    if int(y.min()) < 0:
        raise DataError(f"labels must be 0, 1, ... but the smallest is {int(y.min())}")
    count = torch.bincount(y)
    if len(count) < 2:
        raise DataError("all images have one class: a classifier needs at least two")
    if not bool(count.all()):
        raise DataError(f"class {int((count == 0).nonzero()[0])} has no image: add one, or drop the class")
    return len(count)


@dataclass(frozen=True)
class ClassMoments:
    """Per class: summed weight [C], mean [C, D] and biased variance [C, D], in float64.

    A class without images has weight 0 and contributes nothing when merged.
    """

    weight: Tensor
    mean: Tensor
    variance: Tensor

    def merge(self, other: ClassMoments) -> ClassMoments:
        """Moments of both blocks together; commutative, and associative up to rounding."""
        weight = self.weight + other.weight
        safe = weight.clamp_min(torch.finfo(torch.float64).tiny)
        a, b = (self.weight / safe)[:, None], (other.weight / safe)[:, None]
        mean = a * self.mean + b * other.mean
        between = a * b * (self.mean - other.mean).square()
        return ClassMoments(weight, mean, a * self.variance + b * other.variance + between)


def class_moments(X: Tensor, y: Tensor | None = None, weights: Tensor | None = None, classes: int = 1) -> ClassMoments:
    """Moments of each class of features X [n, D] with labels y [n] (None: all one class) and weights [n] (None: 1)."""
    total: ClassMoments | None = None
    for rows in chunks(len(X)):
        block = X[rows].double()
        members = torch.zeros(classes, len(block), dtype=torch.float64)
        label = torch.zeros(len(block), dtype=torch.int64) if y is None else y[rows]
        value = torch.ones(len(block), dtype=torch.float64) if weights is None else weights[rows].double()
        members[label, torch.arange(len(block))] = value
        weight = members.sum(1)
        share = members / weight.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        mean = share @ block
        block = block - mean[label]
        part = ClassMoments(weight, mean, share @ block.square_())
        total = part if total is None else total.merge(part)
    assert total is not None
    return total
