"""Pretraining: a backbone and images without labels -> a better backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foveal.core.errors import UsageError
from foveal.core.method import Trained


@dataclass(frozen=True)
class Views:
    """How a method wants to see an image: `count` random views, each drawn for itself.

    A view is a crop of a share of the area within `area`, of ratio 3/4 to 4/3, resized to the backbone's square;
    mirrored half of the time if `mirror`; brightness, contrast and colour times 1 - `colour` to 1 + `colour`.
    """

    count: int = 1
    area: tuple[float, float] = (0.67, 1.0)
    mirror: bool = True
    colour: float = 0.0


class Pretrain(Trained):
    """Backbone + images -> better backbone. Labels are never seen."""

    def views(self) -> Views:
        """How images are shown; `batch["views"]` in `loss` is [B, views().count, 3, S, S], normalised."""
        return Views()

    def attach(self, backbone: Any) -> nn.Module:
        """Backbone -> what is trained: the backbone itself, and whatever the loss needs beside it.

        Raises:
            BackboneError: the method cannot work on this backbone.
        """
        raise UsageError(f"{self.name} does not pretrain")

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss of one batch: 'loss', any parts worth plotting, and, where there is one, 'blank': the loss of a model
        that tells nothing (predicts zero), which learning must undercut."""
        raise UsageError(f"{self.name} does not pretrain")

    def finish(self, model: Any) -> Any:
        """Trained model -> its backbone, under the names it came with and with every parameter trainable."""
        return model.backbone.requires_grad_(True)

    def pictures(self, model: Any, images: Tensor) -> dict[str, Tensor]:
        """What the trained model makes of normalised images [B, 3, S, S], as pictures of that shape under a caption
        each; empty where there is nothing to look at."""
        return {}
