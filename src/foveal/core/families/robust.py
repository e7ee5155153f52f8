"""The robust family: a network and images nobody labelled -> an attack on it, what a look inside finds, or a network
that is harder to fool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
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


@dataclass(frozen=True)
class Section:
    """A part of an examination's page: a table, pictures, lines, or some of them.

    Attributes:
        columns: key in a row -> heading.
        pictures: caption -> pixels uint8 [H, W, 3].
        lines: key in a row -> what it is; at most three, drawn over the number of the row, where a row has it.
        measure: what is drawn upwards.
    """

    title: str
    about: str
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    rows: Sequence[Mapping[str, Any]] = ()
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    lines: Mapping[str, str] = field(default_factory=dict[str, str])
    measure: str = ""


@dataclass(frozen=True)
class Examination:
    """What a look inside a network found.

    Attributes:
        good: whether nothing was found that should be changed.
        verdict: one or two sentences.
        findings: what deserves attention, the most important first.
        tiles: name -> the few numbers on top.
        numbers: every number, as JSON holds it: finite or None.
        tensors: what may be used further, by name.
    """

    good: bool
    verdict: str
    findings: Sequence[str]
    tiles: Mapping[str, Any]
    sections: Sequence[Section]
    numbers: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class Robust(Trained):
    """A method that fools networks, looks into one, or makes one harder to fool.

    Images are always in [0, 1]; `foveal.backbones.wrapper` owns range, normalisation and eval mode.
    """

    def attack(self, encoder: Any, size: int) -> nn.Module:
        """What the loop trains against a frozen encoder: reads batches of `images` [B, 3, S, S], and no labels.

        Args:
            encoder: a `foveal.backbones.wrapper.Encoder`, images -> features [B, D]; nothing of it may change.
            size: S, the side of the images in pixels.
        """
        raise UsageError(f"{self.name} does not attack: `examine` is what it has")

    def finish(self, model: nn.Module) -> Perturbation:
        """What `attack` became in training -> the change to make to images."""
        raise UsageError(f"{self.name} does not attack")

    def examine(self, model: Any, images: Tensor, seed: int) -> Examination:
        """What a look inside a network finds; nothing of it may change.

        Args:
            model: a `foveal.backbones.wrapper.OpenModel`.
            images: [N, 3, S, S] in [0, 1], of the kind it is used on; their labels are not asked for.
        """
        raise UsageError(f"{self.name} examines nothing: it attacks")

    @classmethod
    def examines(cls) -> bool:
        """Whether it looks inside a network instead of attacking it."""
        return cls.examine is not Robust.examine

    def defend(self, model: Any) -> Any:
        """A model -> one that is harder to fool, as a copy."""
        raise UsageError(f"{self.name} does not defend")
