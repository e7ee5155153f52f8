"""The robust family: a network and images nobody labelled -> an attack on it, or a network that is harder to fool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveal.core.errors import UsageError
from foveal.core.method import Trained


class Perturbation(nn.Module):
    """One change for all images: [B, 3, S, S] in [0, 1] -> (1 - mask) x + delta, clipped to [0, 1].

    Attributes:
        delta: [3, S, S], what is added.
        mask: [1, S, S] of 0 and 1, where the image itself is taken away (a patch); all 0 for a perturbation.
        budget: the largest change of a pixel that was allowed, as a share of the brightness range.
    """

    delta: Tensor
    mask: Tensor
    budget: Tensor

    def __init__(self, delta: Tensor, mask: Tensor, budget: float) -> None:
        super().__init__()
        self.register_buffer("delta", delta)
        self.register_buffer("mask", mask)
        self.register_buffer("budget", torch.tensor(float(budget)))

    def forward(self, images: Tensor) -> Tensor:
        return (images * (1 - self.mask) + self.delta).clamp(0, 1)

    @property
    def patch(self) -> bool:
        """Whether it hides a part of the image, rather than changing all of it a little."""
        return bool(self.mask.any())


class Robust(Trained):
    """A method that fools networks, or that makes one harder to fool.

    Images are always in [0, 1]; `foveal.backbones.wrapper` owns range, normalisation and eval mode.
    """

    def attack(self, encoder: Any, size: int) -> nn.Module:
        """What the loop trains against a frozen encoder: reads batches of `images` [B, 3, S, S], and no labels.

        Args:
            encoder: a `foveal.backbones.wrapper.Encoder`, images -> features [B, D]; nothing of it may change.
            size: S, the side of the images in pixels.
        """
        raise UsageError(f"{self.name} does not attack")

    def finish(self, model: nn.Module) -> Perturbation:
        """What `attack` became in training -> the change to make to images."""
        raise UsageError(f"{self.name} does not attack")

    def defend(self, model: Any) -> Any:
        """A model -> one that is harder to fool, as a copy."""
        raise UsageError(f"{self.name} does not defend")
