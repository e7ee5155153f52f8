"""T2T-ViT (Yuan et al., ICCV 2021, arXiv 2101.11986): a ViT whose tokens overlap, on a deep and narrow trunk.

A soft split takes every k x k window of a map as one long token, so that neighbours share pixels; a token layer mixes
the tokens and shortens them to 64 numbers; they are laid out as a map again. Three splits (7/4, 3/2, 3/2) make 14 x 14
tokens of 224 x 224 pixels. The token layer is attention, O(N^2), or Performer's positive random features, O(N):

    y = v + W_p [ phi(q) (phi(k)^T v) / (phi(q) sum phi(k)) ],    phi(a) = exp(w a - |a|^2 / 2) / sqrt(m).

The trunk is timm's ViT without bias on queries, keys and values, under a table of sines that is never trained.
`T2TModule` has the interface of timm's `PatchEmbed`: it can be the `embed_layer` of any timm ViT.

Departures: phi runs in float32 and subtracts the largest exponent (the quotient is the same; the authors' form
overflows in half precision and for long keys); H x W images, not squares alone; dropout 0.1 of the token layers only
where `proj_drop_rate` asks for it. `qk_scale` is d_model^-0.5 in the authors' released weights, against
head_dim^-0.5 here and in the paper: give it when loading those, accuracy halves silently without it.

When not to use it: with pretrained weights of a plain ViT at hand (none come with foveal for this one); as an
approximation of softmax attention (32 random features are far too few; the token layer learns around that); where the
first token layer, on 3,136 tokens at 224 pixels, is too slow for the device.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, Format, Mlp, nchw_to, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from foveal.architectures._registry import register_model
from foveal.core.errors import BackboneError

PATCH = 16


def sinusoids(rows: int, width: int) -> Tensor:
    """Table [1, rows, width]: sin and cos, taking turns, of row / 10000^(2 i / width) for i = 0, 0, 1, 1, ..."""
    rate = 10000.0 ** (-2 * (torch.arange(width) // 2).double() / width)
    angle = torch.arange(rows).double()[:, None] * rate
    even = (torch.arange(width) % 2 == 0)[None]
    return torch.where(even, angle.sin(), angle.cos()).float()[None]


def positive_features(a: Tensor, w: Tensor, over: tuple[int, ...]) -> Tensor:
    """exp(w a - |a|^2 / 2 - c) / sqrt(m): [B, N, d] and w [m, d] -> [B, N, m], float32, all of it at least 0.

    c is the largest exponent over the dimensions `over`, so that nothing overflows; it cancels in the quotient of
    `performer_attention`.
    """
    a, w = a.float(), w.float()
    exponent = a @ w.transpose(-2, -1) - a.square().sum(-1, keepdim=True) / 2
    return (exponent - exponent.amax(over, keepdim=True).detach()).exp() / math.sqrt(len(w))


def performer_attention(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Tokens q, k [B, N, d] and v [B, N, c] -> [B, N, c], each a mean of v under positive weights; O(N) memory.

    Args:
        w: random features [m, d].
    """
    phi_q, phi_k = positive_features(q, w, (2,)), positive_features(k, w, (1, 2))
    total = phi_q @ phi_k.sum(1).unsqueeze(-1)
    return ((phi_q @ (phi_k.transpose(-2, -1) @ v.float())) / (total + 1e-20)).to(v.dtype)


def as_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens [B, N, d], row by row -> map [B, d, height, width]."""
    return tokens.transpose(1, 2).reshape(-1, tokens.shape[2], height, width)


class PerformerLayer(nn.Module):
    """Token layer [B, N, D] -> [B, N, width] by random features, O(N)."""

    def __init__(self, dim: int, width: int = 64, drop: float = 0.0, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.kqv = nn.Linear(dim, 3 * width, **dd)
        self.proj = nn.Linear(width, width, **dd)
        self.drop = nn.Dropout(drop)
        self.norm2 = nn.LayerNorm(width, **dd)
        self.mlp = Mlp(width, width, drop=drop, **dd)
        self.w = nn.Parameter(torch.empty(width // 2, width, **dd), requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthogonal rows of length sqrt(m), drawn once and never trained."""
        nn.init.orthogonal_(self.w, gain=math.sqrt(len(self.w)))

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        y = v + self.drop(self.proj(performer_attention(q, k, v, self.w.detach())))
        return y + self.mlp(self.norm2(y))


class TransformerLayer(nn.Module):
    """Token layer [B, N, D] -> [B, N, width] by one head of softmax attention with scale D^-0.5."""

    def __init__(self, dim: int, width: int = 64, drop: float = 0.0, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.qkv = nn.Linear(dim, 3 * width, bias=False, **dd)
        self.scale = dim**-0.5
        self.proj = nn.Linear(width, width, **dd)
        self.drop = nn.Dropout(drop)
        self.norm2 = nn.LayerNorm(width, **dd)
        self.mlp = Mlp(width, width, drop=drop, **dd)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        y = v + self.drop(self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale)))
        return y + self.mlp(self.norm2(y))


TOKEN_LAYERS: dict[str, type[nn.Module]] = {"performer": PerformerLayer, "transformer": TransformerLayer}


class T2TModule(nn.Module):
    """Images [B, in_chans, H, W] -> tokens [B, H W / 256, embed_dim], with the interface of timm's `PatchEmbed`.

    Args:
        tokens_type: 'performer' or 'transformer'.
        token_dim: width of the tokens between the splits.
        output_fmt: 'NCHW' or 'NHWC' gives a map instead.
        strict_img_size: refuse every size but `img_size`; otherwise any multiple of 16 is taken.

    Raises:
        BackboneError: an unknown token type, another patch size than 16, or an image side that 16 does not divide.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = PATCH,
        in_chans: int = 3,
        embed_dim: int = 384,
        tokens_type: str = "performer",
        token_dim: int = 64,
        drop: float = 0.0,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        if tokens_type not in TOKEN_LAYERS:
            raise BackboneError(f"tokens_type '{tokens_type}' is unknown: expected one of {', '.join(TOKEN_LAYERS)}")
        if to_2tuple(patch_size) != (PATCH, PATCH):
            raise BackboneError(f"patch_size {patch_size}: the three soft splits make patches of {PATCH}, no other")
        if dynamic_img_pad:
            raise BackboneError("dynamic_img_pad: soft splits pad by themselves; resize to multiples of 16 pixels")
        self.patch_size = (PATCH, PATCH)
        self.flatten = flatten and output_fmt is None
        self.output_fmt = Format(output_fmt or "NCHW")
        self.strict_img_size = strict_img_size
        layer = TOKEN_LAYERS[tokens_type]
        self.attention1 = layer(7 * 7 * in_chans, token_dim, drop, **dd)
        self.attention2 = layer(3 * 3 * token_dim, token_dim, drop, **dd)
        self.project = nn.Linear(3 * 3 * token_dim, embed_dim, bias=bias, **dd)
        self.set_input_size(img_size)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Expect images of another size; no weight depends on it."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise BackboneError(f"patch_size {patch_size}: the three soft splits make patches of {PATCH}, no other")
        height, width = (int(side) for side in to_2tuple(self.img_size if img_size is None else img_size))
        self.check_multiple(height, width)
        self.img_size = (height, width)
        self.grid_size = (height // PATCH, width // PATCH)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def check_multiple(self, height: int, width: int) -> None:
        if min(height, width) < PATCH or height % PATCH or width % PATCH:
            raise BackboneError(f"image of {height}x{width} pixels: T2T-ViT needs sides that are multiples of {PATCH}")

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        return PATCH if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        return img_size[0] // PATCH, img_size[1] // PATCH

    def forward(self, x: Tensor) -> Tensor:
        height, width = int(x.shape[-2]), int(x.shape[-1])
        self.check_multiple(height, width)
        if self.strict_img_size and (height, width) != self.img_size:
            raise BackboneError(
                f"image of {height}x{width} pixels: the model was built for {self.img_size[0]}x{self.img_size[1]}; "
                "call set_input_size, or build it with dynamic_img_size=True"
            )
        x = F.unfold(x, 7, stride=4, padding=2).transpose(-2, -1)
        x = as_map(self.attention1(x), height // 4, width // 4)
        x = F.unfold(x, 3, stride=2, padding=1).transpose(-2, -1)
        x = as_map(self.attention2(x), height // 8, width // 8)
        x = self.project(F.unfold(x, 3, stride=2, padding=1).transpose(-2, -1))
        if self.flatten:
            return x
        return nchw_to(as_map(x, height // PATCH, width // PATCH), self.output_fmt)


class Temper(nn.Module):
    """Multiply by a fixed number; on the queries of an attention layer it sets its scale."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class T2TViT(VisionTransformer):
    """T2T-ViT; arguments not named here are those of timm's `VisionTransformer`.

    Args:
        tokens_type: 'performer' or 'transformer'.
        qk_scale: of the trunk's attention; None for head_dim^-0.5.

    Raises:
        BackboneError: as `T2TModule`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        tokens_type: str = "performer",
        token_dim: int = 64,
        qk_scale: float | None = None,
        qkv_bias: bool = False,
        proj_drop_rate: float = 0.0,
        norm_layer: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            img_size=img_size,
            qkv_bias=qkv_bias,
            proj_drop_rate=proj_drop_rate,
            norm_layer=norm_layer or partial(nn.LayerNorm, eps=1e-5),
            embed_layer=partial(T2TModule, tokens_type=tokens_type, token_dim=token_dim, drop=proj_drop_rate),
            **kwargs,
        )
        self.pos_embed = self.table()
        if qk_scale is not None:
            for block in self.blocks:
                attention: Any = block.attn
                assert isinstance(attention, Attention)
                attention.q_norm = nn.Sequential(attention.q_norm, Temper(qk_scale * attention.head_dim**0.5))

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset)
        self.pos_embed = self.table()

    def table(self) -> nn.Parameter:
        """The table of sines for the present grid, frozen, on the model's device."""
        grid: Any = self.patch_embed
        rows = grid.num_patches + (0 if self.no_embed_class else self.num_prefix_tokens)
        table = sinusoids(rows, self.embed_dim).to(grid.project.weight)
        return nn.Parameter(table, requires_grad=False)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take images of another size from now on; the table of sines is made anew, not interpolated."""
        super().set_input_size(img_size, patch_size)
        self.pos_embed = self.table()

    def _pos_embed(self, x: Tensor) -> Tensor:
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        tokens = x.flatten(1, -2)
        if not self.no_embed_class:
            tokens = torch.cat([*prefix, tokens], dim=1)
        assert self.pos_embed is not None
        if tokens.shape[1] == self.pos_embed.shape[1]:
            table = self.pos_embed.detach()
        else:
            table = sinusoids(int(tokens.shape[1]), self.embed_dim).to(tokens)
        tokens = tokens + table
        return self.pos_drop(torch.cat([*prefix, tokens], dim=1) if self.no_embed_class else tokens)

    def no_weight_decay(self) -> set[str]:
        names = {"pos_embed", "cls_token", "reg_token", "patch_embed.attention1.w", "patch_embed.attention2.w"}
        return names & dict(self.named_parameters()).keys()


def _cfg(**more: Any) -> dict[str, Any]:
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
        "first_conv": None,
        "classifier": "head",
        "paper_ids": "arXiv:2101.11986",
        "paper_name": "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet",
        "origin_url": "https://github.com/yitu-opensource/T2T-ViT",
        **more,
    }


LITE = ("7", "10", "12")
DEEP = ("14", "19", "24", "t_14", "t_19", "t_24", "14_resnext", "14_wide")
default_cfgs = generate_default_cfgs({f"t2t_vit_{size}": _cfg() for size in (*LITE, *DEEP)})


def create(variant: str, pretrained: bool, given: dict[str, Any], **defaults: Any) -> T2TViT:
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(T2TViT, variant, pretrained, feature_cfg=feature_cfg, **{**defaults, **given})


@register_model
def t2t_vit_7(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    return create("t2t_vit_7", pretrained, kwargs, embed_dim=256, depth=7, num_heads=4, mlp_ratio=2.0)


@register_model
def t2t_vit_10(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    return create("t2t_vit_10", pretrained, kwargs, embed_dim=256, depth=10, num_heads=4, mlp_ratio=2.0)


@register_model
def t2t_vit_12(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    return create("t2t_vit_12", pretrained, kwargs, embed_dim=256, depth=12, num_heads=4, mlp_ratio=2.0)


@register_model
def t2t_vit_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    return create("t2t_vit_14", pretrained, kwargs, embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0)


@register_model
def t2t_vit_19(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    return create("t2t_vit_19", pretrained, kwargs, embed_dim=448, depth=19, num_heads=7, mlp_ratio=3.0)


@register_model
def t2t_vit_24(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    return create("t2t_vit_24", pretrained, kwargs, embed_dim=512, depth=24, num_heads=8, mlp_ratio=3.0)


@register_model
def t2t_vit_t_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-14 with softmax attention between the splits."""
    shape: dict[str, Any] = {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0}
    return create("t2t_vit_t_14", pretrained, kwargs, tokens_type="transformer", **shape)


@register_model
def t2t_vit_t_19(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    shape: dict[str, Any] = {"embed_dim": 448, "depth": 19, "num_heads": 7, "mlp_ratio": 3.0}
    return create("t2t_vit_t_19", pretrained, kwargs, tokens_type="transformer", **shape)


@register_model
def t2t_vit_t_24(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    shape: dict[str, Any] = {"embed_dim": 512, "depth": 24, "num_heads": 8, "mlp_ratio": 3.0}
    return create("t2t_vit_t_24", pretrained, kwargs, tokens_type="transformer", **shape)


@register_model
def t2t_vit_14_resnext(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-14 with 32 heads of 12 channels."""
    return create("t2t_vit_14_resnext", pretrained, kwargs, embed_dim=384, depth=14, num_heads=32, mlp_ratio=3.0)


@register_model
def t2t_vit_14_wide(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """Four blocks of width 768: the paper's shallow and wide comparison."""
    return create("t2t_vit_14_wide", pretrained, kwargs, embed_dim=768, depth=4, num_heads=12, mlp_ratio=3.0)
