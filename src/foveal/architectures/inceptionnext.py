"""InceptionNeXt (Yu et al., CVPR 2024, arXiv 2303.16900): most channels of a large depthwise convolution may pass.

What a 7x7 depthwise convolution costs is memory traffic. The Inception form convolves 3 g of C channels, g = C / 8,
and lets the rest through,

    y = [x_1, DW_3x3 x_2, DW_1x11 x_3, DW_11x1 x_4],    widths C - 3g, g, g, g,

31 g instead of 49 C multiplications a place. A block is x + gamma MLP(BN(y)). timm has this mixer
(`InceptionDWConv2d`) and the pyramids (`inception_next_*`), which are used as they are; here is what it lacks:
`inceptionize` puts the mixer in the place of a model's own large depthwise convolutions and keeps what it can of their
weights, `inception_next_iso_small` is the paper's net at one resolution, and `inception` makes the mixer with branches
off, for this net (`off=("square",)`) and for timm's (`token_mixers=partial(inception, off=("square",))`).

Departures: channels of a branch that is off pass, which the paper does not say; nor does it say the isotropic net's
head, which is ConvNeXt's here (layer norm, linear: 22M parameters as published; the pyramids' MLP would make it 23M).

When not to use it: swapped without tuning afterwards, for most of each kernel is gone; tuned in batches of a few images
from random weights (batch norm; ConvNeXt's layer norm does better); where time goes elsewhere: the wider a model, the
more of it is in its MLPs, and split and concatenation cost a copy of the map. Measure before choosing.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs
from timm.models.inception_next import InceptionDWConv2d, MetaNeXtBlock
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from foveal.architectures._isotropic import Isotropic, build_isotropic, quarters
from foveal.architectures._pyramid import cfg, init_as_convnext, pooled_head
from foveal.architectures._registry import register_model
from foveal.core.errors import BackboneError

Branch = Literal["square", "horizontal", "vertical"]
BRANCHES: dict[Branch, str] = {"square": "dwconv_hw", "horizontal": "dwconv_w", "vertical": "dwconv_h"}
"""Names of timm's convolutions: 3x3, 1 x band and band x 1."""


def inception(
    dim: int,
    dilation: int = 1,
    *,
    band: int = 11,
    branch_ratio: float = 0.125,
    off: Sequence[Branch] = (),
    device: Any = None,
    dtype: Any = None,
) -> InceptionDWConv2d:
    """timm's Inception depthwise convolution, maps [B, dim, H, W] -> [B, dim, H, W].

    Args:
        band: length of the two band kernels, odd.
        branch_ratio: share of the channels in each of the three branches, at most 1/3.
        off: branches whose channels pass unchanged.

    Raises:
        BackboneError: a branch without channels, branches of more channels than there are, an even band, or an
            unknown branch.
    """
    channels = int(dim * branch_ratio)
    if channels < 1:
        least = f"at least {math.ceil(1 / branch_ratio)} channels" if branch_ratio > 0 else "a ratio above 0"
        raise BackboneError(
            f"{dim} channels at branch_ratio {branch_ratio:g}: a branch has no channels, expected {least}"
        )
    if 3 * channels > dim:
        raise BackboneError(f"branch_ratio {branch_ratio:g}: three branches of {channels} channels are more than {dim}")
    if band < 1 or band % 2 == 0:
        raise BackboneError(f"band {band}: expected an odd number, such as {max(1, band + 1)}")
    for branch in off:
        if branch not in BRANCHES:
            raise BackboneError(f"no branch '{branch}': expected {', '.join(get_args(Branch))}")
    mixer = InceptionDWConv2d(
        dim, band_kernel_size=band, branch_ratio=branch_ratio, dilation=dilation, device=device, dtype=dtype
    )
    for branch in off:
        setattr(mixer, BRANCHES[branch], nn.Identity())
    return mixer


def fitted(kernel: Tensor, size: tuple[int, ...]) -> Tensor:
    """Kernels [g, 1, h, w] about their centre, padded with zeros or cropped to `size`; all sides are odd."""
    rows, columns = ((new - int(old)) // 2 for new, old in zip(size, kernel.shape[-2:], strict=True))
    return F.pad(kernel, (columns, columns, rows, rows))


@torch.no_grad()
def transfer_weights(old: nn.Conv2d, mixer: InceptionDWConv2d) -> None:
    """Weights of a depthwise convolution into the mixer that takes its place, biases with them.

    The square branch gets the centre 3x3 of its channels' kernels, the horizontal one the sum over their rows, the
    vertical one the sum over their columns. What passes has no kernel any more.
    """
    _, square, wide, tall = torch.split(old.weight, list(mixer.split_indexes))
    bias = old.weight.new_zeros(old.out_channels) if old.bias is None else old.bias
    kernels = (square, wide.sum(-2, keepdim=True), tall.sum(-1, keepdim=True))
    branches: list[Any] = [getattr(mixer, name) for name in BRANCHES.values()]
    for conv, kernel, shift in zip(branches, kernels, torch.split(bias, list(mixer.split_indexes))[1:], strict=True):
        conv.weight.copy_(fitted(kernel, conv.kernel_size))
        conv.bias.copy_(shift)


@dataclass(frozen=True)
class Cost:
    """What a model costs on one image.

    Attributes:
        parameters: of the whole model.
        macs: multiply-accumulates of the whole model.
        depthwise_bytes: what the convolutions in question read and write: input, output and weights. Not the copy that
            joins the branches of a mixer.
    """

    parameters: int
    macs: int
    depthwise_bytes: int


@dataclass(frozen=True)
class Report:
    """What `inceptionize` did.

    Attributes:
        replaced: names of the convolutions that are Inception mixers now.
        skipped: names of large depthwise convolutions that stay, and why.
    """

    replaced: tuple[str, ...]
    skipped: Mapping[str, str]
    before: Cost
    after: Cost


def large_depthwise(model: nn.Module, min_kernel: int) -> dict[str, nn.Conv2d]:
    """Depthwise convolutions by name with both sides of the kernel at least `min_kernel`, but for Inception's own."""
    own = {each for mixer in model.modules() if isinstance(mixer, InceptionDWConv2d) for each in mixer.children()}
    return {
        name: conv
        for name, conv in model.named_modules()
        if isinstance(conv, nn.Conv2d)
        and conv.groups == conv.in_channels == conv.out_channels > 1
        and min(conv.kernel_size) >= min_kernel
        and conv not in own
    }


def obstacle(conv: nn.Conv2d) -> str:
    """Why a depthwise convolution cannot be replaced, or ''."""
    if type(conv) is not nn.Conv2d:
        return f"a {type(conv).__name__}"
    if not isinstance(conv.weight, nn.Parameter):
        return "its weights are stored as codes"
    for name, found, plain in (("stride", conv.stride, (1, 1)), ("dilation", conv.dilation, (1, 1))):
        if tuple(found) != plain:
            return f"{name} {max(found)}"
    if any(side % 2 == 0 for side in conv.kernel_size):
        return f"an even kernel, {conv.kernel_size[0]}x{conv.kernel_size[1]}"
    same = tuple(side // 2 for side in conv.kernel_size)
    if conv.padding not in ("same", same) or conv.padding_mode != "zeros":
        return f"padding {conv.padding} of {conv.padding_mode}, expected {same} of zeros"
    return ""


def swapped(
    model: nn.Module, min_kernel: int, branch_ratio: float, band: int, transfer: bool
) -> tuple[nn.Module, tuple[str, ...], dict[str, str]]:
    """A copy of the model with its mixers, the names of those, and of what stays with the reason; see `inceptionize`.

    Raises:
        BackboneError: nothing to replace, or mixers that cannot be made.
    """
    made = copy.deepcopy(model)
    found = large_depthwise(made, min_kernel)
    skipped = {name: why for name, conv in found.items() if (why := obstacle(conv))}
    chosen = {name: conv for name, conv in found.items() if name not in skipped}
    if not chosen:
        raise BackboneError(
            f"nothing to replace: {type(model).__name__} has no depthwise convolution of at least "
            f"{min_kernel}x{min_kernel} and stride 1" + (f" but {listed(skipped)}" if skipped else "")
        )
    for name, old in chosen.items():
        try:
            mixer = inception(old.in_channels, band=band, branch_ratio=branch_ratio)
        except BackboneError as error:
            raise BackboneError(f"{name}: {error}") from None
        if transfer:
            transfer_weights(old, mixer)
        else:
            mixer.apply(init_as_convnext)
        mixer.to(old.weight).train(old.training).requires_grad_(old.weight.requires_grad)
        if name:
            made.set_submodule(name, mixer)
        else:
            made = mixer
    return made, tuple(chosen), skipped


def listed(skipped: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({why})" for name, why in skipped.items())


def inceptionize(
    model: nn.Module,
    min_kernel: int = 5,
    branch_ratio: float = 0.125,
    band: int = 11,
    *,
    transfer: bool = True,
    input_size: tuple[int, int] | None = None,
) -> tuple[nn.Module, Report]:
    """A copy of a model with Inception mixers for its large depthwise convolutions of stride 1, and what that changed.

    All other weights stay. Tune it afterwards: identity channels have lost their kernels.

    Args:
        min_kernel: the smallest kernel that is replaced.
        branch_ratio: share of the channels in each branch.
        band: length of the band kernels, odd.
        transfer: begin with what fits of the old kernels (`transfer_weights`) rather than at random.
        input_size: height and width of the images that costs are counted on; default: the model's own, or 224.

    Returns:
        The copy, and its `Report`. Convolutions with a stride, a dilation or other padding stay, with a warning.

    Raises:
        BackboneError: nothing to replace, or mixers that cannot be made (see `inception`).
    """
    made, replaced, skipped = swapped(model, min_kernel, branch_ratio, band, transfer)
    if skipped:
        warnings.warn(f"depthwise convolutions that stay as they are: {listed(skipped)}", stacklevel=2)
    own = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
    channels = next(each.in_channels for each in model.modules() if isinstance(each, nn.Conv2d))
    image = (channels, *(input_size or own[-2:]))
    return made, Report(replaced, skipped, cost(model, replaced, image), cost(made, replaced, image))


def cost(model: nn.Module, names: Collection[str], image: tuple[int, ...]) -> Cost:
    """Costs of a model on one image of shape (C, H, W); the traffic is that of the modules with these `names`."""
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    moved: list[int] = []

    def count(conv: Any, given: Any, out: Tensor) -> None:
        moved.extend(each.numel() * each.element_size() for each in (given[0], out, *conv.parameters()))

    for name in names:
        for each in twin.get_submodule(name).modules():
            if isinstance(each, nn.Conv2d):
                each.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(next(twin.parameters()).new_zeros(1, *image))
    return Cost(sum(each.numel() for each in model.parameters()), int(counter.get_total_flops()) // 2, sum(moved))


class IsoInceptionNeXt(Isotropic):
    """InceptionNeXt at one resolution (section 4.1, table 5); arguments not named here are those of every timm model.

    Args:
        embed_dim: d.
        depth: blocks, at least 4; feature maps are tapped at four depths.
        band, branch_ratio, off: of the mixers, see `inception`.
        ls_init_value: start of the layer scale; None for none.

    Raises:
        BackboneError: fewer than four blocks, mixers that cannot be made, or an image under 16 pixels.
    """

    title = "isotropic InceptionNeXt"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 18,
        band: int = 11,
        branch_ratio: float = 0.125,
        off: Sequence[Branch] = (),
        ls_init_value: float | None = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        def mixer(dim: int, dilation: int, **more: Any) -> nn.Module:
            return inception(dim, dilation, band=band, branch_ratio=branch_ratio, off=off, **more)

        options: Any = {"token_mixer": mixer, "ls_init_value": ls_init_value}
        stages = quarters(depth, lambda rate: MetaNeXtBlock(embed_dim, drop_path=rate, **options), drop_path_rate)
        super().__init__(
            nn.Sequential(nn.Conv2d(in_chans, embed_dim, 16, 16), nn.BatchNorm2d(embed_dim)),
            stages,
            pooled_head(embed_dim, num_classes, global_pool, drop_rate, eps=1e-6),
            embed_dim=embed_dim,
            in_chans=in_chans,
            num_classes=num_classes,
        )
        self.apply(init_as_convnext)


default_cfgs = generate_default_cfgs(
    {
        "inception_next_iso_small": cfg(
            pool_size=(14, 14),
            paper_ids="arXiv:2303.16900",
            paper_name="InceptionNeXt: When Inception Meets ConvNeXt",
            origin_url="https://github.com/sail-sg/inceptionnext",
        )
    }
)


@register_model
def inception_next_iso_small(pretrained: bool = False, **kwargs: Any) -> IsoInceptionNeXt:
    """18 blocks of width 384 on patches of 16 pixels."""
    return build_isotropic(IsoInceptionNeXt, "inception_next_iso_small", pretrained, kwargs)
