"""LSUV: a network drawn so that every convolution answers with variance 1 (Mishkin and Matas, 2016; 1511.06422)."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from foveal.backbones.convolutions import convolutions, outputs, watch
from foveal.core.errors import DataError


@torch.no_grad()
def lsuv(
    module: nn.Module, images: Tensor, *, tolerance: float = 0.05, iterations: int = 10, seed: int = 0
) -> tuple[nn.Module, dict[str, float]]:
    """A copy whose convolutions, one after the other as they run, are drawn orthogonal and scaled until their output on
    the images has variance 1, and the variance that each came to.

    Biases become 0. What stands behind a normalisation layer gains little from it.

    Raises:
        BackboneError: no convolution.
        DataError: an output without variance, so that no scale can help.
    """
    made = copy.deepcopy(module).eval()
    rng = torch.Generator().manual_seed(seed)
    names = [each.name for each in watch(made, images[:1])]
    found = convolutions(made)
    reached: dict[str, float] = {}
    for name in names:
        conv = found[name]
        drawn = torch.empty(conv.weight.shape)
        nn.init.orthogonal_(drawn, generator=rng)
        conv.weight.copy_(drawn)
        if conv.bias is not None:
            conv.bias.zero_()
        for _ in range(iterations):
            with outputs(made, [name]) as kept:
                made(images)
            variance = float(kept[name].float().var(correction=0))
            if not variance > 1e-20 or not math.isfinite(variance):
                raise DataError(
                    f"layer '{name}' answers with variance {variance:.3g}: no scale makes it 1; give images that differ"
                )
            reached[name] = variance
            if abs(variance - 1) < tolerance:
                break
            conv.weight.div_(math.sqrt(variance))
    return made.train(module.training), reached
