"""Two ViTs with fusions between their blocks, as one model of timm: what crossvit.py registers."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from foveal.architectures._token_fusion import CrossTokenFusion, Grid, Scheme
from foveal.core.errors import BackboneError


def cfg(**more: Any) -> dict[str, Any]:
    """timm's description of a pair; no weights are published."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": ("a.patch_embed.proj", "b.patch_embed.proj"),
        "classifier": "head",
        "paper_ids": "arXiv:2103.14899",
        "paper_name": "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification",
        "origin_url": "https://github.com/IBM/CrossViT",
        **more,
    }


class PairHead(nn.Module):
    """Vectors [B, dim_a + dim_b] -> logits [B, classes], the mean of what two classifiers say of their parts."""

    def __init__(self, a: nn.Linear, b: nn.Linear) -> None:
        super().__init__()
        self.a, self.b = a, b
        self.in_features, self.out_features = a.in_features + b.in_features, a.out_features

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.split((self.a.in_features, self.b.in_features), dim=1)
        return (self.a(a) + self.b(b)) / 2


def two(value: Any) -> tuple[Any, Any]:
    """One value for both branches, or one for each."""
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2:
        raise BackboneError(f"{value} has {len(pair)} values: expected one, or one for each of the two branches")
    return pair


def check_multiple(vit: Any, height: int, width: int) -> None:
    """Refuse an image size of which a branch's patches would leave a margin unread."""
    down, right = two(vit.patch_embed.feat_ratio(as_scalar=False))
    if height < down or width < right or height % down or width % right:
        raise BackboneError(
            f"{height}x{width} pixels are no whole number of patches of {down}x{right}: build both ViTs for a size "
            "that both patch sizes divide, or each for one of its own"
        )


def check_pair(a: Any, b: Any, needs_class_token: bool) -> None:
    """
    Raises:
        BackboneError: not two plain ViTs of timm, or two that do not fit together.
    """
    for vit in (a, b):
        if not isinstance(vit, VisionTransformer) or isinstance(vit, VisionTransformerDistilled):
            raise BackboneError(f"{type(vit).__name__} is not a plain ViT: expected two of timm's VisionTransformer")
        if needs_class_token and not vit.has_class_token:
            raise BackboneError("a ViT without a class token has nothing to fuse: build it with class_token=True")
        if vit.global_pool == "":
            raise BackboneError("a ViT with global_pool='' gives no vector: build it with 'token' or 'avg'")
        if not vit.dynamic_img_size:
            check_multiple(vit, *vit.patch_embed.img_size)
    for what in ("in_chans", "num_classes"):
        if getattr(a, what) != getattr(b, what):
            raise BackboneError(f"{what} are {getattr(a, what)} and {getattr(b, what)}: expected the same in both ViTs")
    described = [getattr(vit, "pretrained_cfg", {}) for vit in (a, b)]
    given = [tuple(tuple(each[key]) for key in ("mean", "std") if each.get(key)) for each in described]
    if all(given) and given[0] != given[1]:
        raise BackboneError(
            f"the ViTs were made for images normalised by mean and std {given[0]} and {given[1]}, and a pair reads one "
            "image: choose two with the same"
        )


class FusedPair(nn.Module):
    """Two ViTs with a fusion after every few blocks: images [B, in_chans, H, W] -> logits [B, num_classes].

    The ViTs are copied, weights and classifiers included; logits are the mean of both. An image is resized
    (bicubically) for a branch that was built for another size.

    Args:
        vit_a: a timm `VisionTransformer` with a class token; its weights are `a.*` of the pair's.
        vit_b: another, with the same number of classes; any width, depth and patch size.
        every: blocks between fusions, one number or one for each branch; the last fusion follows the last blocks.
        scheme: as in `CrossTokenFusion`; None for no fusion.
        heads: of the fusions; default: the greatest number that divides those of both ViTs.

    Attributes:
        num_features: dim_a + dim_b, the length of the vector that the classifier reads.
        img_size: (height, width) of the images it takes, those of the branch that sees more pixels.
        stages: how often it fuses.

    Raises:
        BackboneError: a ViT without a class token or of another kind, two that do not fit together, an image size
            that is no whole number of patches, or `every` that does not divide the depths into equally many stages.
    """

    def __init__(
        self,
        vit_a: Any,
        vit_b: Any,
        every: int | Sequence[int] = 4,
        scheme: Scheme | None = "cross",
        heads: int | None = None,
    ) -> None:
        super().__init__()
        check_pair(vit_a, vit_b, scheme is not None)
        self.every = two(every)
        depths = (len(vit_a.blocks), len(vit_b.blocks))
        counts = {depth // max(k, 1) for depth, k in zip(depths, self.every, strict=True)}
        if min(self.every) < 1 or len(counts) > 1 or any(d % k for d, k in zip(depths, self.every, strict=True)):
            raise BackboneError(
                f"every={every} on {depths[0]} and {depths[1]} blocks: expected numbers that divide both into equally "
                "many stages, such as every=(1, 4) for 3 and 12"
            )
        self.stages = counts.pop()
        self.num_classes, self.in_chans = vit_a.num_classes, vit_a.in_chans
        self.a: Any = copy.deepcopy(vit_a)
        self.b: Any = copy.deepcopy(vit_b)
        linear = [vit.get_classifier() for vit in self.branches]
        self.head: nn.Module = PairHead(*linear) if self.num_classes else nn.Identity()
        for vit in self.branches:
            vit.reset_classifier(0)
        dims = (self.a.embed_dim, self.b.embed_dim)
        heads = heads or math.gcd(*(vit.blocks[0].attn.num_heads for vit in self.branches))
        made = (CrossTokenFusion(*dims, heads, scheme) for _ in range(self.stages)) if scheme else ()
        self.fusions = nn.ModuleList(made)
        self.num_features = self.head_hidden_size = sum(dims)
        self.grad_checkpointing = False
        self.levels = self.stages
        strides = [vit.patch_embed.feat_ratio() for vit in self.branches]
        self.order = (0, 1) if strides[0] <= strides[1] else (1, 0)
        self.feature_info = [
            {"num_chs": dims[i], "reduction": strides[i], "module": f"{'ab'[i]}.blocks.{stage * self.every[i] - 1}"}
            for i in self.order
            for stage in range(1, self.stages + 1)
        ]
        self.settle()
        kept = {key: getattr(vit_a, "pretrained_cfg", {}).get(key) for key in ("mean", "std", "interpolation")}
        self.pretrained_cfg = self.default_cfg = {
            **cfg(input_size=(self.in_chans, *self.img_size), num_classes=self.num_classes),
            **{key: value for key, value in kept.items() if value is not None},
        }

    @property
    def branches(self) -> tuple[Any, Any]:
        return self.a, self.b

    @property
    def dynamic_img_size(self) -> bool:
        return self.a.dynamic_img_size and self.b.dynamic_img_size

    def settle(self) -> None:
        """Take the image size from the branches, and warn where images are to be resized a second time."""
        sizes = [tuple(int(side) for side in vit.patch_embed.img_size) for vit in self.branches]
        self.img_size: Grid = max(sizes, key=math.prod)  # pyright: ignore[reportAttributeAccessIssue]
        for vit, size in zip(self.branches, sizes, strict=True):
            if size != self.img_size and not vit.dynamic_img_size:
                warnings.warn(
                    f"images are resized twice: to {self.img_size[0]}x{self.img_size[1]} pixels for the pair, and from "
                    f"those to {size[0]}x{size[1]} for one branch; build both ViTs for one size to resize once",
                    stacklevel=3,
                )

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take images of another size in both branches from now on; their position tables are interpolated.

        Raises:
            BackboneError: a side that is no whole number of patches.
        """
        size = two(img_size)
        for vit in self.branches:
            check_multiple(vit, *size)
        for vit in self.branches:
            vit.set_input_size(img_size=size)
        self.settle()

    def grids(self, height: int, width: int) -> list[Grid]:
        """Rows and columns of the patches of each branch for an image of this size."""
        embeds = [(vit.patch_embed, vit.dynamic_img_size) for vit in self.branches]
        return [e.dynamic_feat_size((height, width)) if dynamic else tuple(e.grid_size) for e, dynamic in embeds]

    def added(self) -> dict[str, int]:
        """What the fusions add to the two ViTs: parameters, and multiply-accumulates for an image of `img_size`."""
        grids = zip(self.grids(*self.img_size), self.branches, strict=True)
        counts = [math.prod(grid) + vit.num_prefix_tokens for grid, vit in grids]
        fusions: list[Any] = list(self.fusions)
        return {
            "parameters": sum(p.numel() for p in self.fusions.parameters()),
            "macs": sum(fusion.macs(*counts) for fusion in fusions),
        }

    def embed(self, vit: Any, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> what the first block of one branch reads, [B, 1 + N, D]."""
        if vit.dynamic_img_size:
            check_multiple(vit, int(x.shape[-2]), int(x.shape[-1]))
        elif tuple(x.shape[-2:]) != tuple(vit.patch_embed.img_size):
            x = F.interpolate(x, vit.patch_embed.img_size, mode="bicubic", align_corners=False)
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))

    def run(self, x: Tensor, count: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Images -> the tokens of both branches after each of the first `count` stages."""
        height, width = int(x.shape[-2]), int(x.shape[-1])
        if not self.dynamic_img_size and (height, width) != self.img_size:
            raise BackboneError(
                f"image of {height}x{width} pixels: the pair was built for {self.img_size[0]}x{self.img_size[1]}; "
                "call set_input_size, or build both ViTs with dynamic_img_size=True"
            )
        grids = self.grids(height, width)
        tokens = [self.embed(vit, x) for vit in self.branches]
        seen: list[tuple[Tensor, Tensor]] = []
        for stage in range(self.stages if count is None else count):
            for i, (vit, k) in enumerate(zip(self.branches, self.every, strict=True)):
                blocks = vit.blocks[stage * k : (stage + 1) * k]
                tokens[i] = checkpoint_seq(blocks, tokens[i]) if self.grad_checkpointing else blocks(tokens[i])
            if len(self.fusions):
                tokens = [*self.fusions[stage](*tokens, grids)]
            seen.append((tokens[0], tokens[1]))
        return seen

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Images [B, in_chans, H, W] -> normalised tokens of both, [B, 1 + N, dim_a] and [B, 1 + M, dim_b]."""
        return [vit.norm(tokens) for vit, tokens in zip(self.branches, self.run(x)[-1], strict=True)]

    def forward_head(self, x: Sequence[Tensor], pre_logits: bool = False) -> Tensor:
        """What `forward_features` gave -> logits, or with `pre_logits` the vector that the classifier reads."""
        vector = torch.cat([vit.forward_head(tokens) for vit, tokens in zip(self.branches, x, strict=True)], dim=1)
        return vector if pre_logits else self.head(vector)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Patches after chosen stages (all if `indices` is None), the branch with the smaller patches first."""
        if output_fmt not in ("NCHW", "NLC"):
            raise BackboneError(f"output_fmt '{output_fmt}': expected NCHW or NLC")
        taken, _ = feature_take_indices(2 * self.levels, indices)  # pyright: ignore[reportArgumentType]
        last = max(index % self.levels for index in taken) + 1
        seen = self.run(x, last if stop_early or intermediates_only else None)
        grids = self.grids(int(x.shape[-2]), int(x.shape[-1]))
        chosen: list[Tensor] = []
        for place, stage in (divmod(index, self.levels) for index in taken):
            branch = self.order[place]
            tokens = self.branches[branch].norm(seen[stage][branch]) if norm else seen[stage][branch]
            patches = tokens[:, self.branches[branch].num_prefix_tokens :]
            chosen.append(patches.transpose(1, 2).unflatten(2, grids[branch]) if output_fmt == "NCHW" else patches)
        if intermediates_only:
            return chosen
        return [vit.norm(tokens) for vit, tokens in zip(self.branches, seen[-1], strict=True)], chosen

    def prune_intermediate_layers(
        self, indices: int | list[int] | tuple[int, ...] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last wanted one, and what reads them."""
        taken, _ = feature_take_indices(2 * self.levels, indices)  # pyright: ignore[reportArgumentType]
        self.stages = max(index % self.levels for index in taken) + 1
        self.fusions = self.fusions[: self.stages]
        for vit, k in zip(self.branches, self.every, strict=True):
            vit.blocks = vit.blocks[: self.stages * k]
            if prune_norm:
                vit.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return taken

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Two fresh classifiers of `num_classes` rows, none if 0; `global_pool` as timm names them."""
        if global_pool == "":
            raise BackboneError(
                "global_pool='': two sequences make no vector without pooling; expected 'token' or 'avg'"
            )
        self.num_classes = num_classes
        for vit in self.branches:
            vit.reset_classifier(0, global_pool)
        like = next(self.parameters())
        linear = [nn.Linear(vit.embed_dim, num_classes).to(like) for vit in self.branches] if num_classes else []
        self.head = PairHead(*linear) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stages: list[tuple[str, tuple[int]]] = []
        for stage in range(self.stages):
            own = ("|".join(str(i) for i in range(stage * k, (stage + 1) * k)) for k in self.every)
            blocks = (rf"{name}\.blocks\.(?:{numbers})\." for name, numbers in zip("ab", own, strict=True))
            stages.append((rf"^(?:{'|'.join(blocks)}|fusions\.{stage}\.)", (stage,)))
        return {
            "stem": r"^[ab]\.(?:cls_token|reg_token|pos_embed|patch_embed|norm_pre)",
            "blocks": [*stages, (r"^[ab]\.(?:norm|fc_norm|attn_pool)", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        names = {f"{branch}.{name}" for branch in "ab" for name in getattr(self, branch).no_weight_decay()}
        return names & dict(self.named_parameters()).keys()
