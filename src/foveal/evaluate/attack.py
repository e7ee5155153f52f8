"""What one change to all images does to a classifier, beside changes of the same size that know nothing of it.

An attack that is no better than noise of its own size has found no weakness: any change of that size fools the
model. Hence two rivals stand beside it. `noise` changes every value by the attack's largest change, up or down at
random, so that its norms are never below the attack's; `shuffled` is the attack with its pixels in another order,
with both norms equal. A patch's rivals fill the same square: with colours of 0 or 1 at random, and shuffled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveal.backbones.wrapper import check_budget, check_images
from foveal.core.errors import DataError
from foveal.core.families.robust import Perturbation
from foveal.core.seeds import generator

DRAWS = 2
SHARES = (0.0625, 0.125, 0.25, 0.5, 1.0)
BATCH = 32

Ask = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images [b, 3, S, S] in [0, 1] -> (answers [b] or [b, C], whether each was answered `unknown` [b])."""


def scaled(attack: Perturbation, share: float) -> Perturbation:
    """The same change, `share` times as large. A patch is not made smaller: it comes back as it is."""
    if attack.patch:
        return attack
    return Perturbation(attack.delta * share, attack.mask, float(attack.budget) * share)


def rivals(attack: Perturbation, draws: int = DRAWS, seed: int = 0) -> dict[str, list[Perturbation]]:
    """`noise` and `shuffled`, each `draws` times; see the top of this file."""
    found: dict[str, list[Perturbation]] = {"noise": [], "shuffled": []}
    where = np.flatnonzero(attack.mask.flatten().cpu().numpy()) if attack.patch else np.arange(attack.mask.numel())
    for draw in range(draws):
        rng = generator(seed, "rivals of an attack", draw)
        signs = torch.from_numpy(rng.choice([-1.0, 1.0], attack.delta.shape).astype(np.float32)).to(attack.delta)
        if attack.patch:
            noise = (signs + 1) / 2 * attack.mask
        else:
            noise = signs * attack.delta.abs().max()
        shuffled = attack.delta.flatten(1).clone()
        shuffled[:, where] = shuffled[:, rng.permutation(where)]
        for name, delta in (("noise", noise), ("shuffled", shuffled.view_as(attack.delta))):
            found[name].append(Perturbation(delta, attack.mask, float(attack.budget)))
    return found


def norms(attack: Perturbation) -> dict[str, float]:
    """`linf`, and `rms`: the root mean square over all values of an image, both as shares of the range."""
    return {"linf": float(attack.delta.abs().max()), "rms": float(attack.delta.square().mean().sqrt())}


@torch.no_grad()
def answers(ask: Ask, pixels: np.ndarray, change: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """What a model says of images uint8 [n, S, S, 3], changed or as they are.

    Raises:
        DataError: no images, or the change leaves [0, 1].
    """
    if not len(pixels):
        raise DataError("no images to measure an attack on")
    said, unknown = [], []
    for start in range(0, len(pixels), BATCH):
        images = torch.from_numpy(pixels[start : start + BATCH]).permute(0, 3, 1, 2).float() / 255
        images = change(images) if change else images
        check_images(images)
        answer, odd = ask(images)
        said.append(answer.cpu())
        unknown.append(odd.cpu())
    return torch.cat(said), torch.cat(unknown)


def figures(clean: Tensor, said: Tensor, unknown: Tensor, labels: Tensor | None) -> dict[str, float]:
    """Of answers [n] (or [n, C]): `fooled`, the share that is not what it was; `unknown`, the share answered
    `unknown`; `silent`, the share that changed and was not answered `unknown`; `accuracy`, where there are labels."""
    changed = differs(said, clean)
    row = {
        "fooled": float(changed.double().mean()),
        "unknown": float(unknown.double().mean()),
        "silent": float((changed & ~unknown).double().mean()),
    }
    if labels is not None:
        row["accuracy"] = float((~differs(said, labels)).double().mean())
    return row


def differs(a: Tensor, b: Tensor) -> Tensor:
    return (a != b) if a.ndim == 1 else (a != b).any(1)


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def sweep(
    ask: Ask,
    pixels: np.ndarray,
    labels: np.ndarray | None,
    attack: Perturbation,
    *,
    shares: Sequence[float] = SHARES,
    draws: int = DRAWS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """An attack at several sizes, each beside its rivals, and the images as they are.

    Args:
        pixels: uint8 [n, S, S, 3], images that the attack never saw.
        labels: [n] or [n, C], as the model's answers; None leaves accuracy out.
        shares: sizes, as shares of the attack's budget.
        draws: of each rival; their figures are averaged.
        progress: called with passes over the images, done and in all.

    Returns:
        `n`; `clean`: see `figures`; `sizes`: rows of `eps`, `attack`, `noise`, `shuffled`, each with `linf`, `rms` and
        the figures.

    Raises:
        UsageError: a budget for images of 0 to 255.
        DataError: no images.
    """
    check_budget(float(attack.budget) / 2)  # a patch may change a pixel wholly
    truth = None if labels is None else torch.from_numpy(labels)
    shares = (1.0,) if attack.patch else tuple(shares)
    passes, done = 1 + len(shares) * (1 + 2 * draws), 0

    def tell() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, passes)

    clean, odd = answers(ask, pixels)
    tell()

    def measured(change: Perturbation) -> dict[str, float]:
        said, unknown = answers(ask, pixels, change)
        tell()
        return {**norms(change), **figures(clean, said, unknown, truth)}

    sizes: list[dict[str, Any]] = []
    for share in shares:
        change = scaled(attack, share)
        others = rivals(change, draws, seed)
        sizes.append(
            {
                "eps": float(change.budget),
                "attack": measured(change),
                **{name: mean_of([measured(each) for each in drawn]) for name, drawn in others.items()},
            }
        )
    return {"n": len(pixels), "clean": figures(clean, clean, odd, truth), "sizes": sizes}


def margin(share: float, n: int) -> float:
    """Half the width of the 95% interval of a share measured on n images (Agresti and Coull 1998)."""
    p = (share * n + 2) / (n + 4)
    return 1.96 * math.sqrt(p * (1 - p) / (n + 4))
