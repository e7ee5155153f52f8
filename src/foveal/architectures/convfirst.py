"""ConvFirst (Lavin 2024, arXiv 2404.03617, "On the Efficiency of Convolutional Neural Networks"): blocks made to fuse.

Latency is operations over peak times efficiency, so a block is judged by both. The ConvFirst block puts its spatial
convolution first, on C channels in groups of 8, and the wide part after it; MBConv does the opposite, on 4C channels,

    ConvFirst: x + BN(W_2 silu(BN(W_1 BN(GC x)))),     MBConv: x + BN(W_2 silu(BN(GC silu(BN(W_1 x))))).

A fused kernel runs a whole block tile by tile and never writes what lies between: with the convolution first, only the
input of a tile overlaps its neighbours', nothing is computed twice. `by_tiles` is that order of work in plain PyTorch,
equal to the layers' own. `foveal.evaluate.waterline` tells which layers of any model are bound by memory, and what
fusing would save. `convfirstnet` uses ConvFirst in its early, high-resolution stages and MBConv in the later ones.

Departures: the paper's table of sizes was not verified, so `convfirstnet` has a shape of its own (`depths`, `dims`,
`split`) and no parity is claimed; fused kernels for GPUs are not part of this.

When not to use it: for its accuracy (no pretrained weights exist); for speed without kernels that fuse: layer by layer
it is an ordinary convnet with grouped convolutions, which most CPU libraries run slowly.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from foveal.architectures._pyramid import Pyramid, Stage, build_pyramid, cfg, four, pooled_head
from foveal.architectures._registry import register_model
from foveal.core.errors import BackboneError

GROUP = 8
"""Channels of a group: the width of a tensor core's tile."""
EXPANSION = 4


class FusibleBlock(nn.Module):
    """Pointwise layers, a grouped 3x3 convolution, pointwise layers; a residual where shape allows it.

    [B, C, H, W] -> [B, D, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(
        self, before: nn.Module, conv: nn.Conv2d, after: nn.Module, residual: bool, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.before = before
        self.conv = conv
        self.after = after
        self.residual = residual
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop_path(self.after(self.conv(self.before(x))))
        return x + y if self.residual else y


def grouped(channels: int, stride: int) -> nn.Conv2d:
    if channels % GROUP:
        raise BackboneError(f"{channels} channels: groups of {GROUP} need a multiple of {GROUP}")
    return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels // GROUP, bias=False)


def pointwise(channels: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out)]


def conv_first(channels: int, out: int, stride: int = 1, drop_path: float = 0.0) -> FusibleBlock:
    """The ConvFirst block from `channels` to `out`.

    Raises:
        BackboneError: `channels` is not a multiple of 8.
    """
    wide = EXPANSION * channels
    after = nn.Sequential(nn.BatchNorm2d(channels), *pointwise(channels, wide), nn.SiLU(), *pointwise(wide, out))
    residual = stride == 1 and channels == out
    return FusibleBlock(nn.Identity(), grouped(channels, stride), after, residual, drop_path)


def mbconv(channels: int, out: int, stride: int = 1, drop_path: float = 0.0) -> FusibleBlock:
    """The MBConv block with the same groups: expand, convolve on 4C channels, shrink.

    Raises:
        BackboneError: 4 `channels` is not a multiple of 8.
    """
    wide = EXPANSION * channels
    before = nn.Sequential(*pointwise(channels, wide), nn.SiLU())
    after = nn.Sequential(nn.BatchNorm2d(wide), nn.SiLU(), *pointwise(wide, out))
    return FusibleBlock(before, grouped(wide, stride), after, stride == 1 and channels == out, drop_path)


def by_tiles(block: FusibleBlock, x: Tensor, tile: int) -> Tensor:
    """What a fused kernel computes: the block on maps [B, C, H, W], one tile x tile patch of the output at a time.

    Raises:
        BackboneError: a block in training mode (batch statistics need the whole map), of stride 2, or a tile below 1.
    """
    if block.training or block.conv.stride != (1, 1) or tile < 1:
        raise BackboneError(
            f"tile {tile}, stride {block.conv.stride[0]}, {'training' if block.training else 'eval'} mode: expected a "
            "tile of at least 1, stride 1 and eval mode"
        )
    height, width = x.shape[-2:]
    rows: list[Tensor] = []
    for top in range(0, height, tile):
        row: list[Tensor] = []
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            up, down = max(top - 1, 0), min(bottom + 1, height)
            west, east = max(left - 1, 0), min(right + 1, width)
            y = block.before(x[..., up:down, west:east])
            y = F.pad(y, (west - left + 1, right + 1 - east, up - top + 1, bottom + 1 - down))
            y = F.conv2d(y, block.conv.weight, groups=block.conv.groups)
            y = block.after(y)
            row.append(x[..., top:bottom, left:right] + y if block.residual else y)
        rows.append(torch.cat(row, dim=-1))
    return torch.cat(rows, dim=-2)


class ConvFirstNet(Pyramid):
    """Four stages at strides 4 to 32; arguments not named here are those of every timm model.

    Args:
        depths: blocks per stage; the first one of each halves the map.
        dims: channels of each stage, multiples of 8.
        split: how many stages, from the first, are of ConvFirst blocks; the rest are of MBConv.

    Raises:
        BackboneError: widths that 8 does not divide, tuples that are not of four stages, or a split out of 0 to 4.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 3, 9, 3),
        dims: Sequence[int] = (64, 128, 256, 512),
        split: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        dims, depths = four("convfirstnet", dims, "dims"), four("convfirstnet", depths, "depths")
        if not 0 <= split <= 4:
            raise BackboneError(f"split {split}: expected 0 to 4, the number of stages with ConvFirst blocks")
        stem = nn.Sequential(
            nn.Conv2d(in_chans, dims[0], 3, 2, 1, bias=False), nn.BatchNorm2d(dims[0]), nn.SiLU()
        )  # fmt: skip
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages: list[nn.Module] = []
        for index, (width, out) in enumerate(itertools.pairwise((dims[0], *dims))):
            make = conv_first if index < split else mbconv
            blocks = [make(out, out, 1, rate) for rate in rates[index][1:]]
            stages.append(Stage(make(width, out, 2, rates[index][0]), blocks))
        head = pooled_head(dims[-1], num_classes, global_pool, drop_rate)
        super().__init__(
            stem, stages, nn.Identity(), head,
            dims=dims, strides=(4, 8, 16, 32), in_chans=in_chans, num_classes=num_classes,
        )  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        "convfirstnet": cfg(
            paper_ids="arXiv:2404.03617",
            paper_name="On the Efficiency of Convolutional Neural Networks",
            origin_url="https://github.com/andravin/spio",
        )
    }
)


@register_model
def convfirstnet(pretrained: bool = False, **kwargs: Any) -> ConvFirstNet:
    """ConvFirst in the first two stages, MBConv in the last two."""
    defaults = {"depths": (2, 3, 9, 3), "dims": (64, 128, 256, 512)}
    return build_pyramid(ConvFirstNet, "convfirstnet", pretrained, defaults, kwargs)
