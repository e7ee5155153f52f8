"""What the loop tells while it runs. Events are plain dicts, so that they go to JSON as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Event = dict[str, Any]
"""`step` events: step, steps, epoch, loss, lr, examples_per_second. `epoch` events: epoch (1-based; a fraction when a
budget ended training inside one), step, train_loss, lr, seconds, and what validation measured (val_loss and
val_balanced_accuracy of classifiers). `message` events: message, one line that a person should see. The key `event`
says which."""

Listener = Callable[[Event], None]


@dataclass(frozen=True)
class TrainResult:
    """A trained module, on the CPU and in eval mode, and one `epoch` event per epoch."""

    model: Any
    history: list[Event] = field(default_factory=list)
    epochs_done: float = 0.0
    stopped_by_budget: bool = False


def silent(event: Event) -> None:
    """A listener that drops every event."""


def balanced_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Mean recall of the classes present in labels [n]. With labels [n, C]: mean over classes of the mean of recall
    and specificity, where both exist. In 0..1; NaN when nothing can be measured."""
    if labels.ndim == 2:
        right, positive = (logits > 0) == (labels > 0), labels > 0
        sides = [
            torch.stack([right[:, c][positive[:, c]].float().mean(), right[:, c][~positive[:, c]].float().mean()])
            for c in range(labels.shape[1])
        ]
        return float(torch.stack(sides).mean(1).nanmean())
    hit = (logits.argmax(1) == labels).float()
    recalls = [hit[labels == c].mean() for c in labels.unique()]
    return float(torch.stack(recalls).mean()) if recalls else float("nan")
