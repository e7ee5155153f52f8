"""Weights as integers: codes, one scale per channel, and the way back to real numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveal.core.errors import FovealError


@dataclass(frozen=True, eq=False)
class Codes:
    """Integers whose products with their channel's scale are the weights.

    Attributes:
        values: integers of the weight's shape.
        scale: float32 [channels], positive.
        axis: of the channels.
    """

    values: NDArray[Any]
    scale: NDArray[np.float32]
    axis: int

    def decode(self) -> NDArray[np.float32]:
        return self.values.astype(np.float32) * along(self.scale, self.values.ndim, self.axis)

    @property
    def fits_int8(self) -> bool:
        """Whether an int8 kernel can hold the codes: all in -127..127."""
        return bool(np.abs(self.values, dtype=np.int64).max(initial=0) <= 127)


Quantizer = Callable[[NDArray[np.float32], int], Codes]
"""(weight, axis of its output channels) -> Codes. Weights that were made from codes get these codes back."""


def symmetric(weight: NDArray[np.float32], axis: int, levels: int = 127) -> Codes:
    """Uniform codes in -levels..levels, the largest weight of each channel at an end; 0 stays 0.

    Args:
        levels: 127 uses all of int8; 63 leaves room for processors that add pairs of products in 16 bits.

    Raises:
        FovealError: a weight that is not finite.
    """
    if not np.isfinite(weight).all():
        raise FovealError("a weight is NaN or infinite, which no integer can stand for: fit the model again")
    others = tuple(each for each in range(weight.ndim) if each != axis)
    largest = np.abs(weight).max(axis=others)
    empty = largest.max(initial=0) or float(levels)
    scale = (np.where(largest > 0, largest, empty) / levels).astype(np.float32)
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    values = np.rint(weight / along(scale, weight.ndim, axis)).clip(-levels, levels).astype(np.int8)
    return Codes(values, scale, axis)


def given(pairs: Iterable[tuple[NDArray[np.float32], Codes]], other: Quantizer) -> Quantizer:
    """A quantizer that gives weights made from codes these codes back, and leaves all others to `other`.

    Args:
        pairs: weights with their output channels first, and the codes whose products they are.
    """
    known = {weight.tobytes(): codes for weight, codes in pairs}

    def quantizer(weight: NDArray[np.float32], axis: int) -> Codes:
        first = np.ascontiguousarray(np.moveaxis(weight, axis, 0))
        if first.tobytes() not in known:
            return other(weight, axis)
        codes = known[first.tobytes()]
        return Codes(np.moveaxis(codes.values, 0, axis), codes.scale, axis)

    return quantizer


def along(scale: NDArray[Any], ndim: int, axis: int) -> NDArray[Any]:
    """One value per channel, shaped to multiply a weight of `ndim` axes."""
    return scale.reshape([-1 if each == axis else 1 for each in range(ndim)])
