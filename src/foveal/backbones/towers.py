"""An image tower and a language tower that share one space of unit vectors."""

from __future__ import annotations

import math
from typing import Any, Self, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone
from foveal.backbones.text import TextTower
from foveal.core.errors import BackboneError, DataError
from foveal.core.method import Classifier

SHARPEST = 100.0
"""No scale is larger."""


class Towers(nn.Module):
    """Two encoders, a matrix after each, and the logarithm of the scale of their cosines.

    Frozen towers (no parameter with gradients) stay in eval mode. `forward` is what training calls.

    Args:
        dim: length of the vectors.
        temperature: of the start; the scale is its inverse.
        bias: whether the matrix after the image tower has one.

    Raises:
        BackboneError: the side of the images is not a multiple of the patch.
    """

    def __init__(
        self, image: Backbone, text: TextTower, dim: int, *, temperature: float = 0.07, bias: bool = False
    ) -> None:
        super().__init__()
        check_patch(image)
        self.image, self.text = image, text
        self.image_proj = nn.Linear(image.width, dim, bias=bias)
        self.text_proj = nn.Linear(text.width, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        nn.init.normal_(self.image_proj.weight, std=image.width**-0.5)
        nn.init.normal_(self.text_proj.weight, std=text.width**-0.5)

    @property
    def dim(self) -> int:
        return self.text_proj.out_features

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()

    def encode_images(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> unit vectors [B, dim].

        Raises:
            DataError: pixels that nobody normalised.
        """
        if not images.is_floating_point():
            raise DataError(
                f"images of type {images.dtype}: expected float32, (pixel / 255 - mean) / std with the mean and std of "
                "the tower's preprocessing (foveal.backbones.adapter.normalise)"
            )
        return F.normalize(self.image_proj(self.image(images)), dim=1)

    def encode_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids [B, L] and their mask -> unit vectors [B, dim]."""
        return F.normalize(self.text_proj(self.text(ids, mask)), dim=1)

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors of images [B, dim] and of their texts [B, dim], and the scale."""
        return self.encode_images(images), self.encode_texts(ids, mask), self.scale

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for tower in (self.image, self.text):
            if not any(p.requires_grad for p in tower.parameters()):
                tower.eval()
        return self

    def classifier(self, texts: Tensor) -> Classifier:
        """An image classifier whose classes are unit vectors of texts [C, dim]: normalised images -> scale * cosine."""
        return Classifier(self.image, Cosines(self.image_proj, texts, float(self.scale.detach()))).eval()


class Cosines(nn.Module):
    """Features [B, D] -> a matrix, unit length, `scale` times the cosine with each of texts [C, dim]."""

    def __init__(self, proj: nn.Linear, texts: Tensor, scale: float) -> None:
        super().__init__()
        self.proj = proj
        self.rows = nn.Linear(texts.shape[1], len(texts), bias=False).requires_grad_(False)
        self.rows.weight.copy_(scale * texts.detach())

    def forward(self, features: Tensor) -> Tensor:
        return self.rows(F.normalize(self.proj(features), dim=1))


def check_patch(image: Backbone) -> None:
    """
    Raises:
        BackboneError: the side of the images is not a multiple of the patch.
    """
    patch = getattr(getattr(image.model, "patch_embed", None), "patch_size", None)
    size = image.preprocessing.size
    if patch is not None and any(size % int(side) for side in cast(Any, patch)):
        raise BackboneError(
            f"images of {size} pixels are not divisible into patches of {int(cast(Any, patch)[0])}: choose a multiple"
        )


class Gather(torch.autograd.Function):
    """Rows of all processes, one process after the other; gradients go back to where a row came from, summed."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        world, rank = dist.get_world_size(), dist.get_rank()
        counts = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(world)]
        dist.all_gather(counts, torch.tensor([len(own)], device=own.device))
        sizes = [int(count) for count in counts]
        padded = own.new_zeros(max(sizes), *own.shape[1:])
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(found, padded)
        ctx.start, ctx.size = sum(sizes[:rank]), len(own)
        return torch.cat([rows[:size] for rows, size in zip(found, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.size]


def gathered(rows: Tensor) -> Tensor:
    """Rows [b, ...] of this process -> those of all processes that train together, with gradients; alone, `rows`."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    return cast(Tensor, Gather.apply(rows))
