"""What is done to an image before a backbone sees it. Plain data, stored in every Bundle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side to `resized` pixels, cut the central `size` x `size` square, then (x/255 - mean)/std."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    crop: float = 0.875

    @property
    def resized(self) -> int:
        return math.floor(self.size / self.crop)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> Preprocessing:
        fields: dict[str, Any] = {**stored, "mean": tuple(stored["mean"]), "std": tuple(stored["std"])}
        return Preprocessing(**fields)
