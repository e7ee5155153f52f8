"""TransNeXt (Shi, CVPR 2024, arXiv 2311.17132): every query sees its neighbours sharply and the whole image coarsely.

Aggregated attention of a query i joins the 3x3 keys around it with P keys pooled from the whole map, in one softmax:

    a_i = softmax([Q_i K_local + B, Q_i K_pool + b(dx, dy)]),    Q_i = (q_i / |q_i| + e) tau log(n_i),
    y_i = (a_local + q_i / |q_i| T + t) V_local + a_pool V_pool,

with unit keys, e and the tokens T learned, tau a temperature per head and n_i the number of keys that i has. The bias
b is an MLP of log-spaced offsets, so it carries to other sizes. The last stage attends to all (`transnext_micro_aaaa`:
aggregated there too). The MLP is a gated one with a 3x3 depthwise convolution on the gate, `ConvGLU`.

A model is built for an image size: `img_size`, square, a multiple of 32 (64 for aaaa); the same weights serve any.
`strict_img_size=False` lets a model take any such size, offsets still measured by `pretrain_size`.
Departures: native PyTorch, without the CUDA kernel; offsets lie on a regular grid, so their table is indexed in closed
form and no buffer is stored.

When not to use it: where training time counts, since a neighbourhood is nine products of shifted maps, where a fused
kernel would make one pass; on batches of mixed sizes; in half precision on a CPU. No pretrained weights come with
foveal.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, LayerNorm2d, Mlp, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from foveal.architectures._pyramid import Pyramid, Stage, build_pyramid, cfg, four, pooled_head
from foveal.architectures._registry import register_model
from foveal.core.errors import BackboneError


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, C] -> [B, heads, N, C / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class ConvGLU(nn.Module):
    """W_2 (GELU(DW3x3(W_a x)) * W_v x): maps [B, C, H, W] -> [B, C, H, W]; the hidden width is 2/3 ratio C.

    A drop-in for an MLP of that ratio, at the same number of weights.
    """

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(2 * ratio * dim / 3)
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).chunk(2, dim=1)
        mixed = F.gelu(self.dwconv(gate)) * value
        return self.fc2(mixed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PlainMlp(nn.Module):
    """The MLP that `ConvGLU` takes the place of: maps [B, C, H, W] -> [B, C, H, W], hidden width ratio C."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.mlp = Mlp(dim, int(ratio * dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OffsetBias(nn.Module):
    """Bias [heads, H W, P] of every query for every pooled key, an MLP of their log-spaced offset.

    Key (k, l) of a map pooled by `reduction` r lies at r k + (r - 1) / 2, so an offset is one of H + r (H / r - 1)
    values an axis, and (i - r k) indexes it.

    Args:
        pretrain: positions an axis that an offset is measured by.
    """

    def __init__(self, heads: int, reduction: int, pretrain: tuple[int, int]) -> None:
        super().__init__()
        self.reduction = reduction
        self.pretrain = pretrain
        self.fc1 = nn.Linear(2, 512)
        self.fc2 = nn.Linear(512, heads)

    def axis(self, length: int, pretrain: int) -> tuple[Tensor, Tensor]:
        """Coordinates [L] of all offsets an axis, and the index [length, length / r] of each pair's."""
        device, r = self.fc1.weight.device, self.reduction
        first = r * (length // r - 1)
        offsets = torch.arange(-first, length, device=device) - (r - 1) / 2
        scaled = 8 * offsets / max(pretrain - 1, 1)
        coordinates = scaled.sign() * (scaled.abs() + 1).log2() / math.log2(8)
        index = torch.arange(length, device=device)[:, None] - r * torch.arange(length // r, device=device) + first
        return coordinates, index

    def forward(self, height: int, width: int) -> Tensor:
        down, rows = self.axis(height, self.pretrain[0])
        right, columns = self.axis(width, self.pretrain[1])
        grid = torch.stack(torch.meshgrid(down, right, indexing="ij"), -1).to(self.fc1.weight.dtype)
        table = self.fc2(F.relu(self.fc1(grid)))  # [L_h, L_w, heads]
        bias = table[rows[:, None, :, None], columns[None, :, None, :]]  # [H, W, H/r, W/r, heads]
        return bias.flatten(2, 3).flatten(0, 1).permute(2, 0, 1)


class CosineQuery(nn.Module):
    """What both attentions share: queries q / |q|, and (q / |q| + e) softplus(tau) scale."""

    def __init__(self, dim: int, heads: int, reduction: int, pretrain: tuple[int, int]) -> None:
        super().__init__()
        if dim % heads:
            raise BackboneError(f"TransNeXt: {heads} heads do not divide {dim} channels")
        self.heads = heads
        self.query_embedding = nn.Parameter(trunc_normal_(torch.empty(heads, 1, dim // heads), std=0.02))
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(math.exp(1 / 0.24) - 1)))
        self.cpb = OffsetBias(heads, reduction, pretrain)

    def scaled(self, unit: Tensor, scale: Tensor | float) -> Tensor:
        return (unit + self.query_embedding) * F.softplus(self.temperature) * scale


class AggregatedAttention(CosineQuery):
    """Attention over a local window and a pooled map (this file's docstring): [B, C, H, W] -> [B, C, H, W].

    Args:
        reduction: side of the squares that the pooled map averages over; H and W must be multiples.
        window: side of the local window; odd.

    Raises:
        BackboneError: an even window, or heads that do not divide the channels.
    """

    def __init__(self, dim: int, heads: int, reduction: int, pretrain: tuple[int, int], window: int = 3) -> None:
        super().__init__(dim, heads, reduction, pretrain)
        if window % 2 == 0:
            raise BackboneError(f"aggregated attention with a window of {window}: expected an odd side")
        self.window, self.reduction = window, reduction
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = LayerNorm(dim, eps=1e-5)
        local = window**2
        self.relative_pos_bias_local = nn.Parameter(trunc_normal_(torch.empty(heads, local), std=0.0004))
        self.learnable_tokens = nn.Parameter(trunc_normal_(torch.empty(heads, dim // heads, local), std=0.02))
        self.learnable_bias = nn.Parameter(torch.zeros(heads, 1, local))

    def neighbours(self, x: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """[B, heads, N, d] -> w^2 views [B, H, W, heads, d] of what stands at each offset, zeros outside the map."""
        (height, width), reach = size, self.window // 2
        padded = F.pad(x.transpose(1, 2).unflatten(1, size), (0, 0, 0, 0, reach, reach, reach, reach))
        return [padded[:, i : i + height, j : j + width] for i in range(self.window) for j in range(self.window)]

    def inside(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """Which of a place's w^2 neighbours lie in the map: [N, w^2], bool."""
        ones = torch.ones(1, 1, *size, device=device)
        return F.unfold(ones, self.window, padding=self.window // 2)[0].T > 0.5

    def weights(self, unit: Tensor, k: Tensor, k_pool: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Softmax over local and pooled keys together: [B, heads, N, w^2] and [B, heads, N, P]."""
        inside = self.inside(size, unit.device)
        scale = (inside.sum(1) + k_pool.shape[2]).to(unit.dtype).log()[:, None]
        query = self.scaled(unit, scale)
        places = query.transpose(1, 2).unflatten(1, size)
        scores = torch.stack([(each * places).sum(-1) for each in self.neighbours(k, size)], dim=-1)
        local = scores.flatten(1, 2).transpose(1, 2) + self.relative_pos_bias_local[:, None]
        local = local.masked_fill(~inside, float("-inf"))
        pooled = query @ k_pool.transpose(-2, -1) + self.cpb(*size)
        both = torch.cat([local, pooled], dim=-1).softmax(-1)
        return both[..., : self.window**2], both[..., self.window**2 :]

    def forward(self, x: Tensor) -> Tensor:
        size = (int(x.shape[2]), int(x.shape[3]))
        tokens = x.flatten(2).transpose(1, 2)
        unit = F.normalize(split_heads(self.q(tokens), self.heads), dim=-1)
        k, v = (split_heads(each, self.heads) for each in self.kv(tokens).chunk(2, dim=-1))
        pooled = self.norm(F.avg_pool2d(F.gelu(self.sr(x)), self.reduction).flatten(2).transpose(1, 2))
        k_pool, v_pool = (split_heads(each, self.heads) for each in self.kv(pooled).chunk(2, dim=-1))
        a_local, a_pool = self.weights(unit, F.normalize(k, dim=-1), F.normalize(k_pool, dim=-1), size)
        a_local = a_local + unit @ self.learnable_tokens + self.learnable_bias
        shares = a_local.transpose(1, 2).unflatten(1, size).unsqueeze(-2).unbind(-1)  # w^2 of [B, H, W, heads, 1]
        near = reduce(torch.add, (a * each for a, each in zip(shares, self.neighbours(v, size), strict=True)))
        out = near.flatten(1, 2).flatten(2) + (a_pool @ v_pool).transpose(1, 2).flatten(2)
        return self.proj(out).transpose(1, 2).unflatten(2, size)


class CosineAttention(CosineQuery):
    """The last stage's attention of every place to every place, with unit queries and keys."""

    def __init__(self, dim: int, heads: int, pretrain: tuple[int, int]) -> None:
        super().__init__(dim, heads, 1, pretrain)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        size = (int(x.shape[2]), int(x.shape[3]))
        q, k, v = (split_heads(each, self.heads) for each in self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, dim=-1))
        query = self.scaled(F.normalize(q, dim=-1), math.log(size[0] * size[1]))
        bias = self.cpb(*size).to(query.dtype)
        out = F.scaled_dot_product_attention(query, F.normalize(k, dim=-1), v, attn_mask=bias, scale=1.0)
        return self.proj(out.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, size)


class TransBlock(nn.Module):
    """x + attention(LN x), then x + ConvGLU(LN x), on maps [B, C, H, W]."""

    def __init__(self, dim: int, attention: nn.Module, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim, eps=1e-6)
        self.attn = attention
        self.norm2 = LayerNorm2d(dim, eps=1e-6)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TransNeXt(Pyramid):
    """TransNeXt; arguments not named here are those of every timm model.

    Args:
        img_size: side of the images, or (height, width).
        pretrain_size: the image size that offsets are measured by, if not `img_size`: that of the weights' training.
        strict_img_size: False takes any size that the reductions divide.
        reductions: of the aggregated attention, one a stage; 0 for plain cosine attention.
        conv_glu: False for plain MLPs with as many weights.

    Raises:
        BackboneError: a size that the reductions do not divide, heads that do not divide the widths.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 15, 2),
        dims: Sequence[int] = (48, 96, 192, 384),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        reductions: Sequence[int] = (8, 4, 2, 0),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        window_size: int = 3,
        conv_glu: bool = True,
        pretrain_size: int | tuple[int, int] | None = None,
        strict_img_size: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        dims, depths = four("transnext", dims, "dims"), four("transnext", depths, "depths")
        num_heads = four("transnext", num_heads, "num_heads")
        multiple = max(stride * max(r, 1) for stride, r in zip((4, 8, 16, 32), reductions, strict=True))
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        pretrain: Any = to_2tuple(pretrain_size or img_size)
        mlp = ConvGLU if conv_glu else PlainMlp
        stages: list[Stage] = []
        for i, stride in enumerate((4, 8, 16, 32)):
            around = (pretrain[0] // stride, pretrain[1] // stride)
            before = in_chans if i == 0 else dims[i - 1]
            embed = nn.Conv2d(before, dims[i], 3 if i else 7, 2 if i else 4, 1 if i else 3)
            blocks: list[nn.Module] = []
            for rate in rates[i]:
                attention: nn.Module
                if reductions[i]:
                    attention = AggregatedAttention(dims[i], num_heads[i], reductions[i], around, window_size)
                else:
                    attention = CosineAttention(dims[i], num_heads[i], around)
                blocks.append(TransBlock(dims[i], attention, mlp(dims[i], mlp_ratios[i]), rate))
            embedded = nn.Sequential(embed, LayerNorm2d(dims[i], eps=1e-5))
            stages.append(Stage(embedded, blocks, LayerNorm2d(dims[i], eps=1e-6)))
        super().__init__(
            nn.Identity(), stages, nn.Identity(), pooled_head(dims[-1], num_classes, global_pool, drop_rate),
            dims=dims, strides=(4, 8, 16, 32), in_chans=in_chans, num_classes=num_classes,
        )  # fmt: skip
        sides: Any = to_2tuple(img_size)
        self.img_size = (int(sides[0]), int(sides[1]))
        self.strict_img_size = strict_img_size
        self.multiple = multiple
        self.refuse_unless_divided(*self.img_size)
        self.apply(init_weights)

    def refuse_unless_divided(self, height: int, width: int) -> None:
        if min(height, width) < 1 or height % self.multiple or width % self.multiple:
            near = sorted({max(self.multiple, side // self.multiple * self.multiple) for side in (height, width)})
            raise BackboneError(
                f"TransNeXt: images of {height}x{width} pixels: both sides must be multiples of {self.multiple}, "
                f"so that every stage's map can be pooled in whole squares (nearest: {', '.join(map(str, near))})"
            )

    def check_input(self, height: int, width: int) -> None:
        if (height, width) == self.img_size:
            return
        if self.strict_img_size:
            raise BackboneError(
                f"TransNeXt was built for {self.img_size[0]}x{self.img_size[1]} pixels and got {height}x{width}: "
                f"build it with img_size={height if height == width else (height, width)} (the weights are the same), "
                "or with strict_img_size=False"
            )
        self.refuse_unless_divided(height, width)

    def no_weight_decay(self) -> set[str]:
        kinds = ("query_embedding", "relative_pos_bias_local", "cpb", "temperature")
        return {name for name, _ in self.named_parameters() if any(kind in name for kind in kinds)}


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def conf(size: int = 224) -> dict[str, Any]:
    return cfg(first_conv="stages.0.downsample.0", size=size, fixed_input_size=True)


default_cfgs = generate_default_cfgs(
    {
        **{f"transnext_{size}": conf() for size in ("micro", "tiny", "small", "base")},
        "transnext_micro_aaaa": conf(256),
    }
)


def create(variant: str, pretrained: bool, heads: int, depths: tuple[int, ...], given: dict[str, Any]) -> TransNeXt:
    defaults: dict[str, Any] = {
        "depths": depths,
        "dims": tuple(24 * heads * 2**i for i in range(4)),
        "num_heads": tuple(heads * 2**i for i in range(4)),
    }
    if variant == "transnext_micro_aaaa":
        defaults.update(img_size=256, reductions=(16, 8, 4, 2))
    return build_pyramid(TransNeXt, variant, pretrained, defaults, given)


@register_model
def transnext_micro(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    return create("transnext_micro", pretrained, 2, (2, 2, 15, 2), kwargs)


@register_model
def transnext_tiny(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    return create("transnext_tiny", pretrained, 3, (2, 2, 15, 2), kwargs)


@register_model
def transnext_small(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    return create("transnext_small", pretrained, 3, (5, 5, 22, 5), kwargs)


@register_model
def transnext_base(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    return create("transnext_base", pretrained, 4, (5, 5, 23, 5), kwargs)


@register_model
def transnext_micro_aaaa(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    return create("transnext_micro_aaaa", pretrained, 2, (2, 2, 15, 2), kwargs)
