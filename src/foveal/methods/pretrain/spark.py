"""SparK, masked image modelling for convolutional networks (Tian et al., ICLR 2023 spotlight, arXiv 2301.03580).

Of the f x f cells of the last map (f = side / stride), a random 40% stay active; the network sees nothing of the others
on any scale, as if its convolutions were sparse (`backbones.masked`). The maps of the last four stages, each with a
learnt token in its empty cells, feed a light decoder from the deepest to the shallowest; it must paint what was hidden,

    loss = mean over masked cells of |p - (t - mean t) / std t|^2 / n,    t in R^n the pixels of one cell.

It needs images without labels and a convolutional network; names and values of its weights stay, so what comes out is
used as what went in. A network that has learnt nothing scores about 1, which the loss must undercut.

Where we depart from the paper: AdamW with a constant weight decay instead of LAMB with a rising one, no gradient
clipping, and a recipe for thousands of images, not a million (epochs, batch size and rate are options). Gates such as
squeeze-and-excitation take their mean over active cells. What no stage depends on, such as the last 1 x 1 convolution
of an EfficientNet, is not trained.

When not to use it: on transformers; with images of a kind the backbone has seen by the million; with so few images or
steps that the loss stays near 1. On a pretrained network compare with the untouched one: it can get worse (see the
card).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone
from foveal.backbones.masked import masked, pyramid, repeated
from foveal.core.errors import UsageError
from foveal.core.families.pretrain import Pretrain
from foveal.core.method import Spec, method
from foveal.core.options import option, options


def kept_cells(cells: int, ratio: float) -> int:
    """How many of `cells` stay active.

    Raises:
        UsageError: none would, or none would be hidden.
    """
    kept = round(cells * (1 - ratio))
    if not 0 < kept < cells:
        raise UsageError(
            f"a ratio of {ratio:g} leaves {kept} of {cells} cells active: expected at least one active and one "
            "hidden; choose another ratio, or larger images"
        )
    return kept


def random_cells(batch: int, side: int, ratio: float, device: torch.device | str = "cpu") -> Bool[Tensor, "B 1 f f"]:
    """For each image the same number of active cells at random places, from torch's generator."""
    kept = kept_cells(side * side, ratio)
    order = torch.rand(batch, side * side, device=device).argsort(1)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :kept], True).view(batch, 1, side, side)


def cells_of(images: Float[Tensor, "B C H W"], stride: int) -> Float[Tensor, "B n p"]:
    """Images cut into squares of `stride` pixels: [B, H W / stride^2, C stride^2]."""
    return F.unfold(images, stride, stride=stride).mT


def targets(images: Float[Tensor, "B 3 H W"], stride: int) -> Float[Tensor, "B n p"]:
    """Each cell's pixels, less their mean, over their standard deviation."""
    cells = cells_of(images, stride)
    return (cells - cells.mean(2, keepdim=True)) / (cells.var(2, keepdim=True) + 1e-6).sqrt()


def hidden_mean(errors: Float[Tensor, "B n p"], active: Bool[Tensor, "B 1 f g"]) -> Float[Tensor, ""]:
    """Mean of errors over the cells that are not active."""
    return errors.mean(2)[~active.flatten(1)].mean()


def begin_blank(module: nn.Module) -> None:
    """The authors' initial weights: so small that the first pictures are nearly blank."""
    for each in module.modules():
        if isinstance(each, nn.Conv2d):
            nn.init.trunc_normal_(each.weight, std=0.02)
        elif isinstance(each, nn.ConvTranspose2d):
            nn.init.kaiming_normal_(each.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(each, nn.Conv2d | nn.ConvTranspose2d) and each.bias is not None:
            nn.init.zeros_(each.bias)


class Densify(nn.Module):
    """Map of one stage, zero where masked -> norm, a learnt token where masked, convolution to the decoder's width."""

    def __init__(self, channels: int, width: int, norm: str, deepest: bool) -> None:
        super().__init__()
        from timm.layers.norm import LayerNorm2d

        self.norm = nn.BatchNorm2d(channels) if norm == "batch" else LayerNorm2d(channels)
        self.token = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, channels, 1, 1), std=0.02))
        same = deepest and channels == width
        size = 1 if deepest else 3
        self.project = nn.Identity() if same else nn.Conv2d(channels, width, size, padding=size // 2)
        begin_blank(self.project)

    def forward(self, maps: Float[Tensor, "B C h w"], active: Bool[Tensor, "B 1 f g"]) -> Float[Tensor, "B D h w"]:
        with masked(self.norm, active):
            normed = self.norm(maps)
        return self.project(torch.where(repeated(active, *maps.shape[2:]), normed, self.token.to(normed.dtype)))


class Up(nn.Sequential):
    """Maps [B, C, h, w] -> [B, D, 2h, 2w]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(
            nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU6(inplace=True),
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )


class Decoder(nn.Module):
    """Dense maps from deep to shallow, each twice the size of the one before -> pictures of the images' size."""

    def __init__(self, stride: int, width: int) -> None:
        super().__init__()
        widths = [width >> j for j in range(stride.bit_length())]
        self.ups = nn.ModuleList(Up(*pair) for pair in itertools.pairwise(widths))
        self.paint = nn.Conv2d(widths[-1], 3, 1)
        begin_blank(self)

    def forward(self, maps: Sequence[Tensor]) -> Float[Tensor, "B 3 H W"]:
        x: Tensor | int = 0
        for level, up in enumerate(self.ups):
            x = up(x + maps[level] if level < len(maps) else x)
        assert isinstance(x, Tensor)
        return self.paint(x)


class MaskedAutoencoder(nn.Module):
    """A convolutional network that sees active cells alone, and a decoder that paints all of them.

    Attributes:
        stride: pixels along a cell's side, the network's last stride.
    """

    def __init__(self, backbone: Backbone, width: int, scales: int) -> None:
        """
        Raises:
            BackboneError: as `pyramid`.
            UsageError: the image side is not a multiple of the stride, or the width cannot be halved often enough.
        """
        super().__init__()
        found = pyramid(backbone, backbone.preprocessing.size, scales)
        self.backbone, self.stride = backbone, found.strides[-1]
        for name in found.idle:
            backbone.get_parameter(name).requires_grad_(False)
        if width % self.stride:
            raise UsageError(f"decoder_width={width}: expected a multiple of {self.stride}, it is halved at every step")
        deep_first = found.channels[::-1]
        self.densify = nn.ModuleList(
            Densify(channels, width >> j, found.norm, j == 0) for j, channels in enumerate(deep_first)
        )
        self.decoder = Decoder(self.stride, width)

    def encode(self, images: Tensor, active: Tensor) -> list[Tensor]:
        """Maps [B, C, h, w] of the last stages, from shallow to deep, zero where masked."""
        with masked(self.backbone.model, active):
            maps = self.backbone.feature_map(images * repeated(active, *images.shape[2:]))
        return [each for each, _ in maps][-len(self.densify) :]

    def forward(self, images: Float[Tensor, "B 3 H W"], active: Bool[Tensor, "B 1 f g"]) -> Float[Tensor, "B 3 H W"]:
        """What every cell looks like, each by its own mean and deviation."""
        deep_first = self.encode(images, active)[::-1]
        return self.decoder([fill(maps, active) for fill, maps in zip(self.densify, deep_first, strict=True)])


@options
class Options:
    ratio: float = option(0.6, "share of the cells that is hidden", gt=0, lt=1)
    decoder_width: int = option(768, "channels of the decoder's first step; 64 to 256 on a CPU", ge=32, le=4096)
    scales: int = option(4, "last stages that the decoder reads; 1: the deepest alone", ge=1, le=4)
    epochs: int = option(100, "passes over the images", ge=1, le=10_000)
    batch_size: int = option(64, "images per step", ge=2, le=65_536)
    lr: float = option(1e-3, "highest learning rate", gt=0, le=1)
    weight_decay: float = option(0.05, "of the weights, not of norms and biases", ge=0, le=1)
    warmup: float = option(0.05, "share of the steps over which the rate rises", ge=0, le=1)


@method(Spec(family="pretrain", title="SparK", year=2023, arxiv="2301.03580", needs=frozenset({"gradients"})), Options)
class Spark(Pretrain):
    def attach(self, backbone: Backbone) -> MaskedAutoencoder:
        model = MaskedAutoencoder(backbone, self.options.decoder_width, self.options.scales)
        kept_cells((backbone.preprocessing.size // model.stride) ** 2, self.options.ratio)
        return model

    def loss(self, model: MaskedAutoencoder, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images = batch["views"][:, 0]
        stride = getattr(model, "module", model).stride
        active = random_cells(len(images), images.shape[-1] // stride, self.options.ratio, images.device)
        goal = targets(images, stride)
        painted = cells_of(model(images, active).float(), stride)
        return {
            "loss": hidden_mean((painted - goal).square(), active),
            "blank": hidden_mean(goal.square(), active).detach(),
        }

    def pictures(self, model: MaskedAutoencoder, images: Tensor) -> dict[str, Tensor]:
        """What the network saw, and that with its hidden cells painted in, each at its true mean and contrast."""
        side = images.shape[-1] // model.stride
        active = random_cells(len(images), side, self.options.ratio, images.device)
        seen = repeated(active, *images.shape[2:])
        cells = cells_of(images, model.stride)
        painted = cells_of(model(images, active), model.stride) * cells.std(2, keepdim=True) + cells.mean(
            2, keepdim=True
        )
        whole = F.fold(painted.mT, images.shape[2:], model.stride, stride=model.stride)
        return {
            "what it saw": images * seen,
            "what it painted, told each cell's mean and contrast": torch.where(seen, images, whole),
        }
