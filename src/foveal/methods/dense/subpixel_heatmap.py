"""Subpixel heatmap regression (Bulat, Sanchez and Tzimiropoulos, BMVC 2021, arXiv 2111.02360).

A network answers one map for each landmark. The map is taught as a Gaussian around the landmark's true place, never
rounded to a cell, with a peak of 1; the answer is read near the highest cell p* by a softmax over a d x d window W,

    H(i, j) = exp(-((i - x)^2 + (j - y)^2) / (2 sigma^2)),    place = p* + sum_W softmax(tau H(W)) (i - p*_x, j - p*_y),

so that nothing is lost to the size of a cell: rounding alone costs 0.38 cells, 1.5 pixels at stride 4. A second,
turned, scaled and mirrored view of each image goes through the same network; its maps, turned back, must agree.
Needs images with points and a backbone with a feature map: pyramids and plain ViTs both serve.

Where we depart from the paper: any backbone with a small upsampler stands for the stacked hourglass. The Gaussian's
peak is 1 (with the density's 1 / (2 pi sigma^2) the softmax is nearly flat and the reading falls back to the cell), a
window that crosses the border is cut, not filled with zeros that pull inwards, and sigma is 2 cells, where sigma,
d = 5 and tau = 10 agree best. The loss on the maps is the squared error, summed over cells; AdamW with warm-up.

When not to use it: when one pixel more or less does not matter and images are small, regression of the coordinates
from pooled features is cheaper; when the number of points varies, this is detection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from foveal.blocks.upsample import Upsample
from foveal.core.errors import DataError, UsageError
from foveal.core.families.dense import Dense
from foveal.core.method import Spec, method
from foveal.core.options import option, options
from foveal.data.geometry import resample, resizing

STRIDE = 4
"""Pixels of the image to a cell of the maps, each way."""


def encode(points: Shaped[Tensor, "*B 2"], size: tuple[int, int], sigma: float) -> Float[Tensor, "*B h w"]:
    """Maps of `size` (h, w) with a Gaussian of peak 1 around each point (x, y) in cells; zeros for a point outside.

    Raises:
        DataError: points that are no floats, or not finite.
        UsageError: sigma below half a cell.
    """
    if not points.is_floating_point():
        raise DataError(f"points came as {points.dtype}, expected floats: rounding them is what this method avoids")
    if not bool(torch.isfinite(points).all()):
        raise DataError("a point is NaN or infinite: leave unlabelled points out by the mask, with any finite place")
    check_sigma(sigma)
    h, w = size
    x, y = points[..., 0, None], points[..., 1, None]
    across = torch.exp(-((torch.arange(w, device=points.device) - x).square()) / (2 * sigma**2))
    down = torch.exp(-((torch.arange(h, device=points.device) - y).square()) / (2 * sigma**2))
    return down[..., :, None] * across[..., None, :] * within(points, size)[..., None, None]


def within(points: Float[Tensor, "*B 2"], size: tuple[int, int]) -> Bool[Tensor, "*B"]:
    """Whether each point (x, y) lies on a map of `size` (h, w), whose cells reach half a cell beyond their centres."""
    limit = points.new_tensor([size[1], size[0]]) - 0.5
    return ((points >= -0.5) & (points <= limit)).all(-1)


def decode(
    maps: Float[Tensor, "*B h w"], window: int = 5, tau: float = 10.0
) -> tuple[Float[Tensor, "*B 2"], Float[Tensor, "*B"]]:
    """Points (x, y) in cells by a softmax over the window around each map's highest cell, and the heights there.

    Raises:
        UsageError: a window that is even, or larger than the map.
    """
    check_window(window)
    h, w = (int(length) for length in maps.shape[-2:])
    if window > max(h, w):
        raise UsageError(f"a window of {window} cells is larger than the map ({h} x {w}): choose a smaller window")
    flat = maps.flatten(-2)
    peak, at = flat.max(-1)
    row, column = at // w, at % w
    offset = torch.arange(window, device=maps.device) - window // 2
    rows, columns = row[..., None, None] + offset[:, None], column[..., None, None] + offset
    on_map = (rows >= 0) & (rows < h) & (columns >= 0) & (columns < w)
    values = flat.gather(-1, (rows.clamp(0, h - 1) * w + columns.clamp(0, w - 1)).flatten(-2))
    share = (tau * values).masked_fill(~on_map.flatten(-2), -math.inf).softmax(-1).unflatten(-1, (window, window))
    x = column + (share * offset).sum((-2, -1))
    y = row + (share * offset[:, None]).sum((-2, -1))
    return torch.stack([x, y], -1), peak


def disagreement(
    maps: Float[Tensor, "B K h w"],
    view: Float[Tensor, "B K h w"],
    matrix: Float[Tensor, "B 3 3"],
    order: Tensor,
) -> Float[Tensor, ""]:
    """Mean over landmarks of sum |maps - view turned back|^2, on cells that both views show.

    Args:
        view: maps of the moved copy; its channel order[k] shows landmark k of the image, order [B, K].
        matrix: from cells of the image to cells of the copy.
    """
    ordered = view.gather(1, order[..., None, None].expand_as(view))
    back, shown = resample(ordered, torch.linalg.inv(matrix.double()), (maps.shape[-1], maps.shape[-2]))
    return ((maps - back).square() * shown).sum((-2, -1)).mean()


def check_sigma(sigma: float) -> None:
    if sigma < 0.5:
        raise UsageError(f"sigma={sigma} is below half a cell: the peak falls between cells; choose 0.5 or more")


def check_window(window: int) -> None:
    if window < 1 or window % 2 == 0:
        raise UsageError(f"window={window}: expected an odd number, so that the window has a middle")


class Locator(nn.Module):
    """A backbone and an upsampler: normalised images [B, 3, S, S] -> maps [B, K, S / 4, S / 4]."""

    def __init__(self, backbone: Any, outputs: int, frozen: bool) -> None:
        super().__init__()
        self.backbone, self.frozen = backbone, frozen
        size = backbone.preprocessing.size
        side = max(1, round(size / STRIDE))
        self.size = side, side
        self.upsample = Upsample([shape_of(each) for each in blank_maps(backbone, size)], self.size, outputs)
        if frozen:
            backbone.requires_grad_(False)
            self.train(self.training)

    def train(self, mode: bool = True) -> Locator:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.upsample([each for each, _ in self.backbone.feature_map(images)])


def shape_of(map: Tensor) -> tuple[int, int, int]:
    _, channels, height, width = map.shape
    return channels, height, width


@torch.no_grad()
def blank_maps(backbone: Any, size: int) -> list[Tensor]:
    """The backbone's feature maps of an empty image, its mode left as it was."""
    training = backbone.training
    like = next(backbone.parameters())
    maps = [each for each, _ in backbone.eval().feature_map(like.new_zeros(1, 3, size, size))]
    backbone.train(training)
    return maps


@options
class Options:
    """What `subpixel-heatmap` can be told."""

    sigma: float = option(2.0, "width of the Gaussian, in cells of the maps (4 pixels each)", gt=0, le=10)
    window: int = option(5, "side of the window around the highest cell, odd", ge=1, le=63)
    tau: float = option(10.0, "sharpness of the softmax over the window", gt=0, le=1000)
    consistency: float = option(1.0, "weight of the agreement with a moved view; 0 halves the work", ge=0, le=100)
    freeze: bool = option(False, "leave the backbone as it is and train the upsampler alone")
    flip: Literal["auto", "on", "off"] = option("auto", "mirror images; auto: where the points' mirror twins are known")
    augment: Literal["none", "light", "strong"] = option("light", "how far images are turned, scaled and recoloured")
    epochs: int = option(30, "passes over the training images", ge=1, le=10_000)
    batch_size: int = option(16, "images per step", ge=1, le=4096)
    lr: float = option(1e-3, "highest learning rate", gt=0, le=1)


@method(
    Spec(
        family="dense",
        title="Subpixel heatmaps",
        year=2021,
        arxiv="2111.02360",
        needs=frozenset({"labels", "feature map"}),
        tasks=("landmarks",),
    ),
    Options,
)
class SubpixelHeatmap(Dense):
    def __init__(self, options: Any = None) -> None:
        """
        Raises:
            UsageError: an even window, or a sigma below half a cell.
        """
        super().__init__(options)
        check_window(self.options.window)
        check_sigma(self.options.sigma)

    def attach(self, backbone: Any, outputs: int) -> nn.Module:
        """
        Raises:
            BackboneError: the backbone does not give its feature maps.
            UsageError: the window is larger than the maps.
        """
        locator = Locator(backbone, outputs, self.options.freeze)
        self.decode(torch.zeros(1, 1, *locator.size))
        return locator

    def views(self) -> int:
        return 2 if self.options.consistency else 1

    def encode(self, points: Tensor, size: tuple[int, int]) -> Tensor:
        """Points [B, K, 2] in cells -> the maps to learn [B, K, h, w]."""
        return encode(points, size, self.options.sigma)

    def decode(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        points, peak = decode(maps, self.options.window, self.options.tau)
        return points, peak.clamp(0, 1)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images, points, known = batch["images"], batch["points"], batch["known"]
        if both := "view" in batch:
            images = torch.cat([images, batch["view"]])
            points, known = torch.cat([points, batch["view_points"]]), torch.cat([known, batch["view_known"]])
        maps = model(images).float()
        h, w = maps.shape[-2:]
        to_cells = torch.from_numpy(resizing((images.shape[-1], images.shape[-2]), (w, h))).to(points)
        cells = points @ to_cells[:2, :2].T + to_cells[:2, 2]
        known = known * within(cells, (h, w))
        error = (maps - self.encode(cells, (h, w))).square().sum((-2, -1))
        heat = (error * known).sum() / known.sum().clamp_min(1)
        if not both:
            return {"loss": heat}
        matrix = to_cells @ batch["matrix"].to(to_cells) @ torch.linalg.inv(to_cells)
        own, view = maps.chunk(2)
        apart = disagreement(own, view, matrix, batch["order"])
        return {"loss": heat + self.options.consistency * apart, "heat": heat.detach(), "apart": apart.detach()}
