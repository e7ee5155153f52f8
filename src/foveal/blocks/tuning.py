"""What methods that train through a backbone put on it, and how fast the two learn."""

from __future__ import annotations

from typing import Any, Self

from torch import nn

from foveal.core.method import Classifier, Recipe, trainable


def zero_linear(width: int, classes: int) -> nn.Linear:
    """A linear layer [B, width] -> [B, classes] that starts with the same logit for every class, so that the first
    steps send no random gradient into what is below."""
    layer = nn.Linear(width, classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class SteadyClassifier(Classifier):
    """A classifier whose backbone stays in eval mode while the rest trains: no dropout, no drop-path, and batch
    statistics as they were pretrained."""

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.backbone.eval()
        return self


def two_speeds(model: Classifier, recipe: Recipe, multiplier: float) -> list[dict[str, Any]]:
    """Optimiser groups: the head learns `multiplier` times as fast as the rest; biases and norms do not decay."""
    groups: list[dict[str, Any]] = []
    for fresh in (False, True):
        rate = recipe.lr * (multiplier if fresh else 1.0)
        own = [parameter for name, parameter in trainable(model) if name.startswith("head.") == fresh]
        for vectors in (False, True):
            chosen = [parameter for parameter in own if (parameter.ndim <= 1) == vectors]
            groups.append({"params": chosen, "lr": rate, "weight_decay": 0.0 if vectors else recipe.weight_decay})
    return [group for group in groups if group["params"]]
