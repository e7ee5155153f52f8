"""SInGE: channels that matter least on their way to nothing are cut, and the network is repaired as it shrinks.

Yvinec, Dapogny, Cord and Bailly, "SInGE: Sparsity via Integrated Gradients Estimation of Neuron Relevance", NeurIPS
2022, arXiv 2207.04089. A neuron's weights w_i are scaled down along w(s) = mu^s w, s = 0..S, and then to zero. Its
relevance is what the loss F feels along that path,

    I_i = sum_s || grad_{w_i} F(w(s)) ||_2 || w_i(s) - w_i(s + 1) ||_2,

averaged over batches; S = 1 and mu = 0 give gradient times magnitude. Layer by layer the least relevant channels are
removed, never masked, with some optimiser steps in between and more at the end. It needs labels and gradients, and,
on convolutional networks, torch-pruning to find the channels that residual sums and depthwise convolutions tie
together: they share one score, the sum over what makes them, and go together. In networks with attention, the hidden
units of each MLP and (timm's plain attention) whole heads are cut; the token width stays.

Where we depart: the path is integrated on the loss rather than the prediction, and all neurons of a layer are scaled
at once, which costs S + 1 passes a layer. Every layer loses the same share, the first convolution nothing, and kept
channels are multiples of `round_to`, since latency falls in such steps. Optimiser, S and mu of the paper's
experiments are unverified.

When not to use it: without labels (`powerquant` needs none); when the time to tune afterwards is missing, for hard
cuts without it answer at random; for less memory alone (`powerquant` keeps more accuracy per byte). With few steps to
tune, take `between=0`: in the card's experiment of 28 steps, pieces of two after each layer were worth less than all of
them at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveal.backbones.channels import Group, groups, remove, resize, sizes
from foveal.core.errors import FovealError, UsageError
from foveal.core.families.shrink import Quantity, Shrink, Shrunk, Target, TaskData
from foveal.core.method import Classifier, Spec, classification_loss, method
from foveal.core.options import option, options

Part = tuple[Tensor, Tensor]
"""A parameter, channels first, and the channels that belong to each neuron [units, k]."""
MOST = 0.95
"""The largest rate that is tried to reach a target."""


def path(steps: int, mu: float) -> list[tuple[float, float]]:
    """Neighbouring factors (f_s, f_{s+1}) from 1 by mu^s to mu^steps, and from there to 0 (step 1).

    Raises:
        UsageError: no step, or a mu outside [0, 1).
    """
    if steps < 1 or not 0 <= mu < 1:
        raise UsageError(f"{steps} steps with mu {mu}: expected at least 1, and mu in [0, 1)")
    factors = [mu**step for step in range(steps + 1)] + [0.0]
    return list(pairwise(factors))


def relevance(
    loss: Callable[[Mapping[str, Tensor]], Tensor],
    parts: Sequence[Part],
    batches: Iterable[Mapping[str, Tensor]],
    steps: int,
    mu: float,
    *,
    signed: bool = False,
    alone: int | None = None,
) -> Float[Tensor, " units"]:
    """Relevance of every neuron of a layer (step 2), its weights as they were afterwards.

    Args:
        loss: batch -> scalar; reads the parameters of `parts`.
        parts: what makes the neurons. Norms are taken for each part, and summed.
        signed: sum inner products at midpoints instead, which tends to F(full) - F(without the neuron).
        alone: scale this neuron only, as the definition has it, rather than the whole layer; the others' are then not
            relevances.

    Raises:
        FovealError: the loss is not a finite number.
        UsageError: no batch.
    """
    parameters = [parameter for parameter, _ in parts]
    originals = [parameter.detach().clone() for parameter in parameters]
    moves = [moving(parameter, index, alone) for parameter, index in parts]
    total, count = torch.zeros(len(parts[0][1])), 0
    try:
        for batch in batches:
            count += 1
            for here, there in path(steps, mu):
                at = (here + there) / 2 if signed else here
                with torch.no_grad():
                    for parameter, original, move in zip(parameters, originals, moves, strict=True):
                        parameter.copy_(torch.where(move, original * at, original))
                value = loss(batch)
                if not torch.isfinite(value):
                    raise FovealError(f"the loss is {float(value)} while channels are scored: fit the model again")
                gradients = torch.autograd.grad(value, parameters, allow_unused=True)
                for gradient, original, (_, index) in zip(gradients, originals, parts, strict=True):
                    if gradient is not None:
                        total += felt(gradient, original * (here - there), index, signed).cpu()
    finally:
        with torch.no_grad():
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.copy_(original)
    if count == 0:
        raise UsageError("no images to score channels on: expected at least one batch")
    return total / count


def moving(parameter: Tensor, index: Tensor, alone: int | None) -> Tensor:
    """Which channels of a parameter are scaled, shaped to select among them."""
    chosen = torch.zeros(len(parameter), dtype=torch.bool, device=parameter.device)
    chosen[(index if alone is None else index[alone]).flatten().to(parameter.device)] = True
    return chosen.reshape(-1, *[1] * (parameter.ndim - 1))


def felt(gradient: Tensor, delta: Tensor, index: Tensor, signed: bool) -> Float[Tensor, " units"]:
    """||gradient_i|| ||delta_i|| of each neuron, or their inner product."""
    index = index.to(gradient.device)
    g, d = (each.flatten(1)[index].flatten(1) if each.ndim > 1 else each[index] for each in (gradient, delta))
    return (g * d).sum(1) if signed else g.norm(dim=1) * d.norm(dim=1)


def kept_units(units: int, rate: float, round_to: int) -> int:
    """How many of a layer's units stay: (1 - rate) of them, in multiples of `round_to` where there are at least two."""
    if rate == 0:
        return units
    step = round_to if units >= 2 * round_to else 1
    return min(units, max(step, round(units * (1 - rate) / step) * step))


@options
class Options:
    """What `singe` can be told."""

    rate: float = option(0.3, "share of each layer's channels that goes, unless a target says", ge=0, lt=1)
    steps: int = option(20, "of the path to nothing, S", ge=1, le=1000)
    mu: float = option(0.9, "factor of each step", gt=0, lt=1)
    images: int = option(64, "training images on which channels are scored", ge=1, le=1_000_000)
    between: int = option(10, "optimiser steps after each layer", ge=0, le=100_000)
    after: int = option(200, "optimiser steps at the end", ge=0, le=1_000_000)
    lr: float = option(3e-4, "learning rate of these steps", gt=0, le=1)
    round_to: int = option(8, "kept channels are multiples of this", ge=1, le=64)


@method(
    Spec(
        family="shrink",
        title="SInGE",
        year=2022,
        arxiv="2207.04089",
        needs=frozenset({"labels", "gradients"}),
        tasks=("single-label", "multi-label"),
    ),
    Options,
)
class Singe(Shrink):
    targets: ClassVar[tuple[Quantity, ...]] = ("params", "macs", "latency", "size")

    def shrink(self, model: Classifier, data: TaskData | None, target: Target | None) -> Shrunk:
        """
        Raises:
            UsageError: no data, or a target out of reach.
            BackboneError: no channels that can be removed.
        """
        if data is None:
            raise UsageError("singe scores channels on labelled training images: give it some")
        original, model = model, copy.deepcopy(model).eval()
        todo = groups(model)
        rate = self.options.rate if target is None else self.rate_for(model, todo, target)
        before = removed = 0
        for done in range(len(todo)):
            group = todo[done]
            gone = group.units - kept_units(group.units, rate, self.options.round_to)
            before, removed = before + group.units, removed + gone
            if gone:
                scores = self.score(model, group, data)
                todo[done + 1 :] = remove(model, group, scores.argsort(stable=True)[:gone].tolist(), todo[done + 1 :])
                model = self.tuned(model, data, self.options.between)
            data.progress(done + 1, len(todo))
        model = self.tuned(model, data, self.options.after) if removed else model
        notes = {"rate": round(rate, 4), "channels": before, "removed": removed, "layers": len(todo)}
        return Shrunk(model.eval(), {"sizes": sizes(model, original)}, notes)

    def score(self, model: Classifier, group: Group, data: TaskData) -> Tensor:
        """Relevance of each unit of a group [units]; the lowest go first."""
        flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        model.requires_grad_(False)
        parts = [(parameter.requires_grad_(True), index) for parameter, index in group.parameters(model)]
        try:
            return relevance(
                lambda batch: classification_loss(model(batch["images"]), batch),
                parts,
                data.batches(self.options.images, 32),
                self.options.steps,
                self.options.mu,
            )
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)

    def tuned(self, model: Classifier, data: TaskData, steps: int) -> Classifier:
        return data.tune(model.requires_grad_(True), steps, self.options.lr) if steps else model

    def rate_for(self, model: Classifier, todo: Sequence[Group], target: Target) -> float:
        """The smallest rate that reaches the target, to within 1/64."""

        def left(rate: float) -> float:
            trial, rest = copy.deepcopy(model), list(todo)
            while rest:
                group = rest.pop(0)
                gone = group.units - kept_units(group.units, rate, self.options.round_to)
                rest = remove(trial, group, range(gone), rest)
            return target.measure(trial)

        low, high = 0.0, MOST
        least = left(high)
        if least > target.share:
            raise UsageError(
                f"target {target.quantity}={target.share:g} is out of reach: without {high:.0%} of its channels this "
                f"model still has {least:.3f}"
            )
        while high - low > 1 / 64:
            middle = (low + high) / 2
            low, high = (low, middle) if left(middle) <= target.share else (middle, high)
        return high

    def rebuild(self, model: Classifier, plan: Mapping[str, Any]) -> Classifier:
        resize(model, plan["sizes"])
        return model
