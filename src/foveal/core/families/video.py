"""Video: backbone + labelled clips -> a classifier of clips."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from foveal.core.errors import UsageError
from foveal.core.method import Trained


class ClipClassifier(nn.Module, ABC):
    """Clips [B, T, 3, H, W], normalised -> logits [B, C]: `head` reads what `features` makes of a clip.

    Attributes:
        frames: T, the only length of a clip that it takes.
    """

    def __init__(self, frames: int, head: nn.Module) -> None:
        super().__init__()
        self.frames = frames
        self.head = head

    @abstractmethod
    def features(self, clips: Tensor) -> Tensor:
        """Clips [B, T, 3, H, W] -> features [B, D], what the head reads."""

    def forward(self, clips: Tensor) -> Tensor:
        """
        Raises:
            UsageError: clips of another number of frames.
        """
        if clips.ndim != 5 or clips.shape[1] != self.frames:
            raise UsageError(f"clips of shape {tuple(clips.shape)}: expected [B, {self.frames}, 3, H, W]")
        return self.head(self.features(clips))


class Video(Trained):
    """Backbone + labelled clips -> clip classifier.

    A batch has clips [B, T, 3, H, W] (normalised), labels [B] and class_weights [C].
    """

    def attach(self, backbone: Any, classes: Sequence[str]) -> ClipClassifier:
        """Backbone -> trainable classifier of clips. `backbone` belongs to it from here on."""
        raise UsageError(f"{self.name} makes no clip classifier")

    def sample(self, count: int, at: float | np.random.Generator) -> np.ndarray:
        """Which frames of a clip of `count` the classifier sees: numbers [T].

        Args:
            at: the moment within each frame's share of the clip, 0 to 1, or a generator to draw it from.
        """
        raise UsageError(f"{self.name} does not say which frames it looks at")
