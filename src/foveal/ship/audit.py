"""What an attack sees of a Bundle, and what the Bundle answers to attacked images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.backbones.adapter import Backbone
from foveal.backbones.wrapper import Encoder, OpenModel, Scorer
from foveal.core.method import Classifier
from foveal.evaluate.attack import Ask
from foveal.features.scorer import feature_scorer
from foveal.features.session import pick_device

if TYPE_CHECKING:
    from foveal.ship.bundle import Bundle


def encoder_of(bundle: Bundle, device: str) -> Encoder:
    """A frozen copy of what the Bundle's head reads from: images [B, 3, S, S] in [0, 1] -> features [B, D]."""
    return Encoder(bundle.model.classifier, bundle.preprocessing).to(pick_device(device))


def ask_of(bundle: Bundle, device: str) -> Ask:
    """The Bundle's answers to images in [0, 1], by the fastest way: a feature session where its head reads plain
    features."""
    target = pick_device(device)
    model = bundle.model.to(target)
    classifier: Any = model.classifier

    def together(probabilities: Tensor, unknown: Tensor) -> Tensor:
        return torch.cat([probabilities, unknown[:, None]], 1)

    if type(classifier) is Classifier and isinstance(classifier.backbone, Backbone):
        scorer: Scorer = feature_scorer(
            classifier.backbone, lambda read: together(*model.judge(read, classifier.head(read))), device=device
        )
    else:
        scorer = OpenModel(model, bundle.preprocessing, answer=lambda images: together(*model(images)))

    def ask(images: Tensor) -> tuple[Tensor, Tensor]:
        found = scorer(images.to(target))
        probabilities, unknown = found[:, :-1], found[:, -1] > bundle.threshold
        return (probabilities.argmax(1) if bundle.task == "single-label" else probabilities >= 0.5), unknown

    return ask
