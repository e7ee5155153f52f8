"""From ResNet-50 to ConvNeXt in fifteen steps (Liu et al., CVPR 2022, arXiv 2201.03545, section 2), each to be trained.

`convnext_step(k)`, or `convnext_step_00` .. `convnext_step_15` by name, is the net after k steps. Each keeps what those
before it changed; the last column is the paper's top-1 on ImageNet-1k.

     0  ResNet-50                                                       76.1
     1  the same net, trained the modern way: AdamW, long, augmented    78.8
     2  3, 3, 9, 3 blocks a stage instead of 3, 4, 6, 3                 79.4
     3  stem of 4x4 patches instead of 7x7 convolution and pooling      79.5
     4  depthwise 3x3 convolution in the bottleneck                     78.3
     5  width 96 instead of 64                                          80.5
     6  inverted bottleneck: C, 4C, C instead of 4C, C, 4C              80.6
     7  depthwise convolution first in the block, on C channels         79.9
     8  its kernel 5x5                                                  80.4
     9  its kernel 7x7 (`_k9`, `_k11`: 80.6, 80.5)                      80.6
    10  GELU instead of ReLU                                            80.6
    11  one activation a block, between the 1x1 convolutions            81.3
    12  one norm a block, after the depthwise convolution               81.4
    13  layer norm instead of batch norm                                81.5
    14  2x2 convolutions with norms between stages, norm before head    82.0
    15  layer scale, and biases in every convolution: ConvNeXt-T        82.1

It answers which of these steps pays on images of your own: train two neighbours from nothing (`foveal fit DATA
--backbone convnext_step_08 --scratch`) and compare. Steps 14 and 15 are timm's ConvNeXt, 15 with the state dict of
`convnext_tiny`. Steps 0 and 1 are one net; the recipe is the loop's.
`layer_ids` groups parameters for learning rates that decay towards the stem (0.8 a group in the paper).

Departures: the paper prints neither code nor every detail of the steps between. Operations settle most of them (all
agree with the paper's to two decimals); chosen here are what operations do not show: norms and activations stay where
they were until a step removes them, a convolution has no bias while a norm follows it (all have one in step 15), the
stem loses its activation in step 11. Weights start as in ResNet (last batch norm of a branch at zero) to step 11,
as in ConvNeXt from step 12.

When not to use it: for a model to ship, take `convnext_tiny`, which has pretrained weights; the steps have none.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import timm
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from foveal.architectures._pyramid import Pyramid, Stage, build_pyramid, cfg, four, init_as_convnext, pooled_head
from foveal.architectures._registry import register_model
from foveal.core.errors import BackboneError


class Stem(nn.Sequential):
    """Convolution, norm and what else comes first; the door where unusable batches are refused."""

    def forward(self, input: Tensor) -> Tensor:
        height, width = int(input.shape[-2]), int(input.shape[-1])
        if min(height, width) < 32:
            raise BackboneError(f"image of {height}x{width} pixels: the steps to ConvNeXt need at least 32x32")
        if isinstance(self[1], nn.BatchNorm2d) and self[1].training and len(input) == 1:
            raise BackboneError(
                "a batch of one image in training: steps 0 to 12 have batch norms, which need at least two; use larger "
                "batches, or steps 13 to 15"
            )
        return super().forward(input)


class Residual(nn.Module):
    """act(shortcut(x) + body(x)): maps [B, C, H, W] -> [B, D, H / s, W / s]."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, act: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.shortcut(x) + self.drop_path(self.body(x)))


def conv(dim: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(dim, out, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)


class Step(Pyramid):
    """The net after one of the steps 0 to 13; arguments not named here are those of every timm model.

    Args:
        step: 0 to 13.
        dims: C of each stage: channels of the 3x3 convolution up to step 5, of the map from step 6.
        kernel_size: of the convolution that sees neighbours; odd.

    Raises:
        BackboneError: tuples that are not of four stages, an even kernel; an image under 32 pixels, or a batch of one
            in training where there are batch norms.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        step: int = 13,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        kernel_size: int = 7,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        dims, depths = four("convnext_step", dims, "dims"), four("convnext_step", depths, "depths")
        check_kernel(kernel_size)
        widths = [4 * dim if step < 6 else dim for dim in dims]
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages: list[Stage] = []
        before = dims[0]
        for i in range(4):
            blocks: list[nn.Module] = []
            for rate in rates[i]:
                stride = 2 if i and not blocks else 1
                blocks.append(block(step, before, dims[i], widths[i], kernel_size, stride, rate))
                before = widths[i]
            stages.append(Stage(nn.Identity(), blocks))
        super().__init__(
            stem(step, in_chans, dims[0]), stages, nn.Identity(),
            pooled_head(widths[-1], num_classes, global_pool, drop_rate),
            dims=widths, strides=(4, 8, 16, 32), in_chans=in_chans, num_classes=num_classes,
        )  # fmt: skip
        self.apply(init_as_resnet if step < 12 else init_as_convnext)


def norm_of(step: int) -> Callable[[int], nn.Module]:
    return nn.BatchNorm2d if step < 13 else partial(LayerNorm2d, eps=1e-6)


def act_of(step: int) -> nn.Module:
    return nn.ReLU() if step < 10 else nn.GELU()


def stem(step: int, in_chans: int, dim: int) -> Stem:
    """Images [B, in_chans, H, W] -> maps [B, dim, H / 4, W / 4]."""
    norm = norm_of(step)(dim)
    if step < 3:
        return Stem(conv(in_chans, dim, 7, stride=2), norm, act_of(step), nn.MaxPool2d(3, 2, 1))
    patches = nn.Conv2d(in_chans, dim, 4, 4, bias=False)
    return Stem(patches, norm, act_of(step)) if step < 11 else Stem(patches, norm)


def block(step: int, before: int, dim: int, width: int, kernel: int, stride: int, drop_path: float) -> Residual:
    """Maps of `before` channels -> of `width`: a bottleneck of `dim` channels, or from step 6 an inverted one."""
    norm = norm_of(step)
    if step < 7:
        middle = dim if step < 6 else 4 * dim
        body = [
            conv(before, middle), norm(middle), act_of(step),
            conv(middle, middle, kernel, stride, groups=middle if step >= 4 else 1), norm(middle), act_of(step),
            conv(middle, width), norm(width),
        ]  # fmt: skip
    else:
        body = [conv(before, before, kernel, stride, groups=before), norm(before)]
        body += [act_of(step)] if step < 11 else []
        body += [conv(before, 4 * width, bias=step >= 12)] + ([norm(4 * width)] if step < 12 else [])
        body += [act_of(step), conv(4 * width, width, bias=step >= 12)] + ([norm(width)] if step < 12 else [])
    same = before == width and stride == 1
    shortcut = nn.Identity() if same else nn.Sequential(conv(before, width, stride=stride), norm(width))
    return Residual(nn.Sequential(*body), shortcut, act_of(step) if step < 11 else nn.Identity(), drop_path)


def init_as_resnet(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, Residual):
        nn.init.zeros_(cast(Any, module.body)[-1].weight)


def check_kernel(size: int) -> None:
    if size < 1 or size % 2 == 0:
        raise BackboneError(f"kernel_size {size}: expected an odd number of at least 1")


def last_steps(step: int, kernel_size: int, **given: Any) -> ConvNeXt:
    """Steps 14 and 15: timm's ConvNeXt, without and with layer scale and the biases of its convolutions."""
    check_kernel(kernel_size)
    details: dict[str, Any] = {"conv_bias": step == 15, "ls_init_value": 1e-6 if step == 15 else None}
    model = ConvNeXt(kernel_sizes=kernel_size, **{**details, **given})
    model.stem = Stem(*model.stem)
    return model


def convnext_step(step: int, **given: Any) -> nn.Module:
    """ConvNeXt-T as far as step 0 to 15, with random weights.

    Args:
        given: `depths`, `dims` (tuples of four), `kernel_size`, and what `timm.create_model` takes.

    Raises:
        BackboneError: another step, `pretrained=True`, or arguments that the step cannot be built with.
    """
    if step not in range(16):
        raise BackboneError(f"step {step}: expected a whole number from 0 (ResNet-50) to 15 (ConvNeXt-T)")
    return timm.create_model(f"convnext_step_{step:02}", **given)


def layer_ids(model: nn.Module) -> dict[str, int]:
    """The layer group of every parameter, for learning rates that fall by a factor with every group from the last.

    The stem is group 0; each three blocks of a stage are one, the downsampling before them included; the norm and the
    classifier behind the stages are the last. ConvNeXt-S, B, L and XL have 12 groups of blocks, as in the paper's
    fine-tuning, ConvNeXt-T has 6. With G = max(ids), group g learns at lr * decay^(G - g).

    Args:
        model: a ConvNeXt of timm or of foveal: parameters named stem, stages.I.downsample and stages.I.blocks.J.

    Raises:
        BackboneError: a model with other names.
    """
    places: dict[str, tuple[int, int]] = {}
    for name, _ in model.named_parameters():
        found = re.match(r"stages\.(\d+)\.(?:downsample\.|blocks\.(\d+)\.)", name)
        if found:
            places[name] = int(found[1]), int(found[2] or 0) // 3
        elif not name.startswith(("stem.", "norm", "head.")):
            raise BackboneError(f"parameter {name}: layer groups are those of ConvNeXt (stem, stages.I.blocks.J, head)")
    order = {place: 1 + index for index, place in enumerate(sorted(set(places.values())))}
    return {
        name: order[places[name]] if name in places else 0 if name.startswith("stem.") else len(order) + 1
        for name, _ in model.named_parameters()
    }


KERNELS = {f"convnext_step_{step:02}": (step, 3 if step < 8 else 5 if step == 8 else 7) for step in range(16)}
KERNELS |= {f"convnext_step_09_k{kernel}": (9, kernel) for kernel in (9, 11)}

default_cfgs = generate_default_cfgs(
    {
        name: cfg(
            paper_ids="arXiv:2201.03545",
            paper_name="A ConvNet for the 2020s",
            origin_url="https://github.com/facebookresearch/ConvNeXt",
        )
        for name in KERNELS
    }
)


def variant(name: str, step: int, kernel_size: int) -> Callable[..., nn.Module]:
    """The function that timm calls to build `name`."""
    defaults: dict[str, Any] = {
        "step": step,
        "kernel_size": kernel_size,
        "depths": (3, 4, 6, 3) if step < 2 else (3, 3, 9, 3),
        "dims": tuple((64 if step < 5 else 96) * 2**i for i in range(4)),
    }
    cls = cast(Any, Step if step < 14 else last_steps)

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_pyramid(cls, name, pretrained, defaults, kwargs)

    create.__name__ = create.__qualname__ = name
    return register_model(create)


globals().update({name: variant(name, *settings) for name, settings in KERNELS.items()})
