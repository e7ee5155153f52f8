"""Scores of heat maps that cannot flatter: deletion, insertion and the pointing game, beside maps that know nothing.

Deletion hides an image cell by cell, from the cell a map puts first, and averages the score over the way: the lower,
the sooner the map finds what the answer rests on. Insertion shows the cells of an empty image in the same order: the
higher the better (Petsiuk et al. 2018, arXiv 1806.07421). All maps are averaged over the same cells first, so that a
smooth map and a ragged one are judged alike; cells that tie are taken at random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foveal.core.errors import DataError
from foveal.core.seeds import generator

CELLS, STEPS, DRAWS, BATCH = 8, 16, 3, 32


@dataclass(frozen=True)
class Curves:
    """Scores [steps + 1], from nothing hidden (or shown) to everything. Deletion should fall fast, insertion rise."""

    deletion: Tensor
    insertion: Tensor

    def areas(self) -> dict[str, float]:
        """Area under each curve over the share of cells, in units of the score."""
        return {name: float(torch.trapezoid(curve) / (len(curve) - 1)) for name, curve in vars(self).items()}


def follow(
    score: Callable[[Tensor], Tensor],
    image: Tensor,
    maps: Mapping[str, Tensor],
    neutral: Tensor,
    *,
    cells: int = CELLS,
    steps: int = STEPS,
    batch: int = BATCH,
    seed: int = 0,
) -> dict[str, Curves]:
    """Deletion and insertion curves of several maps of one image.

    Args:
        score: images [b, 3, H, W] -> the explained class's scores [b].
        image: [3, H, W].
        maps: each [H, W], finite, the higher the more a pixel matters.
        neutral: [3, 1, 1] or [3, H, W], what a hidden cell becomes.
        cells: along each side.
        steps: equal shares in which the cells are hidden or shown; at most cells^2.
        batch: images that exist at once.

    Raises:
        DataError: a map of another size than the image, or with NaN.
    """
    height, width = image.shape[-2:]
    steps = min(steps, cells**2)
    down, across = (torch.arange(length) * cells // length for length in (height, width))
    ranks = torch.stack([ranking(checked(name, each, image), cells, seed) for name, each in maps.items()])
    passed = torch.tensor([round(step * cells**2 / steps) for step in range(1, steps)])
    hidden = ranks[:, None] < passed[:, None]  # [maps, steps - 1, cells^2]
    shown = torch.cat([(~hidden).flatten(0, 1), hidden.flatten(0, 1)]).unflatten(1, (cells, cells))
    ends = torch.ones(2, cells, cells, dtype=torch.bool)
    ends[1] = False
    found: list[Tensor] = []
    for part in torch.cat([shown, ends]).split(batch):
        pixels = part[:, down][:, :, across][:, None].to(image.device)
        found.append(score(torch.where(pixels, image, neutral.to(image))).detach().double().cpu())
    scores = torch.cat(found)
    whole, empty = scores[-2:]
    inner = scores[:-2].reshape(2, len(maps), steps - 1)
    return {
        name: Curves(
            torch.cat([whole[None], inner[0, place], empty[None]]),
            torch.cat([empty[None], inner[1, place], whole[None]]),
        )
        for place, name in enumerate(maps)
    }


def passes(maps: int, cells: int = CELLS, steps: int = STEPS) -> int:
    """How many images `follow` scores for one."""
    return 2 * maps * (min(steps, cells**2) - 1) + 2


def checked(name: str, map: Tensor, image: Tensor) -> Tensor:
    if map.shape != image.shape[-2:]:
        raise DataError(f"map '{name}' is {tuple(map.shape)}, the image {tuple(image.shape[-2:])}: expected one size")
    if not torch.isfinite(map).all():
        raise DataError(f"map '{name}' holds NaN or infinite values")
    return map


def ranking(map: Tensor, cells: int, seed: int = 0) -> Tensor:
    """The place of each cell [cells^2] when they are taken from the highest mean of a map [H, W] on."""
    means = map.double().cpu()
    for axis in (0, 1):
        length = means.shape[axis]
        member = torch.zeros(cells, length, dtype=torch.float64)
        member[torch.arange(length) * cells // length, torch.arange(length)] = 1
        average = member / member.sum(1, keepdim=True).clamp_min(1)
        means = average @ means if axis == 0 else means @ average.T
    tie = generator(seed, "ties").permutation(cells**2)
    order = np.lexsort((tie, -means.flatten().numpy()))
    return torch.from_numpy(np.argsort(order))


def rivals(
    size: tuple[int, int], *, features: Tensor | None = None, cells: int = CELLS, draws: int = DRAWS, seed: int = 0
) -> dict[str, Tensor]:
    """Maps [H, W] that know nothing of the class, to stand beside one that should.

    Args:
        features: [C, h, w] of some layer, for the length of its channels at each position ('channel-norm').
        draws: how many orders at random ('random-0', ...).
    """
    height, width = size
    rng = generator(seed, "rivals", height, width)
    found: dict[str, Tensor] = {}
    for draw in range(draws):
        values = torch.from_numpy(rng.permutation(cells**2).astype(np.float32)).reshape(cells, cells)
        rows, columns = (torch.arange(length) * cells // length for length in size)
        found[f"random-{draw}"] = values[rows][:, columns]
    y, x = (torch.linspace(-1, 1, length) for length in size)
    found["centre"] = -torch.hypot(y[:, None], x[None])
    if features is not None:
        length = features.detach().float().norm(dim=0)[None, None].cpu()
        found["channel-norm"] = torch.nn.functional.interpolate(length, size, mode="bilinear")[0, 0]
    return found


def judge(
    score: Callable[[Tensor], Tensor],
    image: Tensor,
    map: Tensor,
    neutral: Tensor,
    *,
    features: Tensor | None = None,
    batch: int = BATCH,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Areas under the deletion and insertion curves of a map [H, W] ('map'), of orders at random (their mean,
    'random'), of the centre ('centre') and, given `features` [C, h, w], of their length ('channel-norm')."""
    others = rivals((map.shape[0], map.shape[1]), features=features, seed=seed)
    curves = follow(score, image, {"map": map, **others}, neutral, batch=batch, seed=seed)
    areas = {name: each.areas() for name, each in curves.items()}
    drawn = [areas.pop(name) for name in list(areas) if name.startswith("random-")]
    random = {key: sum(each[key] for each in drawn) / len(drawn) for key in ("deletion", "insertion")}
    return {"map": areas.pop("map"), "random": random, **areas}


def pointing_hits(maps: Tensor, truth: Tensor) -> Tensor:
    """The pointing game (Zhang et al. 2018): whether each map's highest pixel lies on the object, [B] in 0..1.

    Where several pixels are highest, the share of them on the object; a flat map so gets the object's share of the
    image, and no more.

    Args:
        maps: [B, H, W].
        truth: bool [B, H, W].
    """
    top = maps == maps.amax((1, 2), keepdim=True)
    return (top & truth).sum((1, 2)) / top.sum((1, 2))


def overlap(first: Tensor, second: Tensor, threshold: float = 0.5) -> Tensor:
    """Intersection over union [B] of what lies above `threshold` of the maximum in two sets of maps [B, H, W]."""
    a, b = (maps > threshold * maps.amax((1, 2), keepdim=True) for maps in (first, second))
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp_min(1)
