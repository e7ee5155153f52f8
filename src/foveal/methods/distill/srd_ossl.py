"""Semantic Representational Distillation (Yang et al., IJCV 2024, arXiv 2205.06701): the teacher's classifier judges.

Features need not match number by number; they must mean the same to the teacher's classifier (W_t, b_t). A connector
phi, thrown away in the end, takes the student's last map f_s to the teacher's width, g averages over places, and

    L = CE(z_s, y) + beta (w_f mean (g(phi(f_s)) - g(f_t))^2 + mean (W_t g(phi(f_s)) + b_t - z_t)^2)
        + alpha KD_T(z_s, z_t),

with the cross-entropy over labelled images and the rest over all. Only the teacher's answers are asked for, so images
without labels, of other classes too, join in. It needs a teacher with one linear classifier and gradients through
the student; the student's own classifier learns from labels alone.

Departures: phi = BN(conv 1x1) ends in a ReLU only when the teacher's features are never negative, for no ReLU can
follow features that are. Maps are averaged over whatever grid they have, where the authors' code pools 8 x 8; of a
ViT that reads its class token alone, that token is the map. AdamW is the default: the logits of a head on frozen
features can be large, and their squares sent SGD at the paper's rate to infinity (`optimizer=sgd,lr=0.05,
weight_decay=5e-4` are its settings, with a cosine and 30 epochs here, three steps and 240 there).
`beta=0,alpha=0.9` is plain distillation (Hinton et al. 2015).

When not to use it: without a teacher that is clearly better than the student would be alone (a student with good
pretrained weights often is as good: compare with `foveal fit --method full`); when latency is measured and the
student is not faster. Leave unlabelled images away that are all far from the classes: they share the batch statistics
and made small students worse, where images of the classes among them helped, and plain distillation as much (see the
card).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveal.backbones.pair import Pair, backbone_of, last_map, linear_head
from foveal.blocks.tuning import zero_linear
from foveal.core.errors import UsageError
from foveal.core.families.distill import CROSS_ENTROPY, Distill, Term
from foveal.core.method import Classifier, Spec, method
from foveal.core.options import option, options


def mean_square(ours: Float[Tensor, "B C"], theirs: Float[Tensor, "B C"]) -> Float[Tensor, ""]:
    """mean_{b,c} (ours - theirs)^2: of features the first part of L_srd, of logits the second."""
    return (ours.float() - theirs.float()).square().mean()


def softened(ours: Float[Tensor, "B K"], theirs: Float[Tensor, "B K"], temperature: float) -> Float[Tensor, ""]:
    """KD_T = T^2 KL(softmax(theirs / T) || softmax(ours / T)), mean over rows."""
    log_ours, log_theirs = (F.log_softmax(logits.float() / temperature, 1) for logits in (ours, theirs))
    return temperature**2 * F.kl_div(log_ours, log_theirs, reduction="batchmean", log_target=True)


class Connector(nn.Module):
    """phi: maps [B, C_s, h, w] -> [B, C_t, h, w]; C_s C_t + 2 C_t parameters."""

    def __init__(self, student: int, teacher: int, rectified: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(student, teacher, 1, bias=False)
        self.norm = nn.BatchNorm2d(teacher)
        self.act = nn.ReLU() if rectified else nn.Identity()
        nn.init.normal_(self.conv.weight, 0, math.sqrt(2 / teacher))

    def forward(self, maps: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        return self.act(self.norm(self.conv(maps)))


@torch.no_grad()
def never_negative(teacher: Classifier) -> bool:
    """Whether the teacher's features look rectified: none below zero for four images of noise."""
    size = backbone_of(teacher).preprocessing.size
    like = next(teacher.parameters())
    noise = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    return bool((teacher.features(noise.to(like)) >= 0).all())


@options
class Options:
    """What `srd-ossl` can be told."""

    beta: float = option(1.0, "weight of the representation terms", ge=0, le=1000)
    feature_weight: float = option(1.0, "w_f: weight of the features beside the logits", ge=0, le=1000)
    alpha: float = option(0.0, "weight of plain distillation of the student's own logits", ge=0, le=1000)
    temperature: float = option(4.0, "T of plain distillation", gt=0, le=100)
    epochs: int = option(30, "passes over the labelled images", ge=1, le=10_000)
    lr: float = option(1e-3, "learning rate", gt=0, le=10)
    batch_size: int = option(64, "labelled images per step; as many unlabelled ones join", ge=2, le=65536)
    weight_decay: float = option(0.01, "pull of matrices and filters towards zero", ge=0, le=10)
    optimizer: Literal["adamw", "sgd"] = option("adamw", "AdamW, or SGD with momentum 0.9")
    augment: Literal["none", "light", "strong"] = option("light", "random crops and mirror images")


@method(
    Spec(
        family="distill",
        title="Semantic Representational Distillation",
        year=2022,
        arxiv="2205.06701",
        needs=frozenset({"labels", "gradients", "teacher"}),
        tasks=("single-label", "multi-label"),
    ),
    Options,
)
class SrdOssl(Distill):
    def attach(self, backbone: Any, classes: int) -> Classifier:
        return Classifier(backbone.requires_grad_(True), zero_linear(backbone.width, classes))

    def pair(self, student: Classifier, teacher: Classifier | None) -> Pair:
        """
        Raises:
            UsageError: no teacher, or one in training mode; plain distillation between different classes.
            BackboneError: the teacher's classifier is not one linear layer, or the student's last map is out of reach.
        """
        chosen: Options = self.options
        if teacher is None:
            if chosen.alpha or chosen.beta:
                raise UsageError(f"{self.name} needs a teacher: foveal distill TEACHER DATA")
            return Pair(student, None)
        known, asked = linear_head(teacher).out_features, linear_head(student).out_features
        if chosen.alpha and known != asked:
            raise UsageError(
                f"alpha={chosen.alpha} compares logits class by class, but the teacher has {known} classes and the "
                f"data {asked}: use alpha=0, or a teacher of the same classes"
            )
        if not chosen.beta:
            return Pair(student, teacher)
        connector = Connector(last_map(student)[1], linear_head(teacher).in_features, never_negative(teacher))
        return Pair(student, teacher, connector)

    def terms(self) -> list[Term]:
        chosen: Options = self.options
        return [
            CROSS_ENTROPY,
            Term("features", lambda view: mean_square(view["features"], view["teacher_features"]),
                 chosen.beta * chosen.feature_weight),
            Term("representation", lambda view: mean_square(view["logits"], view["teacher_logits"]),
                 chosen.beta, head="teacher"),
            Term("softened", lambda view: softened(view["logits"], view["teacher_logits"], chosen.temperature),
                 chosen.alpha),
        ]  # fmt: skip

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        Raises:
            UsageError: plain distillation of several labels per image.
        """
        if self.options.alpha and batch["labels"].ndim == 2:
            raise UsageError(
                f"alpha={self.options.alpha} softens classes of which one holds: several labels need alpha=0"
            )
        return super().loss(model, batch)

    def alone(self) -> Distill:
        return type(self)(replace(self.options, alpha=0.0, beta=0.0))
