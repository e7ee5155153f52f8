"""Isotropic ConvNeXt (Liu et al., CVPR 2022, arXiv 2201.03545, section 3.3): ConvNeXt blocks at one resolution.

Patches of 16 pixels by one convolution, then `depth` blocks of width d on the same grid, as in a ViT,

    x <- x + g W_2 gelu(W_1 LN(DW_7x7 x)),

the mean over the map, a layer norm and a linear classifier. It is the paper's test of whether the block itself, without
the pyramid, keeps up with a ViT's (79.7, 82.0 and 82.6% on ImageNet-1k for small, base and large).
Layer scale is off in small and base and starts at 1e-6 in large. timm has the pyramids (`convnext_*`),
and its block is used here; it lacks these three.

Departures: none in the architecture; feature maps are tapped at four depths.

When not to use it: with pretrained weights of a pyramid at hand (none come with foveal for this one); for dense tasks,
which want finer maps than stride 16; on a CPU, where 7x7 depthwise convolutions at 384 channels and more are slow.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import LayerNorm
from timm.models import generate_default_cfgs
from timm.models.convnext import ConvNeXtBlock
from torch import nn

from foveal.architectures._isotropic import Isotropic, build_isotropic, quarters
from foveal.architectures._pyramid import cfg, init_as_convnext, pooled_head
from foveal.architectures._registry import register_model


class ConvNeXtIso(Isotropic):
    """Isotropic ConvNeXt; arguments not named here are those of every timm model.

    Args:
        embed_dim: d.
        depth: blocks, at least 4.
        ls_init_value: start of the layer scale; None for none.

    Raises:
        BackboneError: fewer than four blocks, or an image under 16 pixels.
    """

    title = "isotropic ConvNeXt"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 18,
        kernel_size: int = 7,
        ls_init_value: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        made = partial(
            ConvNeXtBlock,
            embed_dim,
            kernel_size=kernel_size,
            ls_init_value=ls_init_value,
            norm_layer=partial(LayerNorm, eps=1e-6),
        )
        stages = quarters(depth, lambda rate: made(drop_path=rate), drop_path_rate)
        super().__init__(
            nn.Conv2d(in_chans, embed_dim, 16, 16),
            stages,
            pooled_head(embed_dim, num_classes, global_pool, drop_rate, eps=1e-6),
            embed_dim=embed_dim,
            in_chans=in_chans,
            num_classes=num_classes,
        )
        self.apply(init_as_convnext)


default_cfgs = generate_default_cfgs(
    {
        f"convnext_iso_{size}": cfg(
            "stem",
            pool_size=(14, 14),
            paper_ids="arXiv:2201.03545",
            paper_name="A ConvNet for the 2020s",
            origin_url="https://github.com/facebookresearch/ConvNeXt",
        )
        for size in ("small", "base", "large")
    }
)


@register_model
def convnext_iso_small(pretrained: bool = False, **kwargs: Any) -> ConvNeXtIso:
    return build_isotropic(ConvNeXtIso, "convnext_iso_small", pretrained, kwargs, embed_dim=384, depth=18)


@register_model
def convnext_iso_base(pretrained: bool = False, **kwargs: Any) -> ConvNeXtIso:
    return build_isotropic(ConvNeXtIso, "convnext_iso_base", pretrained, kwargs, embed_dim=768, depth=18)


@register_model
def convnext_iso_large(pretrained: bool = False, **kwargs: Any) -> ConvNeXtIso:
    return build_isotropic(
        ConvNeXtIso, "convnext_iso_large", pretrained, kwargs, embed_dim=1024, depth=36, ls_init_value=1e-6
    )
