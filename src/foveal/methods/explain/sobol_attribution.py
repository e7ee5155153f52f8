"""Sobol attribution (Fel et al., NeurIPS 2021, arXiv 2111.04138).

The image is cut into g x g cells, each shown with a strength m_i in [0, 1]; over random m the score varies, and a
cell's total-order Sobol index is the share of that variance that disappears when all other cells are held fixed,

    S_Ti = E[Var(f | m_~i)] / Var(f) = sum_j (f(A_j) - f(C^i_j))^2 / (2 N V),

Jansen's estimate from N quasi-random points A and the same points with column i replaced by B's. Interactions count:
a cell that matters only together with another is found. It needs scores and nothing else: no gradient, no layer, so
it explains an exported or remote model as well. N (g^2 + 1) images are scored.

Departures: B itself is not scored, as Jansen's estimate does not use it; overshoot of the bicubic enlargement below
zero is cut. Like the authors' code the points are not scrambled by default; the first point, all zeros in A, B and C,
then adds nothing to any index and something to V (`scramble=true` avoids it). V is the variance of f(A) alone, with
N - 1. Estimators other than Jansen's and masks over words are left out. Ours is `index=effect`: an index has no sign,
and at strengths drawn from all of [0, 1] most of the N contexts are scored near zero and say nothing. There a context
shows whole cells, three in four, C^i turns cell i over, and the map is the mean change of the score when the cell is
shown,

    e_i = E[f | m_i = 1] - E[f | m_i = 0],    S_i = p (1 - p) e_i^2 / V,

the first-order index S_i with its sign, by a root. On five photos it came with 296 passes to a lower deletion score
than the total-order index (1,184 passes), captum's occlusion at nine windows (842 at most) and RISE (2,000) ever did;
for the best scores of occlusion and RISE it took 0.9 and 0.6 of their passes (see the benchmarks).

When not to use it: when one forward pass must do (`eigen-cam`); for details finer than a cell; `index=total` to tell
what speaks for a class from what speaks against it; `index=effect` to find cells that matter only together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.quasirandom import SobolEngine

from foveal.core.errors import UsageError
from foveal.core.method import Explain, Spec, method
from foveal.core.options import option, options

BLUR = 10
"""Side of the box, in pixels, that `perturb=blur` averages over."""
SHOWN = 0.75
"""Share of the cells that a context of `index=effect` shows."""


def check_points(points: int, least: int) -> None:
    if points < least or points & (points - 1):
        near = 1 << max(1, points.bit_length() - 1)
        raise UsageError(f"points={points}: expected a power of two, such as {near}")


def design(cells: int, points: int, scramble: bool = False, seed: int = 0) -> Float[Tensor, "rows d"]:
    """Rows [N (d + 1), d] of strengths in [0, 1]: A, then C^1 to C^d, where C^i is A with B's column i.

    A and B are the halves of a 2d-dimensional Sobol sequence of N points.

    Raises:
        UsageError: N is not a power of two above 1, at which alone the sequence is balanced.
    """
    check_points(points, 2)
    drawn = SobolEngine(2 * cells, scramble=scramble, seed=seed).draw(points, dtype=torch.float64).float()
    A, B = drawn.split(cells, dim=1)
    C = A.repeat(cells, 1, 1)
    C.diagonal(dim1=0, dim2=2).copy_(B)
    return torch.cat([A, C.flatten(0, 1)])


def total_order(scores: Float[Tensor, " rows"], cells: int) -> Float[Tensor, " d"]:
    """Jansen's total-order indices [d] of the scores [N (d + 1)] of a `design`; float64, all zero without variance."""
    A, C = scores.double().unflatten(0, (cells + 1, -1)).tensor_split([1])
    variance = A.var(correction=1)
    rounding = 8 * torch.finfo(scores.dtype).eps * A.square().mean().sqrt()
    if variance <= rounding**2:
        return torch.zeros(cells, dtype=torch.float64, device=scores.device)
    return (A - C).square().sum(1) / (2 * A.shape[1] * variance)


def indices(
    score: Callable[[Float[Tensor, "b d"]], Float[Tensor, " b"]],
    cells: int,
    points: int,
    *,
    scramble: bool = False,
    seed: int = 0,
    batch: int = 1 << 16,
) -> Float[Tensor, " d"]:
    """Total-order indices [d] of any function of strengths [b, d] in [0, 1], from N (d + 1) values."""
    rows = design(cells, points, scramble, seed)
    return total_order(torch.cat([score(part) for part in rows.split(batch)]), cells)


def contexts(cells: int, points: int, seed: int = 0) -> Float[Tensor, "rows d"]:
    """Rows [N (d + 1), d] of zeros and ones: A, in which SHOWN of the cells are ones, then C^1 to C^d, where C^i is A
    with cell i turned over. A comes from a scrambled Sobol sequence: over its points each cell is shown as often.

    Raises:
        UsageError: N is not a power of two.
    """
    check_points(points, 1)
    drawn = SobolEngine(cells, scramble=True, seed=seed).draw(points, dtype=torch.float64)
    A = (drawn < SHOWN).float()
    C = A.repeat(cells, 1, 1)
    C.diagonal(dim1=0, dim2=2).copy_(1 - A)
    return torch.cat([A, C.flatten(0, 1)])


def effects(scores: Float[Tensor, " rows"], rows: Float[Tensor, "rows d"]) -> Float[Tensor, " d"]:
    """Mean change [d] of the scores of `contexts` when a cell is shown; float64."""
    A, C = scores.double().unflatten(0, (rows.shape[1] + 1, -1)).tensor_split([1])
    shown = rows[: A.shape[1]].T.double()
    return ((A - C) * (2 * shown - 1)).mean(1)


def cell_of_pixels(length: int, grid: int) -> Tensor:
    """The cell of each pixel of an axis [length] under nearest enlargement."""
    return torch.arange(length) * grid // length


def blurred(images: Float[Tensor, "B c H W"]) -> Float[Tensor, "B c H W"]:
    """Box blur of side BLUR; at the border the mean of what is inside."""
    before, after = BLUR // 2, BLUR - 1 - BLUR // 2
    ones = F.pad(torch.ones_like(images[:1, :1]), (before, after, before, after))
    total = F.avg_pool2d(F.pad(images, (before, after, before, after)), BLUR, stride=1)
    return total / F.avg_pool2d(ones, BLUR, stride=1)


@options
class Options:
    """What `sobol-attribution` can be told."""

    grid: int = option(8, "cells along each side (g)", ge=1, le=64)
    points: int = option(32, "points of the sequence (N), a power of two; N (g^2 + 1) images are scored", ge=1)
    index: Literal["total", "effect"] = option("total", "total-order, without a sign; or the signed first-order effect")
    perturb: Literal["neutral", "blur"] = option("neutral", "what a cell fades to: the neutral colour, or its blur")
    scramble: bool = option(False, "scramble the sequence by `seed`, as index=effect always does")
    seed: int = option(0, "of the scrambling", ge=0)


@method(
    Spec(
        family="explain",
        title="Sobol attribution",
        year=2021,
        arxiv="2111.04138",
        needs=frozenset(),
        tasks=("single-label", "multi-label"),
    ),
    Options,
)
class SobolAttribution(Explain):
    def passes(self) -> int:
        return self.options.points * (self.options.grid**2 + 1)

    @torch.no_grad()
    def explain(self, model: Any, images: Tensor, target: Tensor) -> Tensor:
        """
        Raises:
            UsageError: a grid larger than the image, or points that are no power of two.
        """
        chosen: Options = self.options
        height, width = images.shape[-2:]
        if chosen.grid > min(height, width):
            raise UsageError(
                f"grid={chosen.grid}: larger than the image, {height} x {width} pixels; choose fewer cells"
            )
        if chosen.index == "effect":
            rows = contexts(chosen.grid**2, chosen.points, chosen.seed).to(images)
        else:
            rows = design(chosen.grid**2, chosen.points, chosen.scramble, chosen.seed).to(images)
        faded = blurred(images) if chosen.perturb == "blur" else model.neutral.to(images).expand_as(images)
        down, across = (cell_of_pixels(length, chosen.grid).to(images.device) for length in (height, width))
        found: list[Tensor] = []
        for image, ground, wanted in zip(images, faded, target, strict=True):
            scores: list[Tensor] = []
            for part in rows.split(model.batch):
                strength = part.unflatten(1, (1, chosen.grid, chosen.grid))[:, :, down][:, :, :, across]
                shown = torch.lerp(ground, image, strength)
                scores.append(model.of(shown, wanted.expand(len(part))))
            all_scores = torch.cat(scores)
            signed = chosen.index == "effect"
            found.append(effects(all_scores, rows) if signed else total_order(all_scores, chosen.grid**2))
            if not found[-1].any():
                warnings.warn("the score does not change under the perturbation: the map is zero", stacklevel=2)
        cells = torch.stack(found).to(images).unflatten(1, (1, chosen.grid, chosen.grid))
        maps = F.interpolate(cells, (height, width), mode="bicubic")[:, 0]
        return maps if chosen.index == "effect" else maps.clamp_min(0)
