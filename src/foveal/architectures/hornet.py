"""HorNet (Rao et al., NeurIPS 2022, arXiv 2207.14284): long-range mixing that adapts to the input, by convolutions.

The recursive gated convolution `GnConv` projects C channels to 2C, splits them into p and q_0 .. q_{n-1} of widths
C/2^{n-1}, C/2^{n-1}, C/2^{n-2}, .., C, filters the q by one depthwise operator f, and multiplies them up:

    x_0 = p * s f(q_0),    x_{k+1} = W_k x_k * s f(q_{k+1}),    y = W_out x_{n-1},    s = 1/3.

Without biases y is a homogeneous polynomial of degree n + 1 in the input: interactions of order n between places.
f is a 7x7 depthwise convolution, or in the last two stages of the `gf` variants a `GlobalFilter`: half the channels
through a 3x3 one, half through a learned filter on the whole spectrum. The frame is ConvNeXt's; orders are 2, 3, 4, 5.
`HorFPN` is the paper's neck for dense tasks. Names of the published checkpoints are mapped by `checkpoint_filter_fn`.

It takes any image size from 32 pixels; a spectrum filter is resized to the map (bilinearly, as published).
Departures: the Fourier transform runs in float32 whatever the rest runs in, and as a product with DFT matrices in an
ONNX graph. The counts that the paper gives for `large` hold 10,450 classes of ImageNet-22k; ours hold 1000.

When not to use it: where latency on a GPU decides (the splits and products of many small maps run far below the
speed that the MACs promise; ConvNeXt is faster at equal accuracy per second); in half precision without s = 1/3 and
gradient clipping, since products of n + 1 activations overflow. No pretrained weights come with foveal.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, LayerNorm2d, LayerScale2d, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from foveal.architectures._depthwise import DepthwiseConv2d
from foveal.architectures._pyramid import Pyramid, Stage, build_pyramid, cfg, four, init_as_convnext, pooled_head
from foveal.architectures._registry import register_model
from foveal.architectures._spectrum import filter_map
from foveal.core.errors import BackboneError


class GlobalFilter(nn.Module):
    """Half the channels through a 3x3 depthwise convolution, half through a learned spectrum; then interleaved.

    [B, C, H, W] -> [B, C, H, W], C even. The spectrum has shape [C / 2, height, width, 2] (real and imaginary parts)
    and is resized where the map's own, (H, W // 2 + 1), is another.

    Raises:
        BackboneError: C is odd.
    """

    def __init__(self, dim: int, height: int = 14, width: int = 8) -> None:
        super().__init__()
        if dim % 2:
            raise BackboneError(f"a global filter splits its channels in two halves: {dim} channels are odd")
        self.dw = nn.Conv2d(dim // 2, dim // 2, 3, padding=1, groups=dim // 2, bias=False)
        self.complex_weight = nn.Parameter(torch.empty(dim // 2, height, width, 2))
        trunc_normal_(self.complex_weight, std=0.02)
        self.pre_norm = LayerNorm2d(dim, eps=1e-6)
        self.post_norm = LayerNorm2d(dim, eps=1e-6)

    def resized(self, height: int, width: int) -> Tensor:
        """The spectrum [C / 2, height, width, 2] for a map whose own has that size."""
        weight = self.complex_weight.float()
        if weight.shape[1:3] == (height, width):
            return weight
        size = (height, width)
        return F.interpolate(weight.permute(3, 0, 1, 2), size, mode="bilinear", align_corners=True).permute(1, 2, 3, 0)

    def filter(self, x: Tensor) -> Tensor:
        """Multiply the spectrum of maps [B, C / 2, H, W] by the learned one: a convolution that wraps around."""
        height, width = int(x.shape[-2]), int(x.shape[-1])
        real, imaginary = self.resized(height, width // 2 + 1).unbind(-1)
        return filter_map(x, real, imaginary).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        near, far = self.pre_norm(x).chunk(2, dim=1)
        return self.post_norm(torch.stack([self.dw(near), self.filter(far)], dim=2).flatten(1, 2))


class GnConv(nn.Module):
    """Recursive gated convolution of order n: [B, C, H, W] -> [B, C, H, W] (equation in this file's docstring).

    Args:
        order: n, from 1 (a gated depthwise convolution) up.
        kernel_size: of the depthwise convolution; odd.
        spectrum: size (H, W // 2 + 1) of a global filter that takes the convolution's place.
        scale: s.

    Raises:
        BackboneError: C is not a multiple of 2^(n-1), an even kernel, or odd channels under a global filter.
    """

    def __init__(
        self,
        dim: int,
        order: int = 5,
        kernel_size: int = 7,
        spectrum: tuple[int, int] | None = None,
        scale: float = 1 / 3,
    ) -> None:
        super().__init__()
        if order < 1 or dim % 2 ** (order - 1):
            raise BackboneError(
                f"gated convolution of order {order} on {dim} channels: expected an order of at least 1 and channels "
                f"that are a multiple of 2^(order-1) = {2 ** max(order - 1, 0)}"
            )
        if kernel_size % 2 == 0:
            raise BackboneError(f"gated convolution with kernel {kernel_size}: expected an odd size")
        self.dims = [dim // 2**power for power in reversed(range(order))]
        self.scale = scale
        total = sum(self.dims)
        self.proj_in = nn.Conv2d(dim, 2 * dim, 1)
        if spectrum is None:
            self.dwconv = DepthwiseConv2d(total, kernel_size)
        else:
            self.dwconv = GlobalFilter(total, *spectrum)
        self.pws = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(self.dims[:-1], self.dims[1:], strict=True))
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.proj_in(x).split((self.dims[0], sum(self.dims)), dim=1)
        gates = (self.dwconv(q) * self.scale).split(self.dims, dim=1)
        x = p * gates[0]
        for project, gate in zip(self.pws, gates[1:], strict=True):
            x = project(x) * gate
        return self.proj_out(x)


class HorBlock(nn.Module):
    """x + g1 GnConv(LN x), then x + g2 MLP(LN x), on maps [B, C, H, W]."""

    def __init__(
        self, dim: int, order: int, spectrum: tuple[int, int] | None, drop_path: float, kernel_size: int = 7
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim, eps=1e-6)
        self.gnconv = GnConv(dim, order, kernel_size, spectrum)
        self.ls1 = LayerScale2d(dim, 1e-6)
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.ls2 = LayerScale2d(dim, 1e-6)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.gnconv(self.norm1(x))))
        mixed = self.mlp(self.norm2(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x + self.drop_path(self.ls2(mixed))


class HorNet(Pyramid):
    """HorNet; arguments not named here are those of every timm model.

    Args:
        orders: of the gated convolutions, one a stage.
        spectra: size (H, W // 2 + 1) of the global filters of each stage; None for a depthwise convolution.

    Raises:
        BackboneError: widths that the orders do not divide, or tuples that are not of four stages.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 3, 18, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        orders: Sequence[int] = (2, 3, 4, 5),
        spectra: Sequence[tuple[int, int] | None] = (None, None, None, None),
        kernel_size: int = 7,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        dims, depths = four("hornet", dims, "dims"), four("hornet", depths, "depths")
        orders = four("hornet", orders, "orders")
        stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, 4), LayerNorm2d(dims[0], eps=1e-6))
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = [
            Stage(
                nn.Sequential(LayerNorm2d(dims[i - 1], eps=1e-6), nn.Conv2d(dims[i - 1], dims[i], 2, 2))
                if i
                else nn.Identity(),
                [HorBlock(dims[i], orders[i], spectra[i], rate, kernel_size) for rate in rates[i]],
            )
            for i in range(4)
        ]
        head = pooled_head(dims[-1], num_classes, global_pool, drop_rate, eps=1e-6)
        super().__init__(
            stem, stages, nn.Identity(), head,
            dims=dims, strides=(4, 8, 16, 32), in_chans=in_chans, num_classes=num_classes,
        )  # fmt: skip
        self.apply(init_as_convnext)

    def check_input(self, height: int, width: int) -> None:
        if min(height, width) < 32:
            raise BackboneError(f"image of {height}x{width} pixels: HorNet needs at least 32x32")


class HorFPN(nn.Module):
    """Feature pyramid whose fusing convolutions are gated convolutions (the paper's section 3.3).

    Maps [B, C_i, H / s_i, W / s_i], fine to coarse -> as many maps [B, channels, H / s_i, W / s_i]: a 1x1 convolution,
    the coarser level added after nearest-neighbour enlargement, then a `GnConv` at each level.

    Raises:
        BackboneError: `channels` is not a multiple of 2^(order-1).
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256, order: int = 3, kernel_size: int = 7) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)
        self.fuse = nn.ModuleList(GnConv(channels, order, kernel_size) for _ in in_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for i in reversed(range(len(levels) - 1)):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], levels[i].shape[-2:], mode="nearest")
        return [fuse(x) for fuse, x in zip(self.fuse, levels, strict=True)]


PUBLISHED_NAMES = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.gamma1$", ".ls1.gamma"),
    (r"\.gamma2$", ".ls2.gamma"),
    (r"\.pwconv1\.", ".mlp.fc1."),
    (r"\.pwconv2\.", ".mlp.fc2."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """Tensors under the names of the published checkpoints, or our own -> our names.

    Raises:
        BackboneError: the classifier has another number of rows than the model.
    """
    tensors: Mapping[str, Tensor] = state_dict.get("model", state_dict)
    if any(name.startswith("downsample_layers.") for name in tensors):
        renamed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            for pattern, new in PUBLISHED_NAMES:
                name = re.sub(pattern, new, name)
            renamed[name] = tensor
        tensors = renamed
    head = tensors.get("head.fc.weight")
    if head is not None and model.num_classes not in (0, len(head)):
        raise BackboneError(
            f"the checkpoint's head has {len(head):,} rows, the model {model.num_classes:,} classes: build it with "
            f"num_classes={len(head)}, or with num_classes=0 and leave head.fc out"
        )
    return dict(tensors)


default_cfgs = generate_default_cfgs(
    {
        **{f"hornet_{size}_{kind}": cfg() for size in ("tiny", "small", "base", "large") for kind in ("7x7", "gf")},
        **{f"hornet_{size}_gf_384": cfg(size=384, crop_pct=1.0) for size in ("base", "large")},
    }
)

GF_224 = (None, None, (14, 8), (7, 4))
GF_384 = (None, None, (24, 13), (12, 7))


def create(variant: str, pretrained: bool, width: int, given: dict[str, Any], spectra: Any = None) -> HorNet:
    defaults: dict[str, Any] = {"depths": (2, 3, 18, 2), "dims": tuple(width * 2**i for i in range(4))}
    if spectra is not None:
        defaults["spectra"] = spectra
    return build_pyramid(HorNet, variant, pretrained, defaults, given, pretrained_filter_fn=checkpoint_filter_fn)


@register_model
def hornet_tiny_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    return create("hornet_tiny_7x7", pretrained, 64, kwargs)


@register_model
def hornet_tiny_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    return create("hornet_tiny_gf", pretrained, 64, kwargs, GF_224)


@register_model
def hornet_small_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    return create("hornet_small_7x7", pretrained, 96, kwargs)


@register_model
def hornet_small_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    return create("hornet_small_gf", pretrained, 96, kwargs, GF_224)


@register_model
def hornet_base_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    return create("hornet_base_7x7", pretrained, 128, kwargs)


@register_model
def hornet_base_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    return create("hornet_base_gf", pretrained, 128, kwargs, GF_224)


@register_model
def hornet_base_gf_384(pretrained: bool = False, **kwargs: Any) -> HorNet:
    return create("hornet_base_gf_384", pretrained, 128, kwargs, GF_384)


@register_model
def hornet_large_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    return create("hornet_large_7x7", pretrained, 192, kwargs)


@register_model
def hornet_large_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    return create("hornet_large_gf", pretrained, 192, kwargs, GF_224)


@register_model
def hornet_large_gf_384(pretrained: bool = False, **kwargs: Any) -> HorNet:
    return create("hornet_large_gf_384", pretrained, 192, kwargs, GF_384)
