"""Batch normalisation folded into the layer before it: the same answers from fewer layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from foveal.core.errors import UsageError

TOLERANCE = 1e-3
"""How far answers may move, as a share of the largest, by the rounding of other sums."""
Pair = tuple[str, str]
"""Names of a layer and of the batch norm that reads what it gives."""


def foldable(model: nn.Module, images: Tensor) -> list[Pair]:
    """Every convolution or linear layer whose output a batch norm reads next, in the order in which they run.

    Args:
        images: what to run the model on, in eval mode, to see who reads what.
    """
    names = {module: name for name, module in model.named_modules()}
    given: dict[int, tuple[str, Tensor]] = {}
    pairs: list[Pair] = []

    def gave(layer: nn.Module, _: Any, output: Tensor) -> None:
        given[id(output)] = (names[layer], output)

    def reads(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in given:
            pairs.append((given[id(inputs[0])][0], names[norm]))

    with ExitStack() as stack, torch.no_grad():
        for module in names:
            if isinstance(module, nn.Conv2d | nn.Linear):
                stack.callback(module.register_forward_hook(gave).remove)
            elif isinstance(module, _BatchNorm) and module.track_running_stats:
                stack.callback(module.register_forward_pre_hook(reads).remove)
        model(images)
    layers, norms = [layer for layer, _ in pairs], [norm for _, norm in pairs]
    return [pair for pair in pairs if layers.count(pair[0]) == 1 and norms.count(pair[1]) == 1]


@torch.no_grad()
def fold(model: nn.Module, pairs: Iterable[Sequence[str]]) -> None:
    """Give each layer the scale and shift of its batch norm, and leave of the latter only its activation; in place.

        W' = W gamma / sqrt(var + eps),    b' = beta + (b - mean) gamma / sqrt(var + eps)

    Raises:
        UsageError: a pair that names no layer with a batch norm of its width.
    """
    modules: Mapping[str, nn.Module] = dict(model.named_modules())
    for pair in pairs:
        layer, norm = (modules.get(str(name)) for name in pair) if len(pair) == 2 else (None, None)
        if not isinstance(layer, nn.Conv2d | nn.Linear) or not isinstance(norm, _BatchNorm):
            raise UsageError(
                f"cannot fold {' into '.join(map(str, reversed(pair)))}: expected a layer and a batch norm"
            )
        if norm.running_var is None or norm.running_mean is None or len(norm.running_var) != len(layer.weight):
            raise UsageError(f"cannot fold {pair[1]} into {pair[0]}: their widths differ")
        gamma = norm.weight if norm.affine else torch.ones_like(norm.running_var)
        beta = norm.bias if norm.affine else torch.zeros_like(norm.running_var)
        scale = gamma / (norm.running_var + norm.eps).sqrt()
        bias = layer.bias if layer.bias is not None else torch.zeros_like(scale)
        shifted = beta + (bias - norm.running_mean) * scale
        layer.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.ndim - 1)))
        layer.bias = nn.Parameter(shifted, requires_grad=layer.weight.requires_grad)
        rest = [each for each in (getattr(norm, "drop", None), getattr(norm, "act", None)) if each is not None]
        rest = [cast(nn.Module, each) for each in rest if not isinstance(each, nn.Identity)]
        model.set_submodule(str(pair[1]), nn.Sequential(*rest) if len(rest) > 1 else rest[0] if rest else nn.Identity())


@torch.no_grad()
def folded(model: nn.Module, images: Tensor) -> list[Pair]:
    """Fold in place whatever can be without changing an answer; pairs whose layer somebody else reads too are left."""
    wanted, pairs = model(images), foldable(model, images)

    def harmless(some: list[Pair]) -> bool:
        trial = copy.deepcopy(model)
        fold(trial, some)
        return float((trial(images) - wanted).abs().max()) < TOLERANCE * float(wanted.abs().max())

    if not harmless(pairs):
        pairs = [pair for pair in pairs if harmless([pair])]
    fold(model, pairs)
    return pairs
