"""The retrieve family: a backbone and images without labels -> an embedding in which alike images are near."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.core.errors import UsageError
from foveal.core.method import Trained


class Embedding(nn.Module):
    """Normalised images [B, 3, H, W] -> unit vectors [B, D]: a backbone, and what turns its features to the side.

    Similarity is the dot product.
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.head(self.backbone(images)), dim=1)


class Retrieve(Trained):
    """Backbone + images -> `Embedding`. Labels are never seen.

    What is learnt of the whole pool between epochs (clusters, neighbours) lives in buffers of the model, so that a run
    that was stopped goes on as it was.
    """

    def attach(self, backbone: Any, images: int) -> nn.Module:
        """Backbone and the number of images -> what is trained; `embed` and a buffer `looked` (the epoch before which
        `look` was last called, -1 at first) are its own.

        Raises:
            UsageError: options that so many images do not allow.
        """
        raise UsageError(f"{self.name} makes no embedding")

    def every(self) -> int:
        """Epochs between two looks at the whole pool."""
        return 1

    def look(self, model: Any, vectors: Tensor, seed: int) -> None:
        """Take in the pool as it is now: before training the backbone's own features [n, D], later its embedding.

        Raises:
            DataError: the images do not fall apart into enough groups.
        """

    def batches(self, model: Any, size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """The images of each batch of an epoch, as many batches in every one."""
        raise UsageError(f"{self.name} makes no embedding")

    def finish(self, model: Any) -> Embedding:
        """Trained model -> its embedding."""
        raise UsageError(f"{self.name} makes no embedding")
