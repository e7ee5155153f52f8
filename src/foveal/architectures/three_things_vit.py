"""Three things for any plain ViT (Touvron et al., ECCV 2022, arXiv 2203.09795): parallel blocks, attention, hMLP stem.

1. Neighbouring blocks side by side: half the steps, the same weights, parameters and multiply-accumulates,

       x <- x + A_1(x) + A_2(x),   then   x <- x + F_1(x) + F_2(x),

   each branch with its own norm, layer scale and drop-path. timm has the block and `vit_small_patch16_18x2_224`,
   `vit_base_patch16_18x2_224`; `parallelize` makes one of any sequential ViT. The outputs differ by the order of the
   product of two layer scales: train on afterwards. `merge_branches` then makes each pair of branches one wide one,
   with equal outputs: norms go into the matrices, matrices stand side by side. Without it the branches run one after
   the other in PyTorch and ONNX Runtime, and no step is saved.
2. Fine-tuning attention alone, a third of the weights: the method `attention-only`, which also stores what changed.
3. `HMlpStem`: patches by convolutions of 4, 2 and 2 pixels that never overlap, with batch norm and GELU. Each token
   is a small MLP of its own patch, so that masking tokens is masking patches, as BeiT and MAE want it.

`vit_*_patch16_hmlp_224` and the paper's 48 small blocks (`vit_small_patch16_48x1_224` and `24x2`) are registered;
`HMlpStem` is an `embed_layer` for any other timm ViT. Departures: timm's ViTs give the class token a position, the
authors' do not; batch norm is synchronised across devices only after `nn.SyncBatchNorm.convert_sync_batchnorm`.

When not to use it: parallel blocks where arithmetic takes the time (many tokens, large batches, few cores), which stays
as it was; on a trained ViT without layer scale unless you can fine-tune for long, since its answers are gone at first;
the stem for supervised training alone, where the paper finds no gain.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, LayerScale, Mlp, PatchEmbed, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.vision_transformer import Block, ParallelThingsBlock, VisionTransformer
from torch import Tensor, nn

from foveal.architectures._pyramid import refuse_pretrained
from foveal.architectures._registry import register_model
from foveal.core.errors import BackboneError


class HMlpStem(PatchEmbed):
    """Images [B, in_chans, H, W] -> tokens [B, H W / P^2, embed_dim], each of its own patch of P x P pixels alone.

    Convolutions with kernels as large as their strides, batch norm after each, GELU between. Arguments not named here
    are those of timm's `PatchEmbed`, which it stands in for: `VisionTransformer(embed_layer=HMlpStem)`.

    Args:
        factors: strides of the convolutions, whose product is the patch size.

    Raises:
        BackboneError: factors that do not make the patch size, or a width that 4 does not divide. In training mode, a
            batch of one image, which has no statistics of its own.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        factors: Sequence[int] = (4, 2, 2),
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        made = math.prod(factors)
        if to_2tuple(patch_size) != (made, made) or min(factors) < 1:
            raise BackboneError(
                f"patch_size {patch_size}: the factors {tuple(factors)} make patches of {made}; give factors whose "
                "product it is, such as (4, 2, 2) for 16 or (7, 2) for 14"
            )
        if embed_dim % 4:
            raise BackboneError(f"embed_dim {embed_dim}: the hidden layers have a quarter of it, use a multiple of 4")
        dd: Any = {"device": device, "dtype": dtype}
        super().__init__(img_size, made, in_chans, embed_dim, bias=bias, **kwargs, **dd)
        layers: list[nn.Module] = []
        width = in_chans
        for index, factor in enumerate(factors):
            last = index == len(factors) - 1
            out = embed_dim if last else embed_dim // 4
            layers += [nn.Conv2d(width, out, factor, factor, bias=bias, **dd), nn.BatchNorm2d(out, **dd)]
            layers += [] if last else [nn.GELU()]
            width = out
        self.proj: nn.Module = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1 and any(type(each) is nn.BatchNorm2d for each in self.proj.modules()):
            raise BackboneError(
                "1 image in training mode: the batch norms of the hMLP stem need at least 2; use larger batches, "
                "nn.SyncBatchNorm across devices, or eval()"
            )
        return super().forward(x)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take images of another size from now on.

        Raises:
            BackboneError: another patch size.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise BackboneError(
                f"patch_size {patch_size}: the kernels of an hMLP stem make patches of {self.patch_size[0]} and cannot "
                "be resampled; build a new one with other factors"
            )
        super().set_input_size(img_size=img_size)


def parallelize(vit: nn.Module, k: int = 2) -> Any:
    """A copy of a sequential ViT with every `k` neighbouring blocks side by side, in timm's `ParallelThingsBlock`.

    Weights, parameters and multiply-accumulates stay; one k-th of the blocks is left. The outputs change, by as much as
    the layer scales are large: with all of them 0 not at all.

    Args:
        vit: of timm, with `blocks` that are timm's `Block`s, norm first (plain ViT, DeiT, CLIP, DINOv2, ...).

    Raises:
        BackboneError: other blocks, already parallel ones, or a number of them that `k` does not divide.
    """
    blocks = blocks_of(vit)
    if isinstance(blocks[0], ParallelThingsBlock):
        raise BackboneError(
            f"{name_of(vit)} is already parallel ({len(blocks)}x{blocks[0].num_parallel}): give the sequential one"
        )
    if not all(isinstance(each, Block) and type(each).forward is Block.forward for each in blocks):
        raise BackboneError(
            f"{name_of(vit)} has blocks of {type(blocks[0]).__name__}: parallelize needs timm's Block, attention then "
            "MLP with norms before them, as in vit_small_patch16_224"
        )
    divisors = [each for each in range(2, len(blocks) + 1) if len(blocks) % each == 0]
    if k not in divisors:
        able = f"k may be {', '.join(map(str, divisors))}" if divisors else "one alone has no neighbour"
        raise BackboneError(f"{name_of(vit)} has {len(blocks)} blocks, which cannot stand {k} by {k}: {able}")
    made: Any = copy.deepcopy(vit)
    return with_blocks(made, [side_by_side(made.blocks[start : start + k]) for start in range(0, len(blocks), k)])


def side_by_side(blocks: Sequence[Any]) -> ParallelThingsBlock:
    """One parallel block of the parts of sequential ones, which are moved, not copied."""
    made = ParallelThingsBlock(dim=1, num_heads=1, num_parallel=0)
    made.num_parallel = len(blocks)
    for each in blocks:
        attention = {"norm": each.norm1, "attn": each.attn, "ls": each.ls1, "drop_path": each.drop_path1}
        mlp = {"norm": each.norm2, "mlp": each.mlp, "ls": each.ls2, "drop_path": each.drop_path2}
        made.attns.append(nn.Sequential(OrderedDict(attention)))
        made.ffns.append(nn.Sequential(OrderedDict(mlp)))
    return made


@torch.no_grad()
def merge_branches(vit: nn.Module) -> Any:
    """A copy of a parallel ViT whose branches are one: timm's `Block`s with k times the heads and hidden units.

    In eval mode it gives the same outputs, with one matrix product where there were k; norms and layer scales are in
    the matrices, so a few parameters are gone. Dropout and drop-path are left out: it is the form to run.

    Raises:
        BackboneError: no parallel blocks, or ones with layers that the branches cannot share (norms of queries and
            keys, gates, norms without centring).
    """
    if not all(isinstance(each, ParallelThingsBlock) for each in blocks_of(vit)):
        raise BackboneError(f"{name_of(vit)} has no parallel blocks to merge: parallelize it first")
    made: Any = copy.deepcopy(vit)
    for each in made.blocks:
        check_mergeable(each, name_of(vit))
    return with_blocks(made, [merged(each) for each in made.blocks])


def check_mergeable(block: Any, name: str) -> None:
    for attention, mlp in zip(block.attns, block.ffns, strict=True):
        a, f = attention.attn, mlp.mlp
        plain = type(a) is Attention and type(f) is Mlp and isinstance(f.fc1, nn.Linear)
        norms = (attention.norm, mlp.norm)
        if not plain or not all(isinstance(each, nn.LayerNorm) and each.elementwise_affine for each in norms):
            raise BackboneError(f"{name}: branches of {type(a).__name__} and {type(f).__name__} cannot be merged")
        own = (a.q_norm, a.k_norm, a.norm, f.norm)
        if a.gate is not None or not all(isinstance(each, nn.Identity) for each in own):
            raise BackboneError(f"{name}: branches with norms or gates of their own inside cannot be merged")


def merged(block: Any) -> Block:
    """The block [B, N, d] -> [B, N, d] that computes what the branches of a parallel one sum up to."""
    first, like = block.attns[0], block.attns[0].attn.qkv.weight
    dim, heads, size = like.shape[1], sum(each.attn.num_heads for each in block.attns), first.attn.head_dim
    made: Any = Block(dim=1, num_heads=1)
    made.norm1, made.norm2 = bare(first.norm), bare(block.ffns[0].norm)
    made.attn = Attention(dim, heads, attn_head_dim=size, qkv_bias=True).to(like)
    rows = [entering(each.norm, each.attn.qkv, 3) for each in block.attns]
    put(made.attn.qkv, torch.cat([w for w, _ in rows], 1).flatten(0, 1), torch.cat([b for _, b in rows], 1).flatten())
    columns = [leaving(each.attn.proj, each.ls) for each in block.attns]
    put(made.attn.proj, torch.cat([w for w, _ in columns], 1), torch.stack([b for _, b in columns]).sum(0))
    rows = [entering(each.norm, each.mlp.fc1) for each in block.ffns]
    columns = [leaving(each.mlp.fc2, each.ls) for each in block.ffns]
    hidden = sum(w.shape[1] for w, _ in rows)
    made.mlp = Mlp(dim, hidden).to(like)
    made.mlp.act = block.ffns[0].mlp.act
    put(made.mlp.fc1, torch.cat([w for w, _ in rows], 1)[0], torch.cat([b for _, b in rows], 1)[0])
    put(made.mlp.fc2, torch.cat([w for w, _ in columns], 1), torch.stack([b for _, b in columns]).sum(0))
    return made


def bare(norm: Any) -> Any:
    """A norm without scale and shift of its own: weight 1, bias 0."""
    norm = copy.deepcopy(norm)
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)
    return norm


def entering(norm: Any, linear: nn.Linear, parts: int = 1) -> tuple[Tensor, Tensor]:
    """W diag(g) [parts, out, d] and W b + c [parts, out], in float64: a linear layer that reads a bare norm."""
    w, scale, shift = linear.weight.double(), norm.weight.double(), norm.bias.double()
    bias = w @ shift if linear.bias is None else w @ shift + linear.bias.double()
    return (w * scale).unflatten(0, (parts, -1)), bias.unflatten(0, (parts, -1))


def leaving(linear: nn.Linear, scale: nn.Module) -> tuple[Tensor, Tensor]:
    """diag(s) W [d, in] and s c [d], in float64: a linear layer with the layer scale behind it."""
    gamma = scale.gamma.double() if isinstance(scale, LayerScale) else linear.weight.new_ones(()).double()
    bias = linear.weight.new_zeros(len(linear.weight)).double() if linear.bias is None else linear.bias.double()
    return linear.weight.double() * gamma.reshape(-1, 1), bias * gamma


def put(linear: Any, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


def blocks_of(vit: Any) -> list[nn.Module]:
    """
    Raises:
        BackboneError: no sequence of blocks.
    """
    if not isinstance(getattr(vit, "blocks", None), nn.Sequential | nn.ModuleList) or len(vit.blocks) == 0:
        raise BackboneError(f"{name_of(vit)} has no sequence of blocks: expected a ViT such as vit_small_patch16_224")
    return list(vit.blocks)


def name_of(vit: Any) -> str:
    return (getattr(vit, "default_cfg", None) or {}).get("architecture") or type(vit).__name__


def with_blocks(vit: Any, blocks: list[nn.Module]) -> Any:
    """The model itself with other blocks, in the mode it was in; its taps for feature maps follow."""
    vit.blocks = nn.Sequential(*blocks).train(vit.training)
    vit.feature_info = [{**vit.feature_info[0], "module": f"blocks.{index}"} for index in range(len(blocks))]
    return vit


def _cfg(first_conv: str = "patch_embed.proj") -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "head",
        "paper_ids": "arXiv:2203.09795",
        "paper_name": "Three things everyone should know about Vision Transformers",
        "origin_url": "https://github.com/facebookresearch/deit",
    }


default_cfgs = generate_default_cfgs(
    {
        **{f"vit_small_patch16_{blocks}_224": _cfg() for blocks in ("48x1", "24x2")},
        **{f"vit_{size}_patch16_hmlp_224": _cfg("patch_embed.proj.0") for size in ("tiny", "small", "base", "large")},
    }
)


def create(variant: str, pretrained: bool, given: dict[str, Any], **defaults: Any) -> VisionTransformer:
    refuse_pretrained(variant, pretrained, given)
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(
        VisionTransformer, variant, pretrained, feature_cfg=feature_cfg, **{**defaults, **given}
    )


@register_model
def vit_small_patch16_48x1_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """48 small blocks, one after the other."""
    shape: dict[str, Any] = {"embed_dim": 384, "depth": 48, "num_heads": 6, "init_values": 1e-4}
    return create("vit_small_patch16_48x1_224", pretrained, kwargs, **shape)


@register_model
def vit_small_patch16_24x2_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """48 small blocks, two by two."""
    shape: dict[str, Any] = {"embed_dim": 384, "depth": 24, "num_heads": 6, "init_values": 1e-4}
    return create("vit_small_patch16_24x2_224", pretrained, kwargs, **shape, block_fn=ParallelThingsBlock)


@register_model
def vit_tiny_patch16_hmlp_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    shape: dict[str, Any] = {"embed_dim": 192, "depth": 12, "num_heads": 3, "embed_layer": HMlpStem}
    return create("vit_tiny_patch16_hmlp_224", pretrained, kwargs, **shape)


@register_model
def vit_small_patch16_hmlp_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    shape: dict[str, Any] = {"embed_dim": 384, "depth": 12, "num_heads": 6, "embed_layer": HMlpStem}
    return create("vit_small_patch16_hmlp_224", pretrained, kwargs, **shape)


@register_model
def vit_base_patch16_hmlp_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    shape: dict[str, Any] = {"embed_dim": 768, "depth": 12, "num_heads": 12, "embed_layer": HMlpStem}
    return create("vit_base_patch16_hmlp_224", pretrained, kwargs, **shape)


@register_model
def vit_large_patch16_hmlp_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    shape: dict[str, Any] = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "embed_layer": HMlpStem}
    return create("vit_large_patch16_hmlp_224", pretrained, kwargs, **shape)
