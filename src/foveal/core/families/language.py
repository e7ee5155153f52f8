"""The language family: images and the texts that describe them -> two towers into one space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from foveal.core.errors import UsageError
from foveal.core.method import Trained


class Language(Trained):
    """Backbone + image-text pairs -> a module with `encode_images`, `encode_texts` and `classifier`.

    The module keeps its image tower as `image` (a Backbone) and its language tower as `text`; all it learns is in its
    parameters and buffers.
    """

    def tower(self) -> Any:
        """The language tower to start from (a `foveal.backbones.text.TextTower`), pretrained or new.

        Raises:
            MissingExtra: its weights are not installed.
        """
        raise UsageError(f"{self.name} has no language tower")

    def attach(self, backbone: Any, text: Any) -> nn.Module:
        """Both towers -> what is trained. They belong to it from here on."""
        raise UsageError(f"{self.name} does not learn from pairs")

    def crop(self) -> tuple[float, float]:
        """Which share of an image's area a training view shows, from and to; never mirrored, for texts say left."""
        return (1.0, 1.0)

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss of one batch: 'loss', and any parts worth plotting.

        `batch` has images [B, 3, S, S] (normalised), and ids [B, L] and mask [B, L] of one text of each.
        """
        raise UsageError(f"{self.name} does not learn from pairs")
