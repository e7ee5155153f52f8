"""EdgeViT (Pan et al., ECCV 2022, arXiv 2205.03436): attention for phones, through one delegate a window.

Where a map is large, a block gathers, attends and spreads. Local aggregation (UniFormer's convolution block) puts
what a window holds into its places; one place per r x r window, the top left one, is its delegate; the delegates
attend to each other; a depthwise transposed convolution of side and stride r spreads the answer over the window:

    x += W LN(spread(attention(delegates(LN x)))),    (H W / r^2)^2 pairs instead of (H W)^2,    r = 4, 2, 2, 1.

Where r = 1 a block is a plain transformer's. Both sides of an image are multiples of 32 pixels.
`reparameterize()` folds the batch norms of local aggregation into the convolutions after them.
Departures: any such size, square or not. The published code of size S has 13,108,168 weights where the paper prints
11.1M; its multiply-adds agree with the paper, and ours is the code's.

When not to use it: off phones, since its depthwise and transposed convolutions are slow on a GPU for their MACs; for
small objects in the first stages, whose delegates see only a 5x5 neighbourhood of what they stand for. No pretrained
weights come with foveal.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, LayerNorm2d, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from foveal.architectures._pyramid import Pyramid, Stage, build_pyramid, cfg, four, pooled_head
from foveal.architectures._registry import register_model
from foveal.architectures.uniformer import LocalBlock
from foveal.core.errors import BackboneError

Spread = Literal["learned", "nearest"]


class SparseAttention(nn.Module):
    """Attention among one delegate per r x r window, spread over the windows: [B, H, W, C] -> [B, H, W, C].

    Args:
        r: side of a window; H and W are multiples. 1 for plain attention.
        spread: 'nearest' copies a delegate's answer to its window instead of learning how to.

    Raises:
        BackboneError: `head_dim` does not divide the channels.
    """

    def __init__(self, dim: int, head_dim: int, r: int, spread: Spread = "learned") -> None:
        super().__init__()
        if dim % head_dim:
            raise BackboneError(f"edgevit: {dim} channels are no multiple of head_dim {head_dim}")
        self.heads, self.r = dim // head_dim, r
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        learned = r > 1 and spread == "learned"
        self.spread = nn.ConvTranspose2d(dim, dim, r, r, groups=dim) if learned else nn.Upsample(scale_factor=r)
        self.norm = LayerNorm(dim, eps=1e-5) if r > 1 else nn.Identity()

    def delegates(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H / r, W / r, C], the top left place of every window."""
        return x[:, :: self.r, :: self.r]

    def forward(self, x: Tensor) -> Tensor:
        x = self.delegates(x)
        size = (int(x.shape[1]), int(x.shape[2]))
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.r > 1:
            x = self.spread(x.transpose(1, 2).unflatten(2, size)).permute(0, 2, 3, 1)
        else:
            x = x.unflatten(1, size)
        return self.proj(self.norm(x))


class SparseBlock(nn.Module):
    """Position, sparse attention and MLP, each added to maps [B, C, H, W]."""

    def __init__(self, dim: int, head_dim: int, r: int, drop_path: float, spread: Spread) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.attn = SparseAttention(dim, head_dim, r, spread)
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = (x + self.pos_embed(x)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class LglBlock(nn.Module):
    """Local aggregation (where windows are larger than a place), then sparse attention, on maps [B, C, H, W]."""

    def __init__(self, dim: int, head_dim: int, r: int, drop_path: float, spread: Spread, local: bool) -> None:
        super().__init__()
        self.local = LocalBlock(dim, drop_path) if r > 1 and local else nn.Identity()
        self.sparse = SparseBlock(dim, head_dim, r, drop_path, spread)

    def forward(self, x: Tensor) -> Tensor:
        return self.sparse(self.local(x))


class EdgeViT(Pyramid):
    """EdgeViT; arguments not named here are those of every timm model.

    Args:
        head_dim: channels of an attention head.
        windows: r of every stage.
        spread: 'nearest' for the ablation without local propagation.
        local: False for the ablation without local aggregation.

    Raises:
        BackboneError: widths that are no multiple of `head_dim`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (1, 1, 3, 2),
        dims: Sequence[int] = (36, 72, 144, 288),
        head_dim: int = 36,
        windows: Sequence[int] = (4, 2, 2, 1),
        spread: Spread = "learned",
        local: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        dims, depths = four("edgevit", dims, "dims"), four("edgevit", depths, "depths")
        sides = four("edgevit", windows, "windows")
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages: list[Stage] = []
        for i, dim in enumerate(dims):
            side = 2 if i else 4
            embed = nn.Sequential(
                nn.Conv2d(dims[i - 1] if i else in_chans, dim, side, side), LayerNorm2d(dim, eps=1e-5)
            )
            blocks = [LglBlock(dim, head_dim, sides[i], rate, spread, local) for rate in rates[i]]
            stages.append(Stage(embed, blocks))
        super().__init__(
            nn.Identity(), stages, nn.BatchNorm2d(dims[-1]), pooled_head(dims[-1], num_classes, global_pool, drop_rate),
            dims=dims, strides=(4, 8, 16, 32), in_chans=in_chans, num_classes=num_classes,
        )  # fmt: skip
        self.windows = sides
        self.apply(init_weights)

    def check_input(self, height: int, width: int) -> None:
        if height % 32 == 0 and width % 32 == 0 and min(height, width) >= 32:
            return
        for i, (stride, r) in enumerate(zip((4, 8, 16, 32), self.windows, strict=True)):
            for side in (height, width):
                if side % (stride * r):
                    near = sorted({max(32, side // 32 * 32), -(-side // 32) * 32})
                    raise BackboneError(
                        f"EdgeViT: images of {height}x{width} pixels: stage {i + 1} has maps of {side}/{stride} = "
                        f"{side / stride:g} places a side, which windows of {r} do not divide: use multiples of 32, "
                        f"such as {' or '.join(map(str, near))}"
                    )


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def conf() -> dict[str, Any]:
    return cfg(first_conv="stages.0.downsample.0", crop_pct=0.9)


default_cfgs = generate_default_cfgs({f"edgevit_{size}": conf() for size in ("xxs", "xs", "s")})


def create(variant: str, pretrained: bool, depths: tuple[int, ...], given: dict[str, Any], **more: Any) -> EdgeViT:
    return build_pyramid(EdgeViT, variant, pretrained, {"depths": depths, **more}, given)


@register_model
def edgevit_xxs(pretrained: bool = False, **kwargs: Any) -> EdgeViT:
    return create("edgevit_xxs", pretrained, (1, 1, 3, 2), kwargs, dims=(36, 72, 144, 288), head_dim=36)


@register_model
def edgevit_xs(pretrained: bool = False, **kwargs: Any) -> EdgeViT:
    return create("edgevit_xs", pretrained, (1, 1, 3, 1), kwargs, dims=(48, 96, 240, 384), head_dim=48)


@register_model
def edgevit_s(pretrained: bool = False, **kwargs: Any) -> EdgeViT:
    return create("edgevit_s", pretrained, (1, 2, 5, 3), kwargs, dims=(48, 96, 240, 384), head_dim=48)
