"""A small transformer that begins as a convolution: ConViT blocks (d'Ascoli et al. 2021, arXiv 2103.10697), by timm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveal.core.errors import UsageError


def shared_by(width: int, heads: int) -> int:
    """`heads`, if as many can share a width."""
    if width % heads:
        raise UsageError(f"width {width} cannot be shared by {heads} attention heads: choose a multiple")
    return heads


class GatedEncoder(nn.Module):
    """Images [B, 3, S, S] -> patch tokens, through blocks of gated positional self-attention; no class token."""

    def __init__(self, size: int = 32, patch: int = 4, width: int = 384, depth: int = 5, heads: int = 12) -> None:
        from timm.models.convit import Block

        super().__init__()
        if size % patch:
            raise UsageError(f"images of {size} pixels do not cut into patches of {patch}: the grid must be square")
        shared_by(width, heads)
        self.width = self.cell_width = width
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, (size // patch) ** 2, width), std=0.02))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            block.attn.local_init()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]

    def features_and_cells(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the patch tokens [B, D], and the tokens [B, n, D]."""
        if images.shape[-2] != images.shape[-1]:
            raise UsageError(f"images of {images.shape[-2]} x {images.shape[-1]} pixels: the grid must be square")
        cells = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            cells = block(cells)
        return cells.mean(1), cells
