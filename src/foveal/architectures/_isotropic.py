"""The frame of the nets at one resolution: patches of 16 pixels, blocks of one width, feature maps at four depths."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from timm.layers import calculate_drop_path_rates
from timm.models import build_model_with_cfg
from torch import nn

from foveal.architectures._pyramid import Pyramid, Stage, refuse_pretrained
from foveal.core.errors import BackboneError


def quarters(depth: int, block: Callable[[float], nn.Module], drop_path_rate: float = 0.0) -> list[Stage]:
    """`depth` blocks in four stages of about as many, each made from its drop path rate, which rises with depth.

    Raises:
        BackboneError: fewer than four blocks.
    """
    if depth < 4:
        raise BackboneError(f"depth {depth}: expected at least 4 blocks, feature maps are taken at four depths")
    rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
    blocks = [block(rate) for rate in rates]
    ends = [round(depth * quarter / 4) for quarter in range(5)]
    return [Stage(nn.Identity(), blocks[start:end]) for start, end in itertools.pairwise(ends)]


class Isotropic(Pyramid):
    """A pyramid that is a column: four stages (see `quarters`) of width `embed_dim` at stride 16, and no norm.

    Attributes:
        title: what messages call it.
    """

    title: str

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        head: nn.Module,
        *,
        embed_dim: int,
        in_chans: int,
        num_classes: int,
    ) -> None:
        super().__init__(
            stem, stages, nn.Identity(), head,
            dims=(embed_dim,) * 4, strides=(16,) * 4, in_chans=in_chans, num_classes=num_classes,
        )  # fmt: skip

    def check_input(self, height: int, width: int) -> None:
        if min(height, width) < 16:
            raise BackboneError(f"image of {height}x{width} pixels: {self.title} needs at least 16x16, one patch")


def build_isotropic(
    cls: type[Isotropic], variant: str, pretrained: bool, given: dict[str, Any], **defaults: Any
) -> Any:
    """timm's way from a variant's defaults and the caller's arguments to a model; `features_only` works."""
    refuse_pretrained(variant, pretrained, given)
    feature_cfg = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    return build_model_with_cfg(cls, variant, pretrained, feature_cfg=feature_cfg, **{**defaults, **given})
