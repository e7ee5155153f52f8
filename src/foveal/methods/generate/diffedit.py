"""DiffEdit (Couairon, Verbeek, Schwenk and Cord, ICLR 2023, arXiv 2210.11427).

Change a picture by saying what it should show, with no mask drawn. The mask is where a diffusion model's idea of the
noise depends on which of two texts it is told; then DDIM, run backwards without a text, gives the picture's own noise,
and forwards with the new text edits it, the old picture's noisy versions x_t put back outside of the mask M:

    D = mean_i |eps(x_t^i, t, Q) - eps(x_t^i, t, R)|,   M = D / (3 mean D) > 1/2,   y_t <- M y_t + (1 - M) x_t.

Needs any diffusion model that predicts noise from x, t and a condition, of pixels or of latents, and nothing is
trained. Outside of the mask the latent comes back bit for bit. `start=noise` in place of the backward run is SDEdit; a
mask of ones everywhere encodes and decodes.

Where we depart from the paper: extreme differences are cut at three times the mean, and the cut is the 1 that the
threshold is a share of, as diffusers does; the paper says only that they are removed, and without it the mask is lost.
The backward run is without a text, as in the paper (diffusers' pipeline runs it with one). Levels are paired by what is
reached, so the last step puts x_0 back.

When not to use it: to add something where the picture shows nothing that differs between the texts; to change the
pose or layout of the whole picture; with models that predict velocities or images, or sample with fresh noise.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveal.blocks.diffusion import Eps, alpha, backwards, forwards, guided, noisy, timestep
from foveal.core.errors import UsageError
from foveal.core.families.generate import Edited, Generate, Painter
from foveal.core.method import Spec, method
from foveal.core.options import option, options

CLIP = 3.0
"""Differences are cut at this many times their mean."""


def contrast(
    eps: Eps,
    alphas: Tensor,
    x0: Float[Tensor, "B C h w"],
    to: Tensor,
    source: Tensor,
    maps: int,
    noise: float,
    seed: int,
) -> Float[Tensor, "B h w"]:
    """Mean over `maps` noises and all channels of |eps(x_t, t, to) - eps(x_t, t, source)|, the same noise for both.

    Args:
        noise: t as a share of the schedule.
    """
    rng = torch.Generator().manual_seed(seed)
    level, steps = round(noise * len(alphas)), len(alphas)
    a, t = alpha(alphas, level, steps), timestep(level, steps, steps)
    total = x0.new_zeros(x0[:, 0].shape)
    for _ in range(maps):
        x = noisy(x0, torch.randn(x0.shape, generator=rng, dtype=x0.dtype).to(x0), a)
        total += (eps(x, t, to) - eps(x, t, source)).abs().mean(1)
    return total / maps


def thresholded(difference: Float[Tensor, "B h w"], threshold: float) -> Bool[Tensor, "B 1 h w"]:
    """Where a difference, cut at CLIP times its image's mean and divided by that, is above the threshold.

    No difference at all is an empty mask.
    """
    most = CLIP * difference.mean((1, 2), keepdim=True)
    level = torch.where(most > 0, difference.minimum(most) / torch.where(most > 0, most, 1.0), 0.0)
    return (level > threshold)[:, None]


@options
class Options:
    """What `diffedit` can be told."""

    strength: float = option(0.5, "how far the picture is noised before it is made anew, as a share", gt=0, le=1)
    steps: int = option(50, "DDIM steps of the whole way; strength of them are taken", ge=1, le=1000)
    guidance: float = option(7.5, "weight of the new text; 1 is none, 5 suits models of classes", ge=0, le=100)
    maps: int = option(10, "noises that the mask is a mean over", ge=1, le=1000)
    mask_noise: float = option(0.5, "noise at which the two texts are compared, as a share", gt=0, le=1)
    threshold: float = option(0.5, "of the mask, as a share of three times the mean difference", ge=0, lt=1)
    start: Literal["ddim", "noise"] = option(
        "ddim", "what is made anew: the picture run backwards, or plus fresh noise"
    )


@method(
    Spec(family="generate", title="DiffEdit", year=2023, arxiv="2210.11427", needs=frozenset({"text"}), tasks=()),
    Options,
)
class Diffedit(Generate):
    @torch.no_grad()
    def edit(
        self, painter: Painter, x: Tensor, to: Tensor, source: Tensor, *, mask: Tensor | None = None, seed: int = 0
    ) -> Edited:
        """
        Raises:
            UsageError: a mask of another size.
        """
        chosen = self.options
        if mask is None:
            found = contrast(painter.eps, painter.alphas, x, to, source, chosen.maps, chosen.mask_noise, seed)
            mask = thresholded(found, chosen.threshold)
        shape = (len(x), 1, *x.shape[-2:])
        if mask.shape != shape:
            raise UsageError(f"the mask has shape {tuple(mask.shape)}, expected {shape}: one value for each cell")
        if not mask.any():
            warnings.warn(
                "the mask is empty: the model sees no difference between the two texts here, and the picture is left "
                "as it is; say more, lower the threshold or give a mask",
                stacklevel=2,
            )
            return Edited(x.clone(), mask)
        level = max(1, round(chosen.strength * chosen.steps))
        kept = self.levels(painter, x, level, seed)
        made = forwards(
            guided(painter.eps, chosen.guidance, painter.empty), painter.alphas, kept[-1], to, chosen.steps, level,
            lambda y, reached: torch.where(mask, y, kept[reached]),
        )  # fmt: skip
        return Edited(made, mask)

    def levels(self, painter: Painter, x: Tensor, level: int, seed: int) -> list[Tensor]:
        """The picture at each level of noise from 0 to `level`: run backwards, or with one fresh noise (SDEdit)."""
        steps = self.options.steps
        if self.options.start == "ddim":
            return backwards(painter.eps, painter.alphas, x, painter.empty, steps, level)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype).to(x)
        return [x, *(noisy(x, noise, alpha(painter.alphas, k, steps)) for k in range(1, level + 1))]

    def evaluations(self, given_mask: bool = False) -> int:
        chosen = self.options
        level = max(1, round(chosen.strength * chosen.steps))
        return (0 if given_mask else 2 * chosen.maps) + level * ((chosen.start == "ddim") + 1 + (chosen.guidance != 1))
