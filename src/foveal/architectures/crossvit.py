"""CrossViT's fusion (Chen, Fan and Panda, ICCV 2021, arXiv 2103.14899), for any two ViTs.

Two ViTs read one image, as a rule in small and in large patches, and tell each other what they see through their class
tokens alone: that of branch a is carried into b's width, reads b's patches with a single query, and comes back,

    z = f(cls_a),    z' = z + CA(LN [z, patches_b]),    cls_a' = g(z'),    f, g = Linear GELU LN,

and the other way round from the same tokens. The patches stay as they are, and the cost is linear in their number.

timm has the paper's eleven models (`crossvit_15_240`, ...), which are used as they are. Here is what it lacks:
`CrossTokenFusion`, the fusion alone, beside the three that the paper compares it with; `FusedPair`, which puts it
between the blocks of two ViTs of timm, with whatever weights they have; `branch_attention`, what each class token
reads, of a pair or of timm's CrossViT. `crossvit_pair_tiny_224` is a pair with a name: the networks of
`vit_tiny_patch16_224` and `vit_small_patch32_224`.

Departures: none in `cross` (timm's own block). Of the other three there is no published code. The paper leaves the
common width open: here it is the wider branch's, and f and g stand only where a width differs from it.

When not to use it: with one pretrained ViT at hand and time to train it alone; where both branches read the same
patches; to add or drop tokens midway, as VPT does. Every class token passes whole through f and g, which start at
random: fused without training, two pretrained ViTs know nothing (`scheme=None` is their plain average).
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.crossvit import CrossAttentionBlock, CrossVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from foveal.architectures._fused_pair import FusedPair, cfg, two
from foveal.architectures._registry import register_model
from foveal.architectures._token_fusion import CrossTokenFusion, Grid, Scheme
from foveal.core.errors import BackboneError

__all__ = ["CrossTokenFusion", "FusedPair", "Reading", "branch_attention"]


@dataclass(frozen=True)
class Reading:
    """What the class token of one branch read of the other in one fusion.

    Attributes:
        stage: which fusion, from 0.
        branch: 0 for the class token of branch a, which reads b; 1 for that of b.
        weights: [B, heads, 1 + N], rows of sum 1: of itself first, then of the other branch's tokens.
        grid: rows and columns of the other branch's patches, which come last.
    """

    stage: int
    branch: int
    weights: Tensor
    grid: Grid

    @property
    def maps(self) -> Tensor:
        """Weights of the patches [B, heads, h, w]."""
        return self.weights[..., -math.prod(self.grid) :].unflatten(-1, self.grid)


def branch_attention(model: FusedPair | CrossVit, images: Tensor) -> list[Reading]:
    """What each class token reads of the other branch's patches, fusion by fusion, on normalised images.

    Args:
        model: a pair with scheme 'cross', or a `crossvit_*` of timm. It is run once, without gradients, as it is; call
            `eval()` before to have it without dropout.

    Raises:
        BackboneError: a model without cross-attention.
    """
    if isinstance(model, FusedPair):
        grids, stages = model.grids(int(images.shape[-2]), int(images.shape[-1])), list(model.fusions)
    else:
        embeds: list[Any] = list(getattr(model, "patch_embed", [])) if isinstance(model, CrossVit) else []
        grids = [(e.img_size[0] // e.patch_size[0], e.img_size[1] // e.patch_size[1]) for e in embeds]
        stages = list(model.blocks) if embeds else []
    found: dict[tuple[int, int], Any] = {
        (stage, branch): block.attn
        for stage, module in enumerate(stages)
        for branch, block in enumerate(getattr(module, "fusion", ()))
        if isinstance(block, CrossAttentionBlock)
    }
    if not found:
        raise BackboneError(
            f"{type(model).__name__} has no cross-attention to show: expected a FusedPair with scheme 'cross', or a "
            "crossvit_* of timm"
        )
    seen: dict[tuple[int, int], Tensor] = {}

    def keep(key: tuple[int, int], _: nn.Module, given: tuple[Tensor]) -> None:
        seen[key] = given[0].squeeze(2)

    with ExitStack() as stack, torch.no_grad():
        for key, attention in found.items():
            stack.callback(attention.attn_drop.register_forward_pre_hook(partial(keep, key)).remove)
        model(images)
    return [Reading(stage, branch, seen[stage, branch], grids[1 - branch]) for stage, branch in found]


default_cfgs = generate_default_cfgs({"crossvit_pair_tiny_224": cfg()})


def build_pair(
    img_size: int | tuple[int, int] = 224,
    patch_size: Sequence[int] = (16, 32),
    embed_dim: Sequence[int] = (192, 384),
    depth: Sequence[int] = (12, 12),
    num_heads: Sequence[int] = (3, 6),
    mlp_ratio: Sequence[float] = (4.0, 4.0),
    every: int | Sequence[int] = 4,
    scheme: Scheme | Literal["none"] = "cross",
    **kwargs: Any,
) -> FusedPair:
    """A pair with random weights; `kwargs` go to both of timm's `VisionTransformer`.

    Args:
        scheme: as in `FusedPair`, and 'none' for None: `timm.create_model` passes no None on.
    """
    shapes = zip(*map(two, (patch_size, embed_dim, depth, num_heads, mlp_ratio)), strict=True)
    names = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    vits = [VisionTransformer(img_size=img_size, **dict(zip(names, shape, strict=True)), **kwargs) for shape in shapes]
    return FusedPair(*vits, every=every, scheme=None if scheme == "none" else scheme)


@register_model
def crossvit_pair_tiny_224(pretrained: bool = False, **kwargs: Any) -> FusedPair:
    """Patches of 16 in width 192 beside patches of 32 in width 384, twelve blocks each, fused three times."""
    stages = two(kwargs.get("depth", 12))[0] // max(1, two(kwargs.get("every", 4))[0])
    feature_cfg = {"out_indices": tuple(range(2 * stages)), "feature_cls": "getter"}
    return build_model_with_cfg(build_pair, "crossvit_pair_tiny_224", pretrained, feature_cfg=feature_cfg, **kwargs)
