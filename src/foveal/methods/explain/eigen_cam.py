"""Eigen-CAM (Bany Muhammad and Yeasin, IJCNN 2020, arXiv 2008.00299).

The answers of a layer at its h x w positions are the rows of O in R^(hw x C); the map is their projection on the
first right singular vector,

    O = U S V^T,    map = O v_1 = sigma_1 u_1,

what the positions have most in common. It needs a layer with a spatial extent, and one forward pass: no gradient, no
class and no classifier, so it says what the network responds to, not why it answers one class. On transformers the
positions are the patch tokens.

Where we depart from the paper: an SVD leaves the sign of the map free, and half of all naive maps are inverted. A map
of one sign, which non-negative features always have (Perron-Frobenius), is made positive; any other is turned so
that it correlates with the length of the features at each position, with a warning when that correlation is below
0.1. Both rules survive a rotation of the channels. The map comes from the smaller of the Gram matrices O O^T and
O^T O, in float64. `center=true` subtracts each channel's mean first, as pytorch-grad-cam does. EigenGrad-CAM and
maps of further components are left out.

When not to use it: to compare classes (`sobol-attribution`); for the map of the length of the features, which is one
line of code and was measured to be as good (see the card).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveal.core.errors import DataError
from foveal.core.method import Explain, Spec, method
from foveal.core.options import option, options

UNDECIDED = 0.1


def principal(
    features: Float[Tensor, "B n C"], center: bool = False
) -> tuple[Float[Tensor, "B n"], Float[Tensor, " B"]]:
    """sigma_1 u_1 of each image's features (n positions, C channels) with its sign, and sigma_1^2 / sum sigma^2.

    float64. Equal features at all positions, centred, give zeros and a share of zero.
    """
    O = features.double()
    if center:
        O = O - O.mean(1, keepdim=True)
    n, C = O.shape[1:]
    if n <= C:
        values, vectors = torch.linalg.eigh(O @ O.mT)
        first = vectors[..., -1] * values[:, -1:].clamp_min(0).sqrt()
    else:
        values, vectors = torch.linalg.eigh(O.mT @ O)
        first = (O @ vectors[..., -1:])[..., 0]
    share = values[:, -1] / values.clamp_min(0).sum(1).clamp_min(torch.finfo(O.dtype).tiny)
    return first * sign_of(first, O.norm(dim=2))[:, None], share


def sign_of(maps: Float[Tensor, "B n"], lengths: Float[Tensor, "B n"]) -> Float[Tensor, " B"]:
    """+1 or -1 for each map: positive when it has one sign, else along the lengths of the features."""
    low, high = maps.aminmax(dim=1)
    slack = 1e-9 * torch.maximum(low.abs(), high.abs())
    one_sided = (low >= -slack) | (high <= slack)
    along = F.cosine_similarity(maps - maps.mean(1, keepdim=True), lengths - lengths.mean(1, keepdim=True))
    if (~one_sided & (along.abs() < UNDECIDED)).any():
        warnings.warn("sign undecided: the map may be inverted; try center=false, or another layer", stacklevel=3)
    direction = torch.where(one_sided, maps.sum(1), along)
    return torch.where(direction < 0, -1.0, 1.0).to(maps)


def unit_range(maps: Float[Tensor, "B H W"]) -> Float[Tensor, "B H W"]:
    """Each map's lowest value to 0 and highest to 1; a flat map to zeros."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    flat = high - low <= 1e-6 * high.abs()
    return torch.where(flat, 0.0, (maps - low) / torch.where(flat, 1.0, high - low))


@options
class Options:
    """What `eigen-cam` can be told."""

    layer: str = option("", "layer to look at, by its name in the network; default: what the network pools at its end")
    center: bool = option(False, "subtract each channel's mean over the positions first")


@method(
    Spec(
        family="explain",
        title="Eigen-CAM",
        year=2020,
        arxiv="2008.00299",
        needs=frozenset({"feature map"}),
        tasks=("single-label", "multi-label"),
    ),
    Options,
)
class EigenCam(Explain):
    def explain(self, model: Any, images: Tensor, target: Tensor) -> Tensor:
        """
        Raises:
            UsageError: no such layer, or it answers neither maps nor tokens.
            BackboneError: the layer has no spatial extent, or its tokens form no grid.
            DataError: the layer answers NaN.
        """
        found: list[Tensor] = []
        for part in images.split(model.batch):
            maps = model.feature_map(part, self.options.layer)
            if not torch.isfinite(maps).all():
                raise DataError("the layer answers NaN or infinite features: the weights or the images are damaged")
            first, _ = principal(maps.flatten(2).mT, self.options.center)
            grid = first.clamp_min(0).unflatten(1, maps.shape[-2:])[:, None].to(images)
            found.append(unit_range(F.interpolate(grid, images.shape[-2:], mode="bilinear")[:, 0]))
        return torch.cat(found)
