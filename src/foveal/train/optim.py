"""Optimiser and learning rate of a recipe."""

from __future__ import annotations

import math
from typing import Any

import torch

from foveal.core.method import Recipe


def make_optimizer(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum 0.9, over a method's parameter groups (each with its own lr and weight decay)."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def rate(step: int, steps: int, warmup: float) -> float:
    """Share of the full learning rate at a step: linear over the first `warmup` of all steps, then half a cosine.

    The first step has a positive rate and the last one nearly none: rate(steps) would be 0.
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> float:
    """Set every group's rate to `share` of its full one; the first group's new rate is returned."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * share
    return optimizer.param_groups[0]["lr"]
