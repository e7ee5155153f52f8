"""The dense family: one map for each thing asked for, at a place in the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from foveal.core.errors import UsageError
from foveal.core.method import Trained


class Dense(Trained):
    """Backbone + images with known points -> a network of maps, and a rule that reads points off them.

    Points follow one convention everywhere: the centre of the pixel in column i and row j is (x, y) = (i, j).
    """

    def attach(self, backbone: Any, outputs: int) -> nn.Module:
        """Backbone -> trainable network: normalised images [B, 3, S, S] -> one map per output [B, K, h, w].

        The module's state is parameters and buffers only; `backbone` belongs to it from here on.
        """
        raise UsageError(f"{self.name} makes no maps")

    def views(self) -> int:
        """How many views of each image a batch holds: 1, or 2 when the loss compares an image with a moved copy."""
        return 1

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss of one batch: 'loss', and any parts worth plotting.

        `batch` has images [B, 3, S, S], points [B, K, 2] in their pixels and known [B, K] (labelled and inside). With
        two views also view, view_points and view_known of the moved copies; matrix [B, 3, 3], from the points of an
        image to those of its copy; and order [B, K]: output k of the image is output order[k] of the copy, since
        mirroring makes left right.
        """
        raise UsageError(f"{self.name} has no loss")

    def decode(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Maps [B, K, h, w] -> points [B, K, 2] in cells of the maps, and how sure each is [B, K], in 0..1."""
        raise UsageError(f"{self.name} reads no points")

    def read(self, maps: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Maps [B, K, h, w] of images of `size` (height, width) -> points [B, K, 2] in their pixels, and how sure each
        is [B, K]."""
        cells, sure = self.decode(maps)
        stride = cells.new_tensor([int(size[axis]) / int(maps.shape[2 + axis]) for axis in (1, 0)])
        return (cells + 0.5) * stride - 0.5, sure

    def locate(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [B, 3, S, S] -> points [B, K, 2] in their pixels, and how sure each is [B, K]."""
        return self.read(model(images), (images.shape[-2], images.shape[-1]))
