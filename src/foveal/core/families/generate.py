"""The generate family: images made or changed by a diffusion model, which is any function eps(x, t, c)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from foveal.core.errors import UsageError
from foveal.core.method import Method


@runtime_checkable
class Painter(Protocol):
    """What a method asks of a diffusion model: a noise predictor, its schedule, and conditions it understands.

    Attributes:
        alphas: cumulative products of 1 - beta [T], float64, falling; alphas[t] belongs to timestep t.
        empty: the condition that says nothing.
    """

    alphas: Tensor
    empty: Tensor

    def eps(self, x: Tensor, t: int, c: Tensor) -> Tensor:
        """The noise in x [B, C, h, w] at timestep t, under a condition of length B or 1."""
        ...


@dataclass(frozen=True)
class Edited:
    """An edit: what it made [B, C, h, w], and where it was allowed to, bool [B, 1, h, w]."""

    x: Tensor
    mask: Tensor


class Generate(Method):
    """A diffusion model + images + what they should show -> other images."""

    def edit(
        self, painter: Painter, x: Tensor, to: Tensor, source: Tensor, *, mask: Tensor | None = None, seed: int = 0
    ) -> Edited:
        """Change what `source` says into what `to` says, and leave the rest.

        Args:
            painter: a diffusion model; used, never changed.
            x: images, or their latents [B, C, h, w], as the painter knows them.
            to, source: conditions of length B or 1.
            mask: where to edit, bool [B, 1, h, w]; None: the method finds out.
        """
        raise UsageError(f"{self.name} edits no images")

    def evaluations(self, given_mask: bool = False) -> int:
        """How many times the noise predictor sees each image."""
        raise UsageError(f"{self.name} does not say how often it asks the noise predictor")
