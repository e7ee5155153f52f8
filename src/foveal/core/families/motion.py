"""The motion family: where something was, and a picture of what is around it -> where it may go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foveal.core.errors import UsageError
from foveal.core.method import Trained

MAP_SIDE = 64
"""Pixels of a map as networks see it."""


class Motion(Trained):
    """Windows of tracks, with a map each or without -> a network of K possible futures and how likely each is.

    Positions are in the agent's own frame: the last observed one is (0, 0), and the way it last moved is +x.
    """

    def window(self) -> tuple[int, int]:
        """(H, T): how many steps before the last observed one are read, and how many after it are forecast."""
        raise UsageError(f"{self.name} forecasts no motion")

    def attach(self, maps: bool, scale: float) -> nn.Module:
        """An untrained network: past [B, H + 1, 2], maps [B, 3, S, S] in 0..1 (or None) -> futures [B, K, T, 2] and
        their probabilities [B, K]. Random numbers come from torch's global generator.

        Args:
            maps: whether each window comes with a map.
            scale: length of a usual step, in the data's unit; the network's state keeps it.

        Raises:
            UsageError: the method cannot do without maps.
        """
        raise UsageError(f"{self.name} forecasts no motion")

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss of one batch: 'loss', and any parts worth plotting.

        `batch` has past [B, H + 1, 2], future [B, T, 2] and, when the network reads maps, maps [B, 3, S, S] in 0..1.
        """
        raise UsageError(f"{self.name} has no loss")

    def forecast(self, model: Any, past: Tensor, maps: Tensor | None) -> tuple[Tensor, Tensor]:
        """Futures [B, K, T, 2], the most likely first, and their probabilities [B, K], in falling order."""
        modes, weights = model(past, maps)
        order = weights.sort(dim=1, descending=True, stable=True).indices
        return modes.gather(1, order[..., None, None].expand_as(modes)), weights.gather(1, order)


def as_planes(maps: Tensor) -> Tensor:
    """uint8 [b, S, S, 3] -> [b, 3, S, S] in 0..1."""
    return maps.permute(0, 3, 1, 2).to(torch.float32) / 255
