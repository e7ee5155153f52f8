"""AFFNet (Huang et al., ICCV 2023, arXiv 2307.14008): a global mixer of O(N log N) whose filter the image chooses.

A map's spectrum is masked by a mask that a small complex network makes from that spectrum, and transformed back:

    X = F(x),    M = softshrink_0.01(W_2 relu(W_1 X)),    y = F^-1(M * X) + x,

W complex linear layers in 8 groups of channels, relu and softshrink on real and imaginary parts by themselves. This
is a circular convolution with a kernel as large as the map, F^-1(M), another for every image. The mask reads phases,
so unlike a convolution the mixer does not move with a shifted image. The frame is that of MobileViT: inverted
residuals, then three stages of them with AFF blocks, each fused with its input.

Any size from 32 pixels. The transform runs in float32 whatever the rest runs in, and as a product with DFT matrices in
an ONNX graph, since few engines have an FFT; equal to 1e-4.
Departures: the paper's activation in the mask network is not stated in its text and is ReLU here as in its code;
channel layer norms throughout, where the code can also synchronise batch norms.

When not to use it: on mobile engines without an FFT (the DFT matrices cost O(N sqrt(N)) and lose the speed); where
exact translation equivariance is wanted. Not the `affnet` of local features. No pretrained weights come with foveal.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, DropPath, LayerNorm2d, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs
from timm.models._efficientnet_blocks import InvertedResidual
from torch import Tensor, nn

from foveal.architectures._pyramid import Pyramid, Stage, build_pyramid, cfg, pooled_head
from foveal.architectures._registry import register_model
from foveal.architectures._spectrum import filter_map, irfft2_pair, rfft2_pair
from foveal.core.errors import BackboneError

Mixer = Literal["adaptive", "fixed", "identity"]


class ComplexLinear(nn.Module):
    """Complex linear layer in groups of channels: real and imaginary parts [B, C, H, W] -> the same."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        side = dim // groups
        self.weight = nn.Parameter(0.02 * torch.randn(2, groups, side, side))
        self.bias = nn.Parameter(0.02 * torch.randn(2, groups, side))

    def forward(self, real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
        c, d = self.weight.float().transpose(2, 3).unbind(0)
        weight = torch.cat([torch.cat([c, -d], 2), torch.cat([d, c], 2)], 1)  # on the parts one above the other
        z = torch.cat([part.unflatten(1, (self.groups, -1)) for part in (real, imaginary)], 2).flatten(3)
        z = weight @ z + self.bias.float().transpose(0, 1).flatten(1)[:, :, None]
        real, imaginary = z.unflatten(3, (int(real.shape[2]), int(real.shape[3]))).chunk(2, dim=2)
        return real.flatten(1, 2), imaginary.flatten(1, 2)


class AdaptiveFilter(nn.Module):
    """The AFF mixer (equation in this file's docstring): [B, C, H, W] -> [B, C, H, W].

    Args:
        groups: of the complex layers; divides C.
        threshold: of the soft shrinkage of the mask.

    Raises:
        BackboneError: C is no multiple of `groups`.
    """

    def __init__(self, dim: int, groups: int = 8, threshold: float = 0.01) -> None:
        super().__init__()
        if dim % groups:
            raise BackboneError(f"adaptive frequency filter: {dim} channels are no multiple of its {groups} groups")
        self.threshold = threshold
        self.fc1 = ComplexLinear(dim, groups)
        self.fc2 = ComplexLinear(dim, groups)

    def mask(self, real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
        """Spectrum [B, C, H, W // 2 + 1] (real, imaginary) -> mask of the same shape."""
        real, imaginary = self.fc1(real, imaginary)
        real, imaginary = self.fc2(real.relu(), imaginary.relu())
        return F.softshrink(real, self.threshold), F.softshrink(imaginary, self.threshold)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            a, b = rfft2_pair(x)
            c, d = self.mask(a, b)
            mixed = irfft2_pair(a * c - b * d, a * d + b * c, (int(x.shape[-2]), int(x.shape[-1])))
        return mixed.to(x.dtype) + x


class FixedFilter(nn.Module):
    """The ablation with one learned mask for all images, resized to the map: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, dim: int, size: tuple[int, int] = (8, 5)) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(2, dim, *size))

    def forward(self, x: Tensor) -> Tensor:
        height, width = int(x.shape[-2]), int(x.shape[-1])
        size = (height, width // 2 + 1)
        real, imaginary = F.interpolate(self.weight.float(), size, mode="bilinear", align_corners=True).unbind(0)
        return filter_map(x, real, imaginary).to(x.dtype) + x


class AffBlock(nn.Module):
    """x + mixer(LN(inverted residual(LN x))) on maps [B, C, H, W]."""

    def __init__(self, dim: int, mixer: Mixer, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim, eps=1e-5)
        self.local = InvertedResidual(dim, dim, exp_ratio=2.0, act_layer=nn.SiLU)
        self.norm2 = LayerNorm2d(dim, eps=1e-5)
        self.mixer = {"adaptive": AdaptiveFilter, "fixed": FixedFilter}[mixer](dim) if mixer != "identity" else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.norm2(self.local(self.norm1(x)))
        return x + self.drop_path(mixed if self.mixer is None else self.mixer(mixed))


class Fuse(nn.Module):
    """What a stage's blocks made, projected and joined with what they were given: two maps [B, C, H, W] -> one."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(dim, eps=1e-5)
        self.proj = ConvNormAct(dim, dim, 1, apply_act=False)
        self.join = ConvNormAct(2 * dim, dim, 1, act_layer=nn.SiLU)

    def forward(self, given: Tensor, made: Tensor) -> Tensor:
        return self.join(torch.cat([given, self.proj(self.norm(made))], dim=1))


class AffStage(Stage):
    """An inverted residual of stride 2, AFF blocks, and the fusion of both."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], dim: int) -> None:
        super().__init__(downsample, blocks)
        self.fuse = Fuse(dim)

    def forward(self, x: Tensor) -> Tensor:
        given = self.downsample(x)
        return self.fuse(given, self.run(given))


class AFFNet(Pyramid):
    """AFFNet; arguments not named here are those of every timm model.

    Args:
        dims: widths of the five stages, strides 2 to 32.
        depths: inverted residuals of the first two, AFF blocks of the others.
        expansion: of the inverted residuals outside the blocks.
        mixer: 'fixed' (one learned mask) and 'identity' (none) are ablations.

    Raises:
        BackboneError: tuples that are not of five stages, widths that are no multiple of 8.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (1, 3, 2, 4, 3),
        dims: Sequence[int] = (32, 64, 128, 256, 320),
        expansion: float = 4,
        mixer: Mixer = "adaptive",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        if len(dims) != 5 or len(depths) != 5 or min(depths) < 1:
            raise BackboneError(
                f"affnet: dims {tuple(dims)} and depths {tuple(depths)}: expected five positive numbers each"
            )
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths[2:]), stagewise=True)
        stages: list[Stage] = []
        before = 16
        for i, dim in enumerate(dims):
            strides = [1 if i == 0 else 2] + [1] * (depths[i] - 1 if i < 2 else 0)
            local = [
                InvertedResidual(dim if n else before, dim, stride=stride, exp_ratio=expansion, act_layer=nn.SiLU)
                for n, stride in enumerate(strides)
            ]
            if i < 2:
                stages.append(Stage(nn.Identity(), local))
            else:
                stages.append(AffStage(local[0], [AffBlock(dim, mixer, rate) for rate in rates[i - 2]], dim))
            before = dim
        last = min(4 * dims[-1], 960)
        super().__init__(
            ConvNormAct(in_chans, 16, 3, 2, act_layer=nn.SiLU),
            stages,
            ConvNormAct(dims[-1], last, 1, act_layer=nn.SiLU),
            pooled_head(last, num_classes, global_pool, drop_rate),
            dims=dims, strides=(2, 4, 8, 16, 32), in_chans=in_chans, num_classes=num_classes,
        )  # fmt: skip
        self.num_features = last
        self.apply(init_weights)

    def check_input(self, height: int, width: int) -> None:
        if min(height, width) < 32:
            raise BackboneError(f"image of {height}x{width} pixels: AFFNet needs at least 32x32")


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


default_cfgs = generate_default_cfgs(
    {
        f"affnet_{size}": cfg(first_conv="stem.conv", size=256, crop_pct=0.9, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        for size in ("et", "t", "b")
    }
)


def create(variant: str, pretrained: bool, dims: tuple[int, ...], expansion: int, given: dict[str, Any]) -> AFFNet:
    defaults: dict[str, Any] = {"depths": (1, 3, 2, 4, 3), "dims": dims, "expansion": expansion}
    return build_pyramid(AFFNet, variant, pretrained, defaults, given)


@register_model
def affnet_et(pretrained: bool = False, **kwargs: Any) -> AFFNet:
    return create("affnet_et", pretrained, (32, 48, 64, 104, 144), 2, kwargs)


@register_model
def affnet_t(pretrained: bool = False, **kwargs: Any) -> AFFNet:
    return create("affnet_t", pretrained, (32, 48, 96, 160, 192), 4, kwargs)


@register_model
def affnet_b(pretrained: bool = False, **kwargs: Any) -> AFFNet:
    return create("affnet_b", pretrained, (32, 64, 128, 256, 320), 4, kwargs)
