"""Parallel blocks (Touvron et al., ECCV 2022, arXiv 2203.09795): a ViT's blocks side by side, and tuned to stand so.

The first of the paper's three things. Neighbouring residual blocks, attention A and MLP F, become one,

    x <- x + A_1(x) + A_2(x),    x <- x + F_1(x) + F_2(x),

with weights, parameters and multiply-accumulates as they were, and half the steps one after the other. What each
branch no longer sees of its neighbour is of the order of the product of their two contributions, and is trained
back on the labelled images. Then the branches of a block are merged: norms and layer scales go into the matrices, the
matrices of all branches stand side by side, and one wide block computes what they summed up to.

It needs a ViT of timm's plain blocks, and labelled images with gradients through the backbone; without images
the answers are those of before the tuning. Departures: the paper trains parallel ViTs from the start and finds them
level with sequential ones of 36 blocks and more; turning a trained one is our use of it, and so is the merged form,
which is equal. `steps` and `lr` are ours. `foveal.architectures.three_things_vit` has the parts as functions.

When not to use it: where arithmetic takes the time rather than the number of steps (many tokens, large batches, one
core), for the arithmetic stays; on few blocks (a ViT of 12 loses more than one of 36); without layer scale and with few
images, where a trained ViT's answers do not come back. Measure: `foveal shrink` times before and after.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from foveal.core.errors import BackboneError, UsageError
from foveal.core.families.shrink import Accelerate, Shrunk, Target, TaskData
from foveal.core.method import Classifier, Spec, method
from foveal.core.options import option, options


@options
class Options:
    """What `three-things-vit` can be told."""

    k: int = option(2, "blocks that stand side by side", ge=2, le=1000)
    steps: int = option(300, "optimiser steps on the labelled images afterwards", ge=0, le=1_000_000)
    lr: float = option(1e-4, "learning rate of these steps", gt=0, le=1)
    merge: bool = option(True, "make the branches of a block one wide one at the end; the answers stay")


@method(
    Spec(
        family="accelerate",
        title="Parallel blocks",
        year=2022,
        arxiv="2203.09795",
        needs=frozenset({"labels", "attention", "gradients"}),
        tasks=("single-label", "multi-label"),
    ),
    Options,
)
class ThreeThingsVit(Accelerate):
    def shrink(self, model: Classifier, data: TaskData | None, target: Target | None) -> Shrunk:
        """
        Raises:
            BackboneError: not a ViT of timm's plain blocks, k does not divide their number, or the branches of an
                unusual attention cannot be merged.
        """
        from foveal.architectures.three_things_vit import merge_branches, parallelize

        check(model)
        chosen: Options = self.options
        made = with_net(copy.deepcopy(model), partial(parallelize, k=chosen.k))
        pairs = len(net_of(made).blocks)
        if chosen.merge:
            merge_branches(net_of(made))  # what cannot be merged says so before it is tuned
        steps = chosen.steps if data is not None else 0
        if data is not None and steps:
            made = data.tune(made.requires_grad_(True), steps, chosen.lr)
        if chosen.merge:
            made = with_net(made, merge_branches)
        plan = {"blocks": pairs * chosen.k, "k": chosen.k, "merge": chosen.merge}
        notes = {"blocks": f"{plan['blocks']} x 1 -> {pairs} x {chosen.k}", "merged": chosen.merge, "tuned": steps}
        return Shrunk(made.eval(), plan, notes)

    def rebuild(self, model: Classifier, plan: Mapping[str, Any]) -> Classifier:
        """
        Raises:
            BackboneError: not a ViT of timm's plain blocks, or a k that does not divide their number.
            UsageError: a plan for another number of blocks.
        """
        from foveal.architectures.three_things_vit import merge_branches, parallelize

        check(model)
        made = with_net(model, partial(parallelize, k=plan["k"]))
        depth = len(net_of(made).blocks) * plan["k"]
        if depth != plan["blocks"]:
            raise UsageError(f"the plan of {self.name} is for {plan['blocks']} blocks: this model has {depth}")
        return (with_net(made, merge_branches) if plan["merge"] else made).eval()


def check(model: Classifier) -> None:
    """
    Raises:
        BackboneError: something else already reads or changes tokens between the blocks.
    """
    backbone: Any = model.backbone
    if type(model).features is not Classifier.features or backbone.token_hook is not None:
        raise BackboneError(
            f"the tokens of this {backbone.arch} are already changed between its blocks: three-things-vit comes first"
        )


def net_of(model: Classifier) -> Any:
    return cast(Any, model.backbone).model


def with_net(model: Classifier, change: Callable[[Any], Any]) -> Classifier:
    """The model itself, its network replaced by what `change` makes of it."""
    model.set_submodule("backbone.model", change(net_of(model)))
    return model
