"""ConViT (d'Ascoli et al., ICML 2021, arXiv 2103.10697): attention that starts as a convolution and may leave it.

In the first layers every head mixes two ways of looking, with a learnt gate lambda_h (equations 7 to 9),

    A_h = (1 - sigma(lambda_h)) softmax(q k^T / sqrt(d)) + sigma(lambda_h) softmax_j(v_h . (dx, dy, dx^2 + dy^2)),

and v_h = -alpha (-2 D_x, -2 D_y, 1) centres head h on an offset D_h at the start: the heads share a sqrt(H) x sqrt(H)
grid, as the taps of a convolution do. The class token joins after these layers. timm has `convit_tiny`, `_small` and
`_base`; here are the published plus sizes, heads of 64, on timm's class, with weights of the same names.
`localize` does the same to a plain timm ViT, and `locality` tells, on a batch, how far every head has left its start.

The position scores are sums of a term in dx and one in dy, so their softmax is an outer product of two small ones: it
is made once for all images, on any H x W grid, in place of scores [B, N, N, 3], and applied by rows and columns.

Departures: a gated layer knows its grid, oblong ones too (timm takes the root of the number of tokens); rows of A are
not divided by their sum, which is 1 already; heads left over by a count that is no square start on the centre, with a
warning. In `localize` values keep their weights (`GatedAttention.local_init` makes them the identity).

When not to use it: with much data the gates buy nothing; where tokens are dropped, merged or added between layers
(`vpt`, `expedit`), since a gated layer needs its whole grid. No pretrained weights of the plus sizes come with foveal.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import copy
import math
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, resample_abs_pos_embed
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs
from timm.models.convit import ConVit
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from foveal.architectures._gated import GatedAttention, HeadLocality, Locality, attention_distance, locality
from foveal.architectures._registry import register_model
from foveal.core.errors import BackboneError

__all__ = [
    "ConViT",
    "GatedAttention",
    "HeadLocality",
    "LocalVit",
    "Locality",
    "attention_distance",
    "locality",
    "localize",
]


def set_grid(model: nn.Module, grid: tuple[int, int]) -> None:
    """Give every gated layer of a model the grid of its patches."""
    for module in model.modules():
        if isinstance(module, GatedAttention) and module.grid != grid:
            module.grid = grid


class ConViT(ConVit):
    """timm's ConVit with layers that know their grid; all its arguments, `img_size=(H, W)` of any shape among them.

    Raises:
        BackboneError: no layer left for the class token to join.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        depth = len(self.blocks)
        if self.local_up_to_layer >= depth:
            raise BackboneError(
                f"convit: local_up_to_layer {self.local_up_to_layer} of {depth} blocks: the class token joins after "
                f"them, expected at most {depth - 1}"
            )
        self.grad_checkpointing = False
        for block in self.blocks[: self.local_up_to_layer]:
            old: Any = block.attn
            new = GatedAttention(
                self.embed_dim, old.num_heads, self.grid_size, old.v.bias is not None,
                locality_strength=self.locality_strength,
            )  # fmt: skip
            new.qk, new.v, new.proj, new.attn_drop, new.proj_drop = (
                old.qk, old.v, old.proj, old.attn_drop, old.proj_drop,
            )  # fmt: skip
            block.attn = new.to(old.proj.weight)

    @property
    def grid_size(self) -> tuple[int, int]:
        """(h, w), the grid of patches."""
        height, width = self.patch_embed.grid_size  # pyright: ignore[reportGeneralTypeIssues]
        return height, width

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take images of another size from now on: position embeddings are interpolated, offsets follow the grid."""
        old = self.grid_size
        self.patch_embed.set_input_size(img_size=img_size)
        self.num_patches = math.prod(self.grid_size)
        if self.use_pos_embed and self.grid_size != old:
            table = resample_abs_pos_embed(
                self.pos_embed.detach(), new_size=list(self.grid_size), old_size=list(old), num_prefix_tokens=0
            )
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        set_grid(self, self.grid_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> tokens [B, 1 + h w, C], normalised, the class token first."""
        tokens: Any = self.patch_embed(x)
        tokens = self.pos_drop(tokens + self.pos_embed if self.use_pos_embed else tokens)
        for index, block in enumerate(self.blocks):
            if index == self.local_up_to_layer and self.cls_token is not None:
                tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
            tokens = checkpoint(block, tokens) if self.grad_checkpointing else block(tokens)
        return self.norm(tokens)


class LocalBlock(Block):
    """timm's block on patches alone, [B, P + h w, C] -> the same: the first `prefix` tokens pass by as they are."""

    prefix: int

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        patches = super().forward(x[:, self.prefix :], attn_mask, is_causal)
        return torch.cat([x[:, : self.prefix], patches], dim=1)


class LocalVit(VisionTransformer):
    """What `localize` makes of timm's ViT: its first blocks gated, with the grid of the image at hand."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3] if x.ndim == 4 else self.patch_embed.grid_size
        set_grid(self, (int(height), int(width)))
        return super()._pos_embed(x)


def localize(
    vit: VisionTransformer,
    n_layers: int = 10,
    strength: float = 1.0,
    gate: float = 1.0,
    keep_positions: bool = True,
) -> LocalVit:
    """A copy of a ViT with gated positional self-attention in its first blocks; prefix tokens join after them.

    Query, key, value and output weights stay; five numbers a head and layer are new. Class and register tokens pass by
    the gated blocks and their MLPs, as if they were added behind. To load a stored one, localize a ViT of the same
    architecture and load its state dict.

    Args:
        vit: timm's `VisionTransformer`; never changed.
        n_layers: how many blocks.
        strength: alpha, above 0: the higher, the sharper a head looks at its offset.
        gate: lambda at the start; sigma(lambda) is the share of position, e.g. -4 to leave a pretrained net nearly as
            it was.
        keep_positions: whether patches keep their absolute position embeddings.

    Raises:
        BackboneError: another model, blocks or attention of another kind, more blocks than leave the class token one to
            join, or patches dropped at random.
    """
    if type(vit) is not VisionTransformer:
        raise BackboneError(f"localize takes timm's VisionTransformer, not {type(vit).__name__}")
    depth, prefix = len(vit.blocks), vit.num_prefix_tokens
    most = depth - 1 if prefix else depth
    if not 1 <= n_layers <= most:
        why = f"{prefix} prefix token{'s'[: prefix > 1]} must have a block left to join" if prefix else "all it has"
        raise BackboneError(f"n_layers {n_layers} of {depth} blocks: expected 1 to {most}, {why}")
    if not isinstance(vit.patch_drop, nn.Identity):
        raise BackboneError("this ViT drops patches at random (patch_drop_rate): a grid with holes has no offsets")
    model: Any = copy.deepcopy(vit)
    for index in range(n_layers):
        block: Any = model.blocks[index]
        old: Any = getattr(block, "attn", None)
        if (type(block), type(old)) != (Block, Attention) or old.gate is not None:
            raise BackboneError(
                f"block {index} is {type(block).__name__} with {type(old).__name__}: expected timm's plain Block and "
                "Attention, without an output gate"
            )
        if old.attn_dim != old.proj.out_features:
            raise BackboneError(
                f"block {index}: {old.attn_dim} channels of attention, {old.proj.out_features} of tokens"
            )
        block.attn = gated(old, model.patch_embed.grid_size, strength, gate)
        block.__class__ = LocalBlock
        block.prefix = prefix
    if not keep_positions and model.pos_embed is not None:
        if not model.no_embed_class:  # what prefix tokens have there is no place: it becomes part of them
            with torch.no_grad():
                if model.cls_token is not None:
                    model.cls_token += model.pos_embed[:, :1]
                if model.reg_token is not None:
                    model.reg_token += model.pos_embed[:, prefix - model.num_reg_tokens : prefix]
        model.pos_embed = None
    model.__class__ = LocalVit
    return model


def gated(old: Attention, grid: tuple[int, int], strength: float, gate: float) -> GatedAttention:
    """timm's attention as a gated layer with the same weights."""
    dim, bias = old.proj.out_features, old.qkv.bias
    new = GatedAttention(dim, old.num_heads, grid, bias is not None, locality_strength=strength, gate=gate)
    with torch.no_grad():
        for part, rows in ((new.qk, slice(0, 2 * dim)), (new.v, slice(2 * dim, None))):
            part.weight = nn.Parameter(old.qkv.weight[rows].clone(), old.qkv.weight.requires_grad)
            if bias is not None:
                part.bias = nn.Parameter(bias[rows].clone(), bias.requires_grad)
    new.q_norm, new.k_norm, new.norm, new.proj = old.q_norm, old.k_norm, old.norm, old.proj
    new.attn_drop, new.proj_drop = old.attn_drop, old.proj_drop
    return new.to(old.proj.weight).train(old.training)


default_cfgs = generate_default_cfgs(
    {
        f"convit_{size}_plus": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": None,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "paper_ids": "arXiv:2103.10697",
            "paper_name": "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
            "origin_url": "https://github.com/facebookresearch/convit",
        }
        for size in ("tiny", "small", "base")
    }
)


def create(variant: str, pretrained: bool, given: dict[str, Any], num_heads: int) -> ConViT:
    defaults = {"embed_dim": 64, "num_heads": num_heads, "local_up_to_layer": 10}
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(ConViT, variant, pretrained, feature_cfg=feature_cfg, **{**defaults, **given})


@register_model
def convit_tiny_plus(pretrained: bool = False, **kwargs: Any) -> ConViT:
    """`embed_dim` is the width of a head, as in timm's ConViT."""
    return create("convit_tiny_plus", pretrained, kwargs, num_heads=4)


@register_model
def convit_small_plus(pretrained: bool = False, **kwargs: Any) -> ConViT:
    return create("convit_small_plus", pretrained, kwargs, num_heads=9)


@register_model
def convit_base_plus(pretrained: bool = False, **kwargs: Any) -> ConViT:
    return create("convit_base_plus", pretrained, kwargs, num_heads=16)
