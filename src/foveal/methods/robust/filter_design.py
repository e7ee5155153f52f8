"""Filter design (survey, 2024, arXiv 2410.21644): what the filters of a trained CNN are like, in numbers.

The survey goes through how convolutional networks choose their filters (initialisation, size, number, and learning
without labels) and finds that the choice depends on the data and that no theory settles it. So this method measures,
on a network and some images, without labels:

- every layer's receptive field by formula, r_l = r_(l-1) + (k_l - 1) d_l j_(l-1), and by gradient (the radius that
  holds 95% of |d output / d image|), beside the length over which the images resemble themselves;
- the deviation of its weights beside He's, Glorot's and LeCun's, how variance passes forwards and backwards, and
  filters that are identical;
- the effective rank of its bank, exp of the entropy of the squared singular values' shares, with copies and channels
  that never change;
- spectrum, direction and separability of its kernels;

and learns a bank for the first layer from the images' own patches (`bank`, see `foveal.blocks.filter_banks`), whose
weights lie beside the page. It needs images and no labels, and changes nothing. In Python, `lsuv` of
`foveal.backbones.lsuv` draws a network anew with variance 1 in every layer, and `install` puts a bank into a layer.

Where we decide what the survey leaves open: variances are compared with those of the convolution that ran before;
copies count within a group only, since filters of a depthwise layer read different channels; the field of a place is
that of its longest path, and gates that read the whole image do not count.

What was found: as a frozen first layer whitened k-means is ahead of random filters by half a point on digits and behind
by 1.7 on solar cells, perhaps because normalised patches lose the brightness that tells cells apart. A trained first
layer has a lower effective rank than a random one (7.9 against 17.5 on EfficientNet-Lite0) and more direction.

When not to use it: to decide what to prune. A low rank says that filters resemble each other on paper; what a layer may
lose without harm only `foveal shrink` measures. On networks of attention it sees the patch embedding and little else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from foveal.backbones.convolutions import Gradients, Ran, gradients, watch
from foveal.backbones.wrapper import frozen
from foveal.blocks import filters as bank_of
from foveal.blocks.filter_banks import Bank, Kind, folded, learn
from foveal.core.errors import DataError
from foveal.core.families.robust import Examination, Robust, Section
from foveal.core.method import Spec, method
from foveal.core.options import option, options

WATCHED, TRACED = 64, 8
"""Images that outputs are measured on, and that gradients are traced through, at most."""
DRAWN, TILE = 64, 36
"""Filters in a picture, at most, and the pixels of each."""
LAYERS = 4
"""Layers behind the first whose filters are drawn, at most."""


@options
class Options:
    """What `filter-design` can be told."""

    bank: Kind = option("kmeans", "the filters to learn from the images for the first layer")
    filters: int = option(0, "how many; 0: as many as the first layer has, 64 at most", ge=0, le=4096)
    size: int = option(0, "their side in pixels; 0: the first layer's", ge=0, le=64)
    eps: float = option(
        0.1, "what whitening adds to the variances of the patches, as a share of their mean", gt=0, le=10
    )
    patches: int = option(50_000, "patches to learn from", ge=100, le=1_000_000)
    alike: float = option(0.95, "filters whose cosine is above this are copies", gt=0, lt=1)


def size_of(each: Ran, reach: Gradients, texture: float) -> dict[str, Any]:
    """What a layer is and what it sees."""
    conv, radius = each.conv, reach.radius.get(each.name)
    kernel = max(conv.kernel_size)
    odd = kernel >= 5 and kernel % 2 == 1 and conv.kernel_size[0] == conv.kernel_size[1]
    return {
        "kernel": " x ".join(map(str, conv.kernel_size)),
        "stride": max(conv.stride),
        "dilation": max(conv.dilation),
        "groups": conv.groups,
        "channels": f"{conv.in_channels} to {conv.out_channels}",
        "weights": conv.weight.numel(),
        "macs": each.macs,
        "map": " x ".join(map(str, each.map)),
        "field": None if each.field is None else max(each.field),
        "radius": radius,
        "textures": None if radius is None else radius / texture,
        "stacked": bank_of.stacked(kernel, conv.in_channels, conv.out_channels, conv.groups) if odd else None,
    }


def drawing_of(each: Ran, before: Ran | None, back: Mapping[str, float]) -> dict[str, Any]:
    """How a layer's weights were drawn, and what it does to variance."""
    conv, weight = each.conv, each.conv.weight
    area = math.prod(conv.kernel_size)
    schemes = bank_of.deviations(weight.shape[1] * area, conv.out_channels // conv.groups * area)
    std = float(weight.detach().double().std(correction=0))
    known = before is not None and before.out.variance > 0 and each.out.variance > 0
    returns = before is not None and back[each.name] > 0
    return {
        "std": std,
        **{scheme.lower(): std / value for scheme, value in schemes.items()},
        "nearest": min(schemes, key=lambda scheme: abs(math.log(max(std, 1e-30) / schemes[scheme]))),
        "activation": each.activation,
        "recommended": bank_of.recommended(each.activation),
        "forward": each.out.variance / before.out.variance if known and before else None,
        "backward": back[before.name] / back[each.name] if returns and before else None,
        "identical": bank_of.identical(weight, conv.groups),
        "orthogonality": bank_of.orthogonality(weight),
    }


def number_of(each: Ran, alike: float) -> dict[str, Any]:
    """How many filters a layer has, and how many differ."""
    weight, groups = each.conv.weight, each.conv.groups
    most = min(len(weight), weight[0].numel())
    rank, rank99 = bank_of.effective_rank(weight), bank_of.energy_rank(weight, 0.99)
    return {
        "filters": len(weight),
        "most": most,
        "rank": rank,
        "rank_share": rank / most,
        "rank95": bank_of.energy_rank(weight, 0.95),
        "rank99": rank99,
        "suggested": rank99 if groups == 1 else None,
        "copies": bank_of.duplicates(weight, groups, alike),
        "dead": each.dead(),
        "hoyer": float(bank_of.hoyer(weight).mean()),
    }


def shape_of(each: Ran) -> dict[str, Any]:
    """Frequency, direction and separability, for kernels larger than 1 x 1."""
    if max(each.conv.kernel_size) == 1:
        return dict.fromkeys(("dc", "frequency", "coherence", "separability"))
    found = bank_of.spectrum(each.conv.weight)
    return {
        "dc": float(found.dc.mean()),
        "frequency": float(found.frequency.mean()),
        "coherence": found.oriented(),
        "separability": float(bank_of.separability(each.conv.weight).mean()),
    }


def picture(bank: Float[Tensor, "n c kh kw"]) -> UInt8[np.ndarray, "H W 3"]:
    """Filters side by side, grey for 0: in colour where they read three channels, else the pattern that explains most
    of a filter's channels."""
    bank = bank.detach().double().cpu()[:DRAWN]
    n, channels, height, width = bank.shape
    if channels != 3:
        left, _, right = torch.linalg.svd(bank.flatten(2), full_matrices=False)
        sign = left[:, :, 0].sum(1).sign()
        bank = (right[:, 0] * sign.where(sign != 0, 1.0)[:, None]).reshape(n, 1, height, width).expand(-1, 3, -1, -1)
    scaled = bank / bank.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    zoom = max(1, TILE // max(height, width))
    tiles = (127.5 + 127.5 * scaled).round().byte().repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    tiles = torch.nn.functional.pad(tiles, (1, 1, 1, 1), value=255).permute(0, 2, 3, 1)
    across = min(n, 16 if n > 32 else 8)
    blank = torch.full((-n % across, *tiles.shape[1:]), 255, dtype=torch.uint8)
    grid = torch.cat([tiles, blank]).unflatten(0, (-1, across))
    return grid.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1).numpy()


@method(
    Spec(
        family="robust",
        title="On filter design in deep convolutional neural network",
        year=2024,
        arxiv="2410.21644",
        needs=frozenset({"gradients"}),
        tasks=("single-label", "multi-label"),
    ),
    Options,
)
class FilterDesign(Robust):
    def examine(self, model: Any, images: Tensor, seed: int) -> Examination:
        """
        Raises:
            BackboneError: a network without a convolution.
            DataError: images without variation, or too few patches to learn from.
            UsageError: more filters than the bank can make.
        """
        varied = images[images.mean(1).flatten(1).std(1) > 1e-4]
        if not len(varied):
            raise DataError(f"all {len(images)} images are constant: zero variance, there is nothing to measure on")
        texture = float(bank_of.texture_length(varied).median())
        inputs = model.normalised(varied)
        with frozen(model.module):
            ran = watch(model.module, inputs[:WATCHED].to(model.device), model.answer)
            back = gradients(model.module, inputs[:TRACED].to(model.device), ran, model.answer, seed=seed)
        layers = [
            {
                "name": each.name.removeprefix("backbone.model."),
                **size_of(each, back, texture),
                **drawing_of(each, before, back.variance),
                **number_of(each, self.options.alike),
                **shape_of(each),
            }
            for each, before in zip(ran, [None, *ran[:-1]], strict=True)
        ]
        bank = self.learnt(ran[0], inputs, seed)
        weight, bias = folded(bank)
        problems, chances = problems_of(layers), chances_of(layers)
        total = {key: sum(layer[key] for layer in layers) for key in ("weights", "macs", "filters", "copies", "dead")}
        last = next((layer for layer in reversed(layers) if layer["radius"] is not None), None)
        verdict = f"{len(layers)} convolutions with {total['filters']:,} filters: {total['copies']:,} are copies of "
        verdict += f"another, {total['dead']:,} never change on these images. "
        verdict += "See below what deserves a look." if problems else "Nothing among them asks for a repair."
        return Examination(
            good=not problems,
            verdict=verdict,
            findings=[*problems, *chances],
            tiles={
                "convolutions": len(layers),
                "weights in them": total["weights"],
                "multiply-accumulates in them": total["macs"],
                "pixels: the images' own scale": texture,
                "pixels: radius that the last one sees": last["radius"] if last else None,
            },
            sections=sections_of(layers, ran, bank),
            numbers={"texture": texture, "images": len(varied), "layers": layers, **total},
            tensors={"weight": weight, "bias": bias},
        )

    def learnt(self, first: Ran, inputs: Tensor, seed: int) -> Bank:
        """A bank for the first layer, from images as the network reads them."""
        chosen: Options = self.options
        side = chosen.size or max(first.conv.kernel_size)
        count = chosen.filters or min(DRAWN, first.conv.out_channels)
        return learn(inputs.cpu(), chosen.bank, count, side, eps=chosen.eps, count=chosen.patches, seed=seed)


def problems_of(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What should be changed."""
    found: list[str] = []
    for key, text in (
        ("identical", "filters equal another to the last digit and learn alike: draw them anew"),
        ("dead", "channels answer the same all over the images looked at: here they cost and tell nothing"),
        ("copies", "filters are near copies of another: fewer would do"),
    ):
        ill = [layer for layer in layers if layer[key]]
        number = sum(layer[key] for layer in ill)
        if number and (key != "copies" or number > 0.02 * sum(layer["filters"] for layer in layers)):
            worst = max(ill, key=lambda layer: layer[key] / layer["filters"])
            share = f"most in {worst['name']}, {worst[key]:,} of {worst['filters']:,}"
            found.append(f"{number:,} {text} ({share}).")
    return found


def chances_of(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What could be tried."""
    found: list[str] = []
    low = [each for each in layers if each["suggested"] and each["suggested"] < 0.5 * each["most"]]
    if low:
        shown = ", ".join(f"{each['name']} {each['suggested']} of {each['filters']}" for each in low[:4])
        found.append(
            f"In {len(low)} layers fewer than half of the directions hold 99% of the weights' energy ({shown}). That "
            "does not prove the rest idle: `foveal shrink` measures what may go."
        )
    flat = [each for each in layers if (each["separability"] or 0) >= 0.95]
    if flat:
        shown = ", ".join(each["name"] for each in flat[:4])
        found.append(f"{len(flat)} layers are nearly outer products, k x 1 then 1 x k would do ({shown}).")
    large = [each for each in layers if each["stacked"] is not None]
    if large:
        less = sum(each["stacked"] < each["weights"] for each in large)
        found.append(
            f"{len(large)} layers have kernels of 5 x 5 or more; for {less} of them a stack of 3 x 3 sees as much with "
            "fewer weights."
        )
    return found


def sections_of(layers: Sequence[Mapping[str, Any]], ran: Sequence[Ran], bank: Bank) -> list[Section]:
    first = ran[0]
    spatial = [each for each in ran[1:] if max(each.conv.kernel_size) > 1]
    places = sorted(
        {round(step * (len(spatial) - 1) / max(1, LAYERS - 1)) for step in range(min(LAYERS, len(spatial)))}
    )
    drawn = {
        each.name.removeprefix("backbone.model."): picture(each.conv.weight)
        for each in (spatial[place] for place in places)
    }
    count, _, side, _ = bank.pictures().shape
    return [
        Section(
            "The first layer",
            "Its filters, beside as many directions as the images' own patches suggest without labels. Grey is 0; "
            "filters on three channels are in colour.",
            pictures={
                f"{layers[0]['name']}, as trained": picture(first.conv.weight),
                f"{bank.kind} on patches of {side} x {side}, {count} filters": picture(bank.pictures()),
            },
        ),
        Section(
            "Size: what each layer sees",
            "Field: pixels that can matter to one place, by formula. Radius: within it lies 95% of what does. "
            "Textures: that radius over the images' own scale. Stack: weights of 3 x 3 layers that see as much.",
            {
                "name": "layer", "kernel": "kernel", "stride": "stride", "groups": "groups", "channels": "channels",
                "map": "map", "weights": "weights", "macs": "MACs", "field": "field", "radius": "radius",
                "textures": "textures", "stacked": "stack",
            },
            layers,
            lines={"field": "field by formula", "radius": "radius that holds 95%"},
            measure="pixels",
        ),
        Section(
            "Initialisation: scale and symmetry",
            "The weights' deviation, over that of each scheme; the scheme that suits the activation. Forwards and "
            "backwards: variance of the output, and of the gradient that comes back, over those of the layer before. "
            "Overlap: 0 for orthogonal filters.",
            {
                "name": "layer", "std": "deviation", "he": "over He", "glorot": "over Glorot", "lecun": "over LeCun",
                "activation": "activation", "recommended": "suits", "forward": "forwards", "backward": "backwards",
                "identical": "identical", "orthogonality": "overlap",
            },
            layers,
        ),
        Section(
            "Number: how many filters differ",
            "Rank: how many directions the bank uses evenly (exp of the entropy), of how many it could; then how many "
            "hold 95% and 99% of its energy. Never change: on the first 64 images, after the activation. Sparsity: "
            "0 for equal weights, 1 for a single one.",
            {
                "name": "layer", "filters": "filters", "most": "could be", "rank": "rank", "rank95": "95%",
                "rank99": "99%", "copies": "copies", "dead": "never change", "hoyer": "sparsity",
            },
            layers,
            lines={"rank_share": "rank over what it could be"},
            measure="share",
        ),
        Section(
            "Shape: frequency and direction",
            "Mean: share of the energy in a kernel's mean. Frequency: cycles a pixel. Directed: share of the variation "
            "that goes one way. Separable: share in one outer product. Kernels of 1 x 1 have no shape.",
            {
                "name": "layer", "kernel": "kernel", "dc": "mean", "frequency": "frequency", "coherence": "directed",
                "separability": "separable",
            },
            [layer for layer in layers if layer["dc"] is not None],
            drawn,
        ),
    ]  # fmt: skip
