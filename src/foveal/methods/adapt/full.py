"""Full fine-tuning: every weight of the backbone learns, batch statistics included. The baseline of all adapters.

A fresh linear layer is put on the backbone and both minimise the class-weighted cross-entropy,

    min_theta,W,b  mean_i w_i loss(W f_theta(x_i) + b, y_i),

by AdamW with a short linear warm-up and a cosine. Two rates are used: the pretrained weights move at `lr`, the
fresh layer at `head_lr_multiplier` times that, because it starts from nothing and they do not. The layer starts at
zero, so that the first steps send no random gradient into the backbone. Weight decay pulls on matrices and filters
only, never on biases and norms. There is no paper of its own; the recipe is common practice for transfer from
ImageNet (Kornblith, Shlens and Le 2019, arXiv 1805.08974, compare it with frozen features).

It needs labels and gradients through the backbone, on any architecture, with one or several labels per image.

When not to use it: with fewer than a few hundred images (frozen features with `linear` or `gda-clip` are as good
and take seconds); when many tasks share one backbone in memory (each task stores all weights: prefer `lora` or
`vpt`); when the backbone must keep what else it knows.
"""

from __future__ import annotations

from typing import Any, Literal

from foveal.blocks.tuning import two_speeds, zero_linear
from foveal.core.method import Adapt, Classifier, Recipe, Spec, method
from foveal.core.options import option, options


@options
class Options:
    """What `full` can be told."""

    epochs: int = option(8, "passes over the training images", ge=1, le=10_000)
    lr: float = option(5e-4, "learning rate of the backbone", gt=0, le=1)
    head_lr_multiplier: float = option(5.0, "how many times faster the new last layer learns", gt=0, le=1000)
    batch_size: int = option(32, "images per step", ge=2, le=65536)
    weight_decay: float = option(0.05, "pull of matrices and filters towards zero", ge=0, le=10)
    augment: Literal["none", "light", "strong"] = option("light", "random crops and mirror images")
    label_smoothing: float = option(0.0, "share of each label that is spread over all classes", ge=0, lt=1)


@method(
    Spec(
        family="adapt",
        title="Full fine-tuning",
        year=2019,
        arxiv=None,
        needs=frozenset({"labels", "gradients"}),
        tasks=("single-label", "multi-label"),
    ),
    Options,
)
class Full(Adapt):
    def attach(self, backbone: Any, classes: int) -> Classifier:
        return Classifier(backbone.requires_grad_(True), zero_linear(backbone.width, classes))

    def parameter_groups(self, model: Classifier, recipe: Recipe) -> list[dict[str, Any]]:
        return two_speeds(model, recipe, self.options.head_lr_multiplier)
