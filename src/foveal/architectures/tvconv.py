"""TVConv (Chen et al., CVPR 2022, arXiv 2203.10489): a depthwise convolution whose kernel depends on the place.

Where images are always framed alike (aligned faces, fundus photos, solar cells on their grid) the kernel may vary with
the position and not with the image. A small network B makes all kernels from learned affinity maps A [c_A, h, w],

    W = B(A) in R^{C x k^2 x h x w},      y_{c,p} = sum_j W_{c,j,p} x_{c,p+j},

B being 3x3 convolutions with layer norms and ReLUs. For inference B runs once and W is stored: the cost is that of a
depthwise convolution, k^2 C h w. `fuse()` does it (timm's `reparameterize_model` finds it); `to_tvconv` swaps the
depthwise convolutions of any timm model; `tvconv_mobilenetv2_*` is the paper's MobileNetV2 for faces of 96 pixels.

Departures: the product is summed over k^2 shifted views instead of an unfolded copy of nine times the map; any odd k;
W may be resized, bilinearly, by an explicit call on a fused layer only; no bias branch (off in the authors' runs).

When not to use it: on images framed at random, or trained with random crops, turns and mirror images, which destroy
the layout that it learns; on input of more than one size (the map's size is fixed); with pretrained weights to keep
(the swapped convolutions start at random).
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import copy
import fnmatch
import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from foveal.architectures._registry import register_model
from foveal.core.errors import BackboneError


def convolve_by_place(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Maps [B, C, H, W] by kernels [C, k^2, h, w], one for every place of the output -> [B, C, h, w].

    Raises:
        BackboneError: the output of this map is not h x w.
    """
    kernel, height, width = math.isqrt(int(weight.shape[1])), int(weight.shape[2]), int(weight.shape[3])
    found = tuple(-(-int(side) // stride) for side in x.shape[-2:])
    if found != (height, width):
        raise BackboneError(
            f"TVConv is tied to a map of {height}x{width}, the input makes {found[0]}x{found[1]}: resize the images, "
            "build it for this size, or fuse() and resize() its kernels"
        )
    x = F.pad(x, (kernel // 2,) * 4)
    rows, columns = stride * (height - 1) + 1, stride * (width - 1) + 1
    views = [x[..., i : i + rows : stride, j : j + columns : stride] for i in range(kernel) for j in range(kernel)]
    y = views[0] * weight[:, 0]
    for view, taps in zip(views[1:], weight.unbind(1)[1:], strict=True):
        y = torch.addcmul(y, view, taps)
    return y


class PlacedConv2d(nn.Module):
    """A fused TVConv: maps [B, C, H, W] -> [B, C, h, w] by stored kernels [C, k^2, h, w]."""

    weight: Tensor

    def __init__(self, weight: Tensor, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.register_buffer("weight", weight)

    @property
    def macs(self) -> int:
        """Multiplications per image: k^2 C h w."""
        return self.weight.numel()

    def resize(self, size: tuple[int, int]) -> PlacedConv2d:
        """The same layer for an output of another size, its kernels interpolated bilinearly between places."""
        weight = F.interpolate(self.weight.float(), size, mode="bilinear", align_corners=False)
        return PlacedConv2d(weight.to(self.weight.dtype), self.stride)

    def forward(self, x: Tensor) -> Tensor:
        return convolve_by_place(x, self.weight.to(x.dtype), self.stride)


class TVConv2d(nn.Module):
    """Translation variant depthwise convolution, maps [B, C, H, W] -> [B, C, h, w], for one size only.

    Args:
        channels: C.
        size: (h, w) of the output, ceil(H / stride) and ceil(W / stride).
        kernel_size: k, odd.
        affinity: c_A, maps that the kernels are made from; they start at one.
        hidden: channels of the generator.
        layers: its middle layers.

    Raises:
        BackboneError: an even kernel.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        kernel_size: int = 3,
        stride: int = 1,
        affinity: int = 4,
        hidden: int = 64,
        layers: int = 3,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise BackboneError(f"kernel_size {kernel_size}: expected an odd number, so that kernels have a centre")
        self.channels = channels
        self.size = size
        self.stride = stride
        self.kernel_size = kernel_size
        self.affinity_maps = nn.Parameter(torch.ones(1, affinity, *size))
        self.generator = nn.Sequential()
        for width in (affinity, *[hidden] * layers):
            self.generator.append(nn.Conv2d(width, hidden, 3, padding=1, bias=False))
            self.generator.append(nn.LayerNorm([hidden, *size]))
            self.generator.append(nn.ReLU())
        self.generator.append(nn.Conv2d(hidden, channels * kernel_size**2, 3, padding=1, bias=False))

    def weight(self) -> Tensor:
        """The kernels of all places, [C, k^2, h, w]; no image enters."""
        return self.generator(self.affinity_maps).view(self.channels, self.kernel_size**2, *self.size)

    @torch.no_grad()
    def fuse(self) -> PlacedConv2d:
        """The same convolution with its kernels stored."""
        return PlacedConv2d(self.weight().clone(), self.stride)

    def forward(self, x: Tensor) -> Tensor:
        return convolve_by_place(x, self.weight().to(x.dtype), self.stride)


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1


def to_tvconv(model: nn.Module, input_size: tuple[int, int] = (96, 96), where: str = "*", **options: Any) -> nn.Module:
    """A copy of a model whose depthwise convolutions depend on the place, for images of one size.

    Args:
        input_size: height and width of the images.
        where: a shell pattern on module names: all depthwise convolutions that match; an exact name must be one.
        options: `affinity`, `hidden` and `layers` of `TVConv2d`.

    Raises:
        BackboneError: nothing to swap, a named convolution that is not depthwise, or one with an even or oblong kernel,
            or a dilated one.
    """
    model = copy.deepcopy(model)
    named: dict[str, nn.Module] = dict(model.named_modules())
    exact = named.get(where)
    if isinstance(exact, nn.Conv2d) and not is_depthwise(exact):
        raise BackboneError(
            f"{where} is not depthwise ({exact.in_channels} to {exact.out_channels} channels in {exact.groups} groups):"
            " TVConv takes the place of depthwise convolutions alone"
        )
    chosen = {name: each for name, each in named.items() if fnmatch.fnmatch(name, where) and is_depthwise(each)}
    if not chosen:
        raise BackboneError(f"no depthwise convolution matches '{where}' in {type(model).__name__}")
    sizes: dict[str, tuple[int, int]] = {}

    def remember(name: str, _module: nn.Module, _given: Any, out: Tensor) -> None:
        sizes[name] = (int(out.shape[-2]), int(out.shape[-1]))

    hooks = [each.register_forward_hook(partial(remember, name)) for name, each in chosen.items()]
    like = next(model.parameters())
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(like.new_zeros(1, 3, *input_size))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    for name, old in chosen.items():
        assert isinstance(old, nn.Conv2d)
        kernel, stride, dilation = old.kernel_size, old.stride, old.dilation
        if kernel[0] != kernel[1] or stride[0] != stride[1] or dilation != (1, 1):
            raise BackboneError(f"{name}: kernel {kernel}, stride {stride}, dilation {dilation}: expected a square one")
        fresh = TVConv2d(old.in_channels, sizes[name], kernel[0], stride[0], **options)
        model.set_submodule(name, fresh.to(like).train(training))
    return model


MOBILENET_V2 = [
    ["ds_r1_k3_s1_c16"],
    ["ir_r2_k3_s2_e6_c24"],
    ["ir_r3_k3_s2_e6_c32"],
    ["ir_r4_k3_s2_e6_c64"],
    ["ir_r3_k3_s1_e6_c96"],
    ["ir_r3_k3_s2_e6_c160"],
    ["ir_r1_k3_s1_e6_c320"],
]


class TVMobileNetV2(EfficientNet):
    """MobileNetV2 for small aligned images: the first convolution has stride 1, every depthwise one is a `TVConv2d`.

    Args:
        img_size: of all images.
        multiplier: of the widths, which are rounded to multiples of 8.
        placed: False keeps ordinary depthwise convolutions, for comparison.
        affinity, hidden, layers: as `TVConv2d`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 96,
        multiplier: float = 1.0,
        num_features: int = 512,
        affinity: int = 4,
        hidden: int = 64,
        layers: int = 3,
        placed: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            decode_arch_def(MOBILENET_V2),
            num_features=num_features,
            act_layer=nn.ReLU6,
            round_chs_fn=partial(round_channels, multiplier=multiplier),
            **kwargs,
        )
        stem: Any = self.conv_stem
        stem.stride = (1, 1)
        for info in self.feature_info:
            info["reduction"] //= 2
        size = (int(to_2tuple(img_size)[0]), int(to_2tuple(img_size)[1]))
        for block in self.blocks.modules() if placed else ():
            old: Any = getattr(block, "conv_dw", None)
            if old is not None:
                stride = old.stride[0]
                size = (-(-size[0] // stride), -(-size[1] // stride))
                fresh: nn.Module = TVConv2d(old.in_channels, size, 3, stride, affinity, hidden, layers)
                block.conv_dw = fresh

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("affinity_maps")}


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 96, 96),
        "pool_size": (6, 6),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
        "first_conv": "conv_stem",
        "classifier": "classifier",
        "paper_ids": "arXiv:2203.10489",
        "paper_name": "TVConv: Efficient Translation Variant Convolution for Layout-aware Visual Processing",
        "origin_url": "https://github.com/JierunChen/TVConv",
    }


default_cfgs = generate_default_cfgs(
    {f"tvconv_mobilenetv2_x{width}": _cfg() for width in ("0_1", "0_2", "0_3", "0_5", "1_0")}
)


def create(variant: str, pretrained: bool, multiplier: float, given: dict[str, Any]) -> TVMobileNetV2:
    feature_cfg = {"out_indices": (0, 1, 2, 3, 4), "feature_cls": "getter"}
    defaults: dict[str, Any] = {"multiplier": multiplier}
    return build_model_with_cfg(TVMobileNetV2, variant, pretrained, feature_cfg=feature_cfg, **{**defaults, **given})


@register_model
def tvconv_mobilenetv2_x0_1(pretrained: bool = False, **kwargs: Any) -> TVMobileNetV2:
    return create("tvconv_mobilenetv2_x0_1", pretrained, 0.1, kwargs)


@register_model
def tvconv_mobilenetv2_x0_2(pretrained: bool = False, **kwargs: Any) -> TVMobileNetV2:
    return create("tvconv_mobilenetv2_x0_2", pretrained, 0.2, kwargs)


@register_model
def tvconv_mobilenetv2_x0_3(pretrained: bool = False, **kwargs: Any) -> TVMobileNetV2:
    return create("tvconv_mobilenetv2_x0_3", pretrained, 0.3, kwargs)


@register_model
def tvconv_mobilenetv2_x0_5(pretrained: bool = False, **kwargs: Any) -> TVMobileNetV2:
    return create("tvconv_mobilenetv2_x0_5", pretrained, 0.5, kwargs)


@register_model
def tvconv_mobilenetv2_x1_0(pretrained: bool = False, **kwargs: Any) -> TVMobileNetV2:
    return create("tvconv_mobilenetv2_x1_0", pretrained, 1.0, kwargs)
