"""From the feature maps of a backbone, coarse ones and fine, to maps at one fine stride."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, int, int]
"""Channels, height, width."""


def useful(shapes: Sequence[Shape], size: tuple[int, int]) -> list[int]:
    """Which feature maps to read, coarsest first: of each size the deepest, none with more cells than `size` (h, w).

    A plain ViT, whose maps all have one size, gives its last; a pyramid one of each stage.
    """
    deepest = {shape[1:]: place for place, shape in enumerate(shapes)}
    kept = [(h * w, place) for (h, w), place in deepest.items() if h <= size[0] and w <= size[1]]
    return [place for _, place in sorted(kept)] or [len(shapes) - 1]


class Upsample(nn.Module):
    """Feature maps -> maps [B, outputs, h, w]: each is brought to one width, and from the coarsest on every step
    doubles the size (bilinear, pixel centres kept), adds the feature map of that size if there is one, and convolves.

    Args:
        shapes: of every feature map that `forward` will be given.
        size: height and width of the answer.
    """

    def __init__(self, shapes: Sequence[Shape], size: tuple[int, int], outputs: int, width: int = 64) -> None:
        super().__init__()
        self.read = useful(shapes, size)
        chosen = [shapes[place] for place in self.read]
        self.sizes = [chosen[0][1:]]
        while self.sizes[-1] != size:
            height, wide = self.sizes[-1]
            self.sizes.append((min(2 * height, size[0]), min(2 * wide, size[1])))
        joins = {self.nearest(shape): place for place, shape in enumerate(chosen)}
        self.joins = [joins.get(step) for step in range(len(self.sizes))]
        self.lateral = nn.ModuleList(convolution(channels, width, 1) for channels, _, _ in chosen)
        self.steps = nn.ModuleList(convolution(width, width, 3) for _ in self.sizes)
        self.answer = nn.Conv2d(width, outputs, 1)
        nn.init.normal_(self.answer.weight, std=1e-3)
        nn.init.zeros_(self.answer.bias)  # pyright: ignore[reportArgumentType]

    def nearest(self, shape: Shape) -> int:
        """The step whose size is closest to that of a feature map."""
        return min(range(len(self.sizes)), key=lambda step: abs(self.sizes[step][0] - shape[1]))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x: Tensor | None = None
        for size, join, step in zip(self.sizes, self.joins, self.steps, strict=True):
            if x is not None:
                x = F.interpolate(x, size, mode="bilinear")
            if join is not None:
                side = self.lateral[join](maps[self.read[join]])
                side = side if side.shape[-2:] == size else F.interpolate(side, size, mode="bilinear")
                x = side if x is None else x + side
            x = step(x)
        return self.answer(x)


def convolution(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(True)
    )
