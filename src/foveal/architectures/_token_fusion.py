"""Fusion of the tokens of two ViTs: what crossvit.py puts between their blocks."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import Attention, trunc_normal_
from timm.models.crossvit import CrossAttentionBlock
from torch import Tensor, nn

from foveal.core.errors import BackboneError

Scheme = Literal["cross", "all", "class", "pairwise"]
Grid = tuple[int, int]
NORM = partial(nn.LayerNorm, eps=1e-6)


def projection(width: int, to: int) -> nn.Module:
    """f and g: tokens [..., width] -> [..., to]."""
    return nn.Sequential(NORM(width), nn.GELU(), nn.Linear(width, to))


def resize(tokens: Tensor, grid: Grid, to: Grid) -> Tensor:
    """Tokens [B, h w, D] of a grid, row by row -> [B, h' w', D] of another, bilinearly."""
    if grid == to:
        return tokens
    maps = tokens.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(maps, to, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


class AttentionBlock(nn.Module):
    """x + MSA(LN x), tokens [B, N, D] -> [B, N, D]: a block without its MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = NORM(dim)
        self.attn = Attention(dim, num_heads=heads, qkv_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm1(x))


class CrossTokenFusion(nn.Module):
    """Tokens of two branches, a [B, 1 + N, dim_a] and b [B, 1 + M, dim_b], class token first -> the same two, fused.

    Section 3.3 of the paper; the parameters of `cross` have the names of timm's `MultiScaleBlock`.

    Args:
        heads: of the attention; divides both widths.
        scheme: 'cross': each class token reads the other branch's patches (equation 5). 'all': attention among all
            tokens of both (2). 'class': the sum of both class tokens replaces them (3). 'pairwise': so does the sum
            of patches at the same place, those of the other branch interpolated (4).

    Raises:
        BackboneError: an unknown scheme, or heads that do not divide both widths.
    """

    def __init__(self, dim_a: int, dim_b: int, heads: int, scheme: Scheme = "cross") -> None:
        super().__init__()
        if scheme not in get_args(Scheme):
            raise BackboneError(f"scheme '{scheme}': expected one of {', '.join(get_args(Scheme))}")
        if heads < 1 or dim_a % heads or dim_b % heads:
            fits = [str(n) for n in range(1, 17) if not (dim_a % n or dim_b % n)]
            raise BackboneError(
                f"{heads} heads do not divide both widths, {dim_a} and {dim_b}: expected one of {', '.join(fits)}"
            )
        self.scheme, self.dims = scheme, (dim_a, dim_b)
        self.widths = (dim_b, dim_a) if scheme == "cross" else (max(self.dims),) * 2
        pairs = list(zip(self.dims, self.widths, strict=True))
        always = scheme == "cross"
        self.projs = nn.ModuleList(projection(d, w) if always or d != w else nn.Identity() for d, w in pairs)
        self.revert_projs = nn.ModuleList(projection(w, d) if always or d != w else nn.Identity() for d, w in pairs)
        self.fusion = nn.ModuleList()
        if scheme == "cross":
            self.fusion.extend(CrossAttentionBlock(w, heads, qkv_bias=True, norm_layer=NORM) for w in self.widths)  # pyright: ignore[reportArgumentType]
        elif scheme == "all":
            self.fusion.append(AttentionBlock(self.widths[0], heads))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, a: Tensor, b: Tensor, grids: Sequence[Grid] | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:
            grids: rows and columns of the patches of a and b, which come last in their sequence; 'pairwise' alone
                reads them, and takes squares where they are not given.

        Raises:
            BackboneError: other widths than the fusion's, two batch sizes, or patches that fill no grid.
        """
        for x, width in zip((a, b), self.dims, strict=True):
            if x.ndim != 3 or x.shape[2] != width or x.shape[1] < 2 or x.shape[0] != a.shape[0]:
                raise BackboneError(
                    f"tokens of shape {list(a.shape)} and {list(b.shape)}: expected [B, 1 + N, {self.dims[0]}] and "
                    f"[B, 1 + M, {self.dims[1]}] with one batch size B and at least one patch each"
                )
        f, g = self.projs, self.revert_projs
        if self.scheme == "cross":
            first: list[Tensor] = []
            for i, (own, other) in enumerate(((a, b), (b, a))):
                first.append(g[i](self.fusion[i](torch.cat([f[i](own[:, :1]), other[:, 1:]], 1))))
            return torch.cat([first[0], a[:, 1:]], 1), torch.cat([first[1], b[:, 1:]], 1)
        if self.scheme == "all":
            mixed = self.fusion[0](torch.cat([f[0](a), f[1](b)], 1))
            return g[0](mixed[:, : a.shape[1]]), g[1](mixed[:, a.shape[1] :])
        if self.scheme == "class":
            total = f[0](a[:, :1]) + f[1](b[:, :1])
            return torch.cat([g[0](total), a[:, 1:]], 1), torch.cat([g[1](total), b[:, 1:]], 1)
        grids = self.check_grids((a, b), grids)
        p, q = f[0](a), f[1](b)
        total = p[:, :1] + q[:, :1]
        p, q = p[:, -math.prod(grids[0]) :], q[:, -math.prod(grids[1]) :]
        return (
            self.placed(a, g[0](total), g[0](p + resize(q, grids[1], grids[0]))),
            self.placed(b, g[1](total), g[1](q + resize(p, grids[0], grids[1]))),
        )

    @staticmethod
    def placed(x: Tensor, first: Tensor, patches: Tensor) -> Tensor:
        """Tokens with another class token and other patches; registers between them stay."""
        return torch.cat([first, x[:, 1 : x.shape[1] - patches.shape[1]], patches], 1)

    @staticmethod
    def check_grids(tokens: Sequence[Tensor], grids: Sequence[Grid] | None) -> Sequence[Grid]:
        if grids is None:
            sides = [math.isqrt(int(x.shape[1]) - 1) for x in tokens]
            grids = [(side, side) for side in sides]
            if any(math.prod(grid) != x.shape[1] - 1 for grid, x in zip(grids, tokens, strict=True)):
                counts = " and ".join(str(int(x.shape[1]) - 1) for x in tokens)
                raise BackboneError(f"{counts} patches are not squares: give grids=((h, w), (h, w)) for 'pairwise'")
        for (height, width), x in zip(grids, tokens, strict=True):
            if height * width > x.shape[1] - 1:
                raise BackboneError(
                    f"{int(x.shape[1]) - 1} tokens beside the class token for a grid of {height}x{width}: 'pairwise' "
                    "needs all patches (no patch dropout)"
                )
        return grids

    def macs(self, count_a: int, count_b: int) -> int:
        """Multiplications for one image with so many tokens, class tokens included; without interpolation."""
        counts, total = (count_a, count_b), 0
        if self.scheme == "cross":
            for own, width, other in zip(self.dims, self.widths, counts[::-1], strict=True):
                total += 2 * own * width + (2 + 2 * other) * width**2 + 2 * other * width
            return total
        for own, width, count in zip(self.dims, self.widths, counts, strict=True):
            if own != width:
                total += 2 * own * width * (1 if self.scheme == "class" else count)
        if self.scheme == "all":
            total += 4 * sum(counts) * self.widths[0] ** 2 + 2 * sum(counts) ** 2 * self.widths[0]
        return total
