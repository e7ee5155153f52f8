"""LoRA (Hu et al., ICLR 2022, arXiv 2106.09685): low-rank corrections to frozen weights, folded in afterwards.

Beside chosen matrices W of a frozen backbone a product of two thin ones learns, together with a new linear head,

    y = W x + (alpha / r) B A x,    A in R^{r x in}, B in R^{out x r}, B = 0 at the start.

After training W' = W + (alpha / r) B A takes W's place: the result is the same network as before, as fast as before.
The peft library does the injection and the merge.

On transformers the corrected weights are the projections of self-attention (to queries, keys, values and output; the
paper corrects W_q and W_v of language models). On convolutional networks, which the paper does not treat, they are
the linear layers and 1x1 convolutions, or all ungrouped ones where these hold less than half of the weights.
`targets=all` takes every linear layer and ungrouped convolution. Layers that a forward pass does not call are left
out, since a correction there would never be used. Frozen batch norms keep their pretrained statistics.

It needs labels and gradients through the backbone, on any architecture.

When not to use it: with a few dozen images (frozen features do as well and take seconds); when the images are so
unlike the pretraining ones that most weights must change (`full`); when tasks are to share one backbone in memory,
since merged weights are a whole backbone per task (`vpt`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from foveal.backbones.quirks import PROJECTIONS
from foveal.blocks.tuning import SteadyClassifier, two_speeds, zero_linear
from foveal.core.errors import BackboneError
from foveal.core.method import Adapt, Classifier, Recipe, Spec, method
from foveal.core.options import option, options


def correctable(backbone: Any, targets: Literal["attention", "all"]) -> list[str]:
    """Names of the layers of a backbone that LoRA corrects; see the top of this file.

    Raises:
        BackboneError: there are none.
    """
    modules = dict(backbone.named_modules())
    dense = [name for name, module in modules.items() if isinstance(module, nn.Linear) or is_ungrouped(module)]
    if targets == "all":
        names = dense
    elif attention := backbone.attention_modules():
        names = [f"{name}.{part}" for name, _ in attention for part in PROJECTIONS]
        names = [name for name in names if isinstance(modules.get(name), nn.Linear | nn.Conv2d)]
    else:
        pointwise = [name for name in dense if getattr(modules[name], "kernel_size", (1, 1)) == (1, 1)]
        weight = {name: modules[name].weight.numel() for name in dense}
        names = pointwise if 2 * sum(weight[name] for name in pointwise) >= sum(weight.values()) else dense
    names = called(backbone, names)
    if not names:
        raise BackboneError(
            f"{backbone.arch} ({backbone.family}) has no {'layer' if targets == 'all' else 'attention or convolution'} "
            "that LoRA can correct: use targets=all, or --method full"
        )
    return names


def is_ungrouped(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1


def called(backbone: Any, names: list[str]) -> list[str]:
    """Those of the named modules that a forward pass calls, rather than reading their weights past them."""
    seen: set[str] = set()
    modules, size = dict(backbone.named_modules()), backbone.preprocessing.size
    hooks = [modules[name].register_forward_pre_hook(lambda *_, name=name: seen.add(name)) for name in names]
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, 3, size, size))
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in names if name in seen]


class LoraClassifier(SteadyClassifier):
    """A backbone wrapped by peft, and a head. The backbone is in eval mode, but for the dropout of the corrections."""

    def train(self, mode: bool = True) -> LoraClassifier:
        super().train(mode)
        for name, module in self.backbone.named_modules():
            if name.endswith(".lora_dropout"):
                module.train(mode)
        return self


@options
class Options:
    """What `lora` can be told."""

    rank: int = option(8, "rank r of a correction", ge=1, le=1024)
    alpha: float = option(16.0, "a correction counts alpha / rank times", gt=0, le=1024)
    targets: Literal["attention", "all"] = option(
        "attention", "self-attention projections (1x1 convolutions without them), or all linear layers and convolutions"
    )
    dropout: float = option(0.0, "share of a correction's inputs dropped in training", ge=0, lt=1)
    epochs: int = option(10, "passes over the training images", ge=1, le=10_000)
    lr: float = option(1e-3, "learning rate of the corrections", gt=0, le=1)
    head_lr_multiplier: float = option(2.0, "how many times faster the new last layer learns", gt=0, le=1000)
    batch_size: int = option(32, "images per step", ge=1, le=65536)
    weight_decay: float = option(0.01, "pull of corrections and head towards zero", ge=0, le=10)
    augment: Literal["none", "light", "strong"] = option("light", "random crops and mirror images")


@method(
    Spec(
        family="adapt",
        title="LoRA: low-rank adaptation",
        year=2021,
        arxiv="2106.09685",
        needs=frozenset({"labels", "gradients"}),
        tasks=("single-label", "multi-label"),
    ),
    Options,
)
class Lora(Adapt):
    def attach(self, backbone: Any, classes: int) -> Classifier:
        """
        Raises:
            BackboneError: the backbone has no layer to correct.
        """
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        chosen: Options = self.options
        backbone.requires_grad_(False)
        config = LoraConfig(
            r=chosen.rank,
            lora_alpha=chosen.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=chosen.dropout,
            target_modules=correctable(backbone, chosen.targets),
        )
        wrapped = LoraModel(backbone, {"default": config}, "default")
        return LoraClassifier(wrapped, zero_linear(backbone.width, classes))

    def parameter_groups(self, model: Classifier, recipe: Recipe) -> list[dict[str, Any]]:
        return two_speeds(model, recipe, self.options.head_lr_multiplier)

    def finish(self, model: Classifier) -> Classifier:
        """Fold the corrections into the weights: a plain classifier on the backbone that came."""
        wrapped: Any = model.backbone
        return Classifier(wrapped.merge_and_unload(), model.head)
