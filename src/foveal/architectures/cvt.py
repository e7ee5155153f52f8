"""CvT (Wu et al., ICCV 2021, arXiv 2103.15808): a vision transformer in three stages that needs no position embedding.

Tokens come from overlapping convolutions, and queries, keys and values each from a depthwise 3x3 one, so that places
are known by their surroundings:

    q, k, v = W DW(x),    softmax(q k^T / sqrt(d)) v,    d the full width, not a head's,

with stride 2 on keys and values: a quarter of them. A class token joins in the last stage, past the convolutions. No
weight depends on the image size; any from 32 pixels works. `checkpoint_filter_fn` takes the names of the published
checkpoints and of their Hugging Face form; `reparameterize()` folds the projections' batch norms.
Departures: `global_pool='avg'` reads the mean of the patch tokens instead of the class token. The published code
gates with x sigmoid(1.702 x), the Hugging Face port with the exact GELU: `act_layer` chooses.

When not to use it: for dense tasks at stride 32 (its last map has stride 16, and attends to all of it: memory grows
with the fourth power of the side); where depthwise convolutions and batch norm between projections cost latency. No
pretrained weights come with foveal.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, LayerNorm2d, Mlp, calculate_drop_path_rates, get_act_layer, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs
from torch import Tensor, nn

from foveal.architectures._pyramid import Pyramid, Stage, build_pyramid, cfg
from foveal.architectures._registry import register_model
from foveal.core.errors import BackboneError


def to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """The last H W of tokens [B, P + H W, C] -> map [B, C, H, W]."""
    return tokens[:, -size[0] * size[1] :].transpose(1, 2).reshape(-1, tokens.shape[2], *size)


class ConvProjection(nn.Module):
    """Depthwise 3x3 convolution and batch norm: maps [B, C, H, W] -> tokens [B, N, C].

    The norm sees [B, C, N]: behind a 2-D norm, torch 2.15 gets the gradients of a single image wrong on a CPU when they
    come back in the order of tokens.
    """

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride, 1, groups=dim, bias=False)
        self.bn: nn.Module = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).flatten(2)).transpose(1, 2)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold the batch norm, as it is in eval mode, into the convolution."""
        if not isinstance(self.bn, nn.BatchNorm1d):
            return
        assert self.bn.running_mean is not None
        assert self.bn.running_var is not None
        scale = self.bn.weight.double() / (self.bn.running_var.double() + self.bn.eps).sqrt()
        shift = self.bn.bias.double() - self.bn.running_mean.double() * scale
        self.conv.weight.copy_(self.conv.weight.double() * scale[:, None, None, None])
        self.conv.bias = nn.Parameter(shift.to(self.conv.weight.dtype))
        self.bn = nn.Identity()


class ConvAttention(nn.Module):
    """Attention with convolutional projections: tokens [B, P + H W, C] -> the same, P prefix tokens past the maps.

    Raises:
        BackboneError: heads that do not divide the channels.
    """

    def __init__(self, dim: int, heads: int, stride_kv: int = 2) -> None:
        super().__init__()
        if dim % heads:
            raise BackboneError(f"cvt: {heads} heads do not divide {dim} channels")
        self.heads, self.scale = heads, dim**-0.5
        self.conv_q = ConvProjection(dim, 1)
        self.conv_k = ConvProjection(dim, stride_kv)
        self.conv_v = ConvProjection(dim, stride_kv)
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        prefix, maps = tokens[:, : -size[0] * size[1]], to_map(tokens, size)
        q, k, v = (
            linear(torch.cat([prefix, conv(maps)], dim=1)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, conv in ((self.q, self.conv_q), (self.k, self.conv_k), (self.v, self.conv_v))
        )
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class CvtBlock(nn.Module):
    """x + attention(LN x), then x + MLP(LN x), on tokens [B, P + H W, C] of a map of the given size."""

    def __init__(self, dim: int, heads: int, stride_kv: int, act_layer: str, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=1e-5)
        self.attn = ConvAttention(dim, heads, stride_kv)
        self.norm2 = LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, 4 * dim, act_layer=get_act_layer(act_layer))  # pyright: ignore[reportArgumentType]
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), size))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class CvtStage(Stage):
    """Embedding, then blocks on tokens, a class token before them if asked: map [B, C, H, W] -> map, and tokens."""

    def __init__(self, embed: nn.Module, blocks: Sequence[nn.Module], dim: int, cls_token: bool) -> None:
        super().__init__(embed, blocks)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if cls_token else None

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map -> (tokens [B, P + H W, C], the map [B, C, H, W] of all but the prefix)."""
        x = self.downsample(x)
        size = (int(x.shape[2]), int(x.shape[3]))
        tokens = x.flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        for block in self.blocks:
            if self.grad_checkpointing:
                tokens = checkpoint(block, tokens, size)
            else:
                tokens = block(tokens, size)
            assert isinstance(tokens, Tensor)
        return tokens, to_map(tokens, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x)[1]


class TokenHead(nn.Module):
    """Tokens [B, N, C] -> logits, from the class token ('token') or the mean of the others ('avg').

    Raises:
        BackboneError: another pooling, or 'token' without a class token.
    """

    def __init__(self, dim: int, num_classes: int, global_pool: str, prefix: int, drop_rate: float) -> None:
        super().__init__()
        self.num_features, self.prefix = dim, prefix
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Identity()
        self.global_pool = "avg"
        self.reset(num_classes, global_pool)

    def reset(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            if global_pool not in ("token", "avg") or (global_pool == "token" and not self.prefix):
                known = "'token' or 'avg'" if self.prefix else "'avg', since there is no class token"
                raise BackboneError(f"cvt: global_pool '{global_pool}': expected {known}")
            self.global_pool = global_pool
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if isinstance(self.fc, nn.Linear):
            init_weights(self.fc)

    def forward(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = tokens[:, 0] if self.global_pool == "token" else tokens[:, self.prefix :].mean(1)
        return self.drop(pooled) if pre_logits else self.fc(self.drop(pooled))


class CvT(Pyramid):
    """CvT; arguments not named here are those of every timm model. `forward_features` gives tokens [B, 1 + H W, C].

    Args:
        num_heads: one number a stage.
        stride_kv: of the convolutions of keys and values.
        cls_token: False leaves the class token out; `global_pool` must then be 'avg'.
        act_layer: timm's name of the MLPs' activation.

    Raises:
        BackboneError: tuples that are not of three stages, heads that do not divide the widths, a pooling not known.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        depths: Sequence[int] = (1, 2, 10),
        dims: Sequence[int] = (64, 192, 384),
        num_heads: Sequence[int] = (1, 3, 6),
        stride_kv: int = 2,
        cls_token: bool = True,
        act_layer: str = "quick_gelu",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        for what, given in (("dims", dims), ("depths", depths), ("num_heads", num_heads)):
            if len(given) != 3 or min(given) < 1:
                raise BackboneError(f"cvt: {what} {tuple(given)}: expected three numbers of at least 1, one a stage")
        rates = [[0.0] * depths[0], [0.0] * depths[1], calculate_drop_path_rates(drop_path_rate, depths[2])]
        stages: list[CvtStage] = []
        for i, dim in enumerate(dims):
            conv = nn.Conv2d(dims[i - 1] if i else in_chans, dim, 3 if i else 7, 2 if i else 4, 1 if i else 2)
            blocks = [CvtBlock(dim, num_heads[i], stride_kv, act_layer, float(rate)) for rate in rates[i]]  # pyright: ignore[reportArgumentType]
            embed = nn.Sequential(conv, LayerNorm2d(dim, eps=1e-5))
            stages.append(CvtStage(embed, blocks, dim, cls_token and i == 2))
        super().__init__(
            nn.Identity(), stages, LayerNorm(dims[-1], eps=1e-5),
            TokenHead(dims[-1], num_classes, global_pool, int(cls_token), drop_rate),
            dims=dims, strides=(4, 8, 16), in_chans=in_chans, num_classes=num_classes,
        )  # fmt: skip
        self.stride_kv = stride_kv
        self.apply(init_weights)
        if cls_token:
            trunc_normal_(stages[-1].cls_token, std=0.02)

    def check_input(self, height: int, width: int) -> None:
        if min(height, width) < 32:
            raise BackboneError(f"image of {height}x{width} pixels: CvT needs at least 32x32")
        smallest = min(height, width) // 16
        if self.stride_kv > smallest:
            raise BackboneError(
                f"cvt: stride_kv {self.stride_kv} is larger than the last map, {smallest} places, of {height}x{width}"
            )

    def run(self, x: Tensor, count: int | None = None) -> tuple[list[Tensor], Tensor]:
        self.check_input(int(x.shape[-2]), int(x.shape[-1]))
        maps: list[Tensor] = []
        tokens = x = self.stem(x)
        for stage in self.stages[:count]:
            assert isinstance(stage, CvtStage)
            tokens, x = stage.tokens(x)
            maps.append(x)
        return maps, tokens

    def as_map(self, final: Tensor, like: Tensor) -> Tensor:
        return to_map(final, (int(like.shape[2]), int(like.shape[3])))

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("cls_token")}


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


PUBLISHED_NAMES = (
    (r"^stage(\d)\.patch_embed\.proj\.", r"stages.\1.downsample.0."),
    (r"^stage(\d)\.patch_embed\.norm\.", r"stages.\1.downsample.1."),
    (r"^stage(\d)\.", r"stages.\1."),
    (r"\.attn\.conv_proj_([qkv])\.", r".attn.conv_\1."),
    (r"\.attn\.proj_([qkv])\.", r".attn.\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
QKV = {"query": "q", "key": "k", "value": "v"}
HUGGING_FACE_NAMES = (
    (r"^cvt\.encoder\.", ""),
    (r"\.embedding\.convolution_embeddings\.projection\.", ".downsample.0."),
    (r"\.embedding\.convolution_embeddings\.normalization\.", ".downsample.1."),
    (r"\.layers\.(\d+)\.", r".blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    *((rf"\.attention\.attention\.convolution_projection_{word}\.", f".attn.conv_{one}.") for word, one in QKV.items()),
    *((rf"\.attention\.attention\.projection_{word}\.", f".attn.{one}.") for word, one in QKV.items()),
    (r"\.convolution_projection\.convolution\.", ".conv."),
    (r"\.convolution_projection\.normalization\.", ".bn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head.fc."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """Tensors under the published names, Hugging Face's, or our own -> our names.

    Raises:
        BackboneError: a name that has no place in the model, or the classifier has another number of rows.
    """
    tensors: Mapping[str, Tensor] = state_dict.get("model", state_dict)
    names: tuple[tuple[str, str], ...] = ()
    if any(name.startswith("stage0.") for name in tensors):
        names = PUBLISHED_NAMES
    elif any(name.startswith("cvt.encoder.") for name in tensors):
        names = HUGGING_FACE_NAMES
    renamed: dict[str, Tensor] = {}
    for old, tensor in tensors.items():
        name = old
        for pattern, new in names:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    expected = model.state_dict()
    odd = next((name for name in renamed if name not in expected and not name.startswith("head.fc.")), None)
    if odd is not None:
        raise BackboneError(f"cvt: the checkpoint's tensor {odd} has no place in this model: are the depths the same?")
    head = renamed.get("head.fc.weight")
    if head is not None and model.num_classes not in (0, len(head)):
        raise BackboneError(
            f"the checkpoint's head has {len(head):,} rows, the model {model.num_classes:,} classes: build it with "
            f"num_classes={len(head)}, or with num_classes=0 and leave head.fc out"
        )
    return renamed


def conf(size: int = 224) -> dict[str, Any]:
    return cfg(first_conv="stages.0.downsample.0", size=size, pool_size=None)


default_cfgs = generate_default_cfgs({"cvt_13": conf(), "cvt_21": conf(), "cvt_w24": conf(384)})


def create(variant: str, pretrained: bool, depths: tuple[int, ...], given: dict[str, Any], **more: Any) -> CvT:
    defaults = {"depths": depths, **more}
    return build_pyramid(CvT, variant, pretrained, defaults, given, pretrained_filter_fn=checkpoint_filter_fn)


@register_model
def cvt_13(pretrained: bool = False, **kwargs: Any) -> CvT:
    return create("cvt_13", pretrained, (1, 2, 10), kwargs)


@register_model
def cvt_21(pretrained: bool = False, **kwargs: Any) -> CvT:
    return create("cvt_21", pretrained, (1, 4, 16), kwargs)


@register_model
def cvt_w24(pretrained: bool = False, **kwargs: Any) -> CvT:
    wide = {"dims": (192, 768, 1024), "num_heads": (3, 12, 16)}
    return create("cvt_w24", pretrained, (2, 2, 20), kwargs, **wide)
