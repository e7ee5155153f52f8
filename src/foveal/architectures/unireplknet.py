"""UniRepLKNet (Ding et al., CVPR 2024, arXiv 2311.15599): few large kernels see wide, small ones add depth.

A block filters with one depthwise convolution, squeezes and excites, and mixes channels by an MLP with global
response normalisation:

    y = SE(BN(DW x)),    x + g BN(W_2 GRN(GELU(W_1 y))).

In training a large DW (13x13) is a sum of that kernel and of small dilated ones, each with its own batch norm. A
dilated kernel is a dense one with zeros between its taps, so `reparameterize()` adds them all into one, folds every
batch norm, g and GRN's shift away, and leaves the `deploy` form: the same function with fewer layers. The published
parameter counts are of that form. Stages 2 and 4 are large throughout, stage 1 small, stage 3 mixed in bigger variants.

It takes any image size from 32 pixels and any number of input channels: an audio spectrogram, or another signal laid
out as a map, needs nothing but `in_chans`.
Departures: the merge is computed in float64; GRN is written here because timm's cannot be without a shift.

When not to use it: where depthwise 13x13 convolutions have no fast kernel (older cuDNN, some mobile engines): measure
before choosing; with fewer images than a thousand or so from random weights. Reparameterise once, at the end: the
deploy form has no batch norm to train with. No pretrained weights come with foveal.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, SEModule, calculate_drop_path_rates
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from foveal.architectures._depthwise import DepthwiseConv2d
from foveal.architectures._pyramid import Pyramid, Stage, build_pyramid, cfg, four, init_as_convnext, pooled_head
from foveal.architectures._registry import register_model
from foveal.core.errors import BackboneError

BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""Size and dilation of the small kernels beside a large one (the paper's table of the dilated reparam block)."""

SIZES = (0, 3, *BRANCHES)


def mixed(depth: int, small: int) -> tuple[int, ...]:
    """Kernel sizes of `depth` blocks: one of 13x13, then `small` of 3x3, and so on."""
    return tuple(3 if i % (small + 1) else 13 for i in range(depth))


KERNELS: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {
    (2, 2, 6, 2): ((3,) * 2, (13,) * 2, (13,) * 6, (13,) * 2),
    (2, 2, 8, 2): ((3,) * 2, (13,) * 2, (13,) * 8, (13,) * 2),
    (3, 3, 18, 3): ((3,) * 3, (13,) * 3, mixed(18, 1), (13,) * 3),
    (3, 3, 27, 3): ((3,) * 3, (13,) * 3, mixed(27, 2), (13,) * 3),
}
"""Kernel sizes of every block, by the depths of the published variants."""


def fold(norm: nn.BatchNorm2d, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] that a batch norm in eval mode applies."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.to(dtype) / (norm.running_var.to(dtype) + norm.eps).sqrt()
    return scale, norm.bias.to(dtype) - norm.running_mean.to(dtype) * scale


def dense_kernel(kernel: Tensor, dilation: int, size: int) -> Tensor:
    """A dilated depthwise kernel [C, 1, k, k] -> the dense one [C, 1, size, size] of the same convolution."""
    zeros = kernel.new_zeros(*kernel.shape[:2], size, size)
    reach = dilation * (kernel.shape[-1] - 1) + 1
    start = (size - reach) // 2
    zeros[..., start : start + reach : dilation, start : start + reach : dilation] = kernel
    return zeros


class DilatedReparam(nn.Module):
    """Sum of depthwise convolutions, one large and several dilated, each with its batch norm (section 3.2).

    Maps [B, C, H, W] -> [B, C, H, W].

    Args:
        branches: False leaves the large kernel alone.
    """

    def __init__(self, dim: int, size: int, branches: bool = True) -> None:
        super().__init__()
        self.size = size
        small = BRANCHES[size] if branches else ()
        self.convs = nn.ModuleList(DepthwiseConv2d(dim, k, r, bias=False) for k, r in ((size, 1), *small))
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in self.convs)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.onnx.is_in_onnx_export():
            return reduce(torch.add, (norm(conv(x)) for conv, norm in zip(self.convs, self.norms, strict=True)))
        kernel, shift = self.merged(torch.promote_types(x.dtype, torch.float32))
        return F.conv2d(x, kernel.to(x.dtype), shift.to(x.dtype), padding=self.size // 2, groups=len(kernel))

    def merged(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Kernel [C, 1, K, K] and bias [C] of the one convolution that equals this module in eval mode."""
        size = self.size
        kernels: list[Tensor] = []
        shifts: list[Tensor] = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            scale, shift = fold(norm, dtype)
            kernels.append(dense_kernel(conv.weight.to(dtype), conv.dilation[0], size) * scale[:, None, None, None])
            shifts.append(shift)
        return torch.stack(kernels).sum(0), torch.stack(shifts).sum(0)


class Grn(nn.Module):
    """Global response normalisation on [B, H, W, C]: (gamma N + 1) x + beta, N = G / (mean_c G + 1e-6), G = ||x||_HW.

    Args:
        shift: whether there is a beta.
    """

    def __init__(self, dim: int, shift: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        x = (self.weight * (norm / (norm.mean(-1, keepdim=True) + 1e-6)) + 1) * x
        return x if self.bias is None else x + self.bias


class UniRepBlock(nn.Module):
    """The block of this file's docstring on maps [B, C, H, W]; `deploy` builds the merged form.

    Raises:
        BackboneError: a kernel size that is not among 0, 3, 5, .. 17.
    """

    def __init__(
        self, dim: int, kernel_size: int, drop_path: float = 0.0, deploy: bool = False, branches: bool = True
    ) -> None:
        super().__init__()
        if kernel_size not in SIZES:
            raise BackboneError(f"kernel size {kernel_size}: expected one of {', '.join(map(str, SIZES))}")
        self.deploy = deploy
        self.norm: nn.Module = nn.Identity() if deploy or not kernel_size else nn.BatchNorm2d(dim)
        self.dwconv: nn.Module
        if kernel_size == 0:
            self.dwconv = nn.Identity()
        elif deploy or kernel_size == 3:
            self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=deploy)
        else:
            self.dwconv = DilatedReparam(dim, kernel_size, branches)
        self.se = SEModule(dim, rd_channels=dim // 4)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.grn = Grn(4 * dim, shift=not deploy)
        self.fc2 = nn.Linear(4 * dim, dim, bias=deploy)
        self.norm2: nn.Module = nn.Identity() if deploy else nn.BatchNorm2d(dim)
        self.gamma = None if deploy else nn.Parameter(torch.full((dim,), 1e-6))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.norm(self.dwconv(x))).permute(0, 2, 3, 1)
        y = self.fc2(self.grn(F.gelu(self.fc1(y)))).permute(0, 3, 1, 2)
        y = self.norm2(y)
        if self.gamma is not None:
            y = y * self.gamma[:, None, None]
        return x + self.drop_path(y)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Change to the deploy form in place; what it computes in eval mode stays. Done before: nothing happens."""
        if self.deploy:
            return
        dtype = self.fc2.weight.dtype
        if not isinstance(self.dwconv, nn.Identity):
            assert isinstance(self.norm, nn.BatchNorm2d)
            if isinstance(self.dwconv, DilatedReparam):
                kernel, shift = self.dwconv.merged()
            else:
                assert isinstance(self.dwconv, nn.Conv2d)
                kernel, shift = self.dwconv.weight.double(), 0.0
            scale, outer = fold(self.norm)
            dim, size = kernel.shape[0], kernel.shape[-1]
            conv = nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim, device=kernel.device, dtype=dtype)
            conv.weight.copy_(kernel * scale[:, None, None, None])
            conv.bias.copy_(shift * scale + outer)  # pyright: ignore[reportOptionalMemberAccess]
            self.dwconv, self.norm = conv, nn.Identity()
        assert isinstance(self.norm2, nn.BatchNorm2d)
        assert self.gamma is not None
        assert self.grn.bias is not None
        scale, shift = fold(self.norm2)
        weight = self.fc2.weight.double() * (self.gamma.double() * scale)[:, None]
        bias = self.gamma.double() * shift + weight @ self.grn.bias.double()
        self.fc2.weight.copy_(weight)
        self.fc2.bias = nn.Parameter(bias.to(dtype))
        self.norm2, self.gamma, self.grn.bias, self.deploy = nn.Identity(), None, None, True


class UniRepLKNet(Pyramid):
    """UniRepLKNet; arguments not named here are those of every timm model.

    Args:
        kernel_sizes: of every block, a tuple a stage; None for the published ones of these depths.
        deploy: build the merged form, for weights that `reparameterize` made.
        branches: False trains large kernels without dilated ones beside them.

    Raises:
        BackboneError: depths whose kernel sizes are not published and not given, or sizes that cannot be.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (3, 3, 27, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        deploy: bool = False,
        branches: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        dims, depths = four("unireplknet", dims, "dims"), four("unireplknet", depths, "depths")
        if kernel_sizes is None and depths not in KERNELS:
            raise BackboneError(
                f"unireplknet: no kernel sizes are published for depths {depths}: pass kernel_sizes, {sum(depths)} "
                f"numbers in four tuples, or depths of {' or '.join(map(str, KERNELS))}"
            )
        sizes = KERNELS[depths] if kernel_sizes is None else kernel_sizes
        if tuple(map(len, sizes)) != depths:
            raise BackboneError(f"unireplknet: {tuple(map(len, sizes))} kernel sizes for depths {depths}")
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stem = nn.Sequential(
            nn.Conv2d(in_chans, dims[0] // 2, 3, 2, 1),
            LayerNorm2d(dims[0] // 2, eps=1e-6),
            nn.GELU(),
            nn.Conv2d(dims[0] // 2, dims[0], 3, 2, 1),
            LayerNorm2d(dims[0], eps=1e-6),
        )
        stages = [
            Stage(
                nn.Sequential(nn.Conv2d(dims[i - 1], dims[i], 3, 2, 1), LayerNorm2d(dims[i], eps=1e-6))
                if i
                else nn.Identity(),
                [
                    UniRepBlock(dims[i], size, rate, deploy, branches)
                    for size, rate in zip(sizes[i], rates[i], strict=True)
                ],
            )
            for i in range(4)
        ]
        super().__init__(
            stem, stages, nn.Identity(), pooled_head(dims[-1], num_classes, global_pool, drop_rate, eps=1e-6),
            dims=dims, strides=(4, 8, 16, 32), in_chans=in_chans, num_classes=num_classes,
        )  # fmt: skip
        self.deploy = deploy
        self.apply(init_as_convnext)

    def check_input(self, height: int, width: int) -> None:
        if min(height, width) < 32:
            raise BackboneError(f"image of {height}x{width} pixels: UniRepLKNet needs at least 32x32")

    def reparameterize(self) -> None:
        """Merge every block in place (`UniRepBlock.reparameterize`); a second call changes nothing.

        Warns when the model is in train mode: its batch statistics are frozen as they are.
        """
        if self.training and not self.deploy:
            warnings.warn(
                "reparameterize in train mode: the batch statistics are frozen as they are; call eval() first",
                stacklevel=2,
            )
        super().reparameterize()
        self.deploy = True

    def train(self, mode: bool = True) -> UniRepLKNet:
        if mode and getattr(self, "deploy", False):
            warnings.warn(
                "training a reparameterised UniRepLKNet: its batch norms are gone; train the original form instead",
                stacklevel=2,
            )
        super().train(mode)
        return self


default_cfgs = generate_default_cfgs(
    {
        **{f"unireplknet_{size}": cfg() for size in ("a", "f", "p", "n", "t", "s")},
        **{f"unireplknet_{size}": cfg(size=384, crop_pct=1.0) for size in ("b", "l", "xl")},
    }
)


def create(variant: str, pretrained: bool, depths: tuple[int, ...], width: int, given: dict[str, Any]) -> UniRepLKNet:
    defaults: dict[str, Any] = {"depths": depths, "dims": tuple(width * 2**i for i in range(4))}
    return build_pyramid(UniRepLKNet, variant, pretrained, defaults, given)


@register_model
def unireplknet_a(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    return create("unireplknet_a", pretrained, (2, 2, 6, 2), 40, kwargs)


@register_model
def unireplknet_f(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    return create("unireplknet_f", pretrained, (2, 2, 6, 2), 48, kwargs)


@register_model
def unireplknet_p(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    return create("unireplknet_p", pretrained, (2, 2, 6, 2), 64, kwargs)


@register_model
def unireplknet_n(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    return create("unireplknet_n", pretrained, (2, 2, 8, 2), 80, kwargs)


@register_model
def unireplknet_t(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    return create("unireplknet_t", pretrained, (3, 3, 18, 3), 80, kwargs)


@register_model
def unireplknet_s(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    return create("unireplknet_s", pretrained, (3, 3, 27, 3), 96, kwargs)


@register_model
def unireplknet_b(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    return create("unireplknet_b", pretrained, (3, 3, 27, 3), 128, kwargs)


@register_model
def unireplknet_l(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    return create("unireplknet_l", pretrained, (3, 3, 27, 3), 192, kwargs)


@register_model
def unireplknet_xl(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    return create("unireplknet_xl", pretrained, (3, 3, 27, 3), 256, kwargs)
