"""A classifier made of words: labels in, answers for images out, without a training image."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from foveal.backbones.adapter import DEFAULT, Backbone, load_backbone
from foveal.backbones.class_rows import rows_for
from foveal.backbones.text import TEMPLATES, filled_in
from foveal.backbones.towers import Towers
from foveal.core.errors import DataError, UsageError
from foveal.core.method import Classifier
from foveal.data.open import open_images
from foveal.evaluate.calibration import Calibrated
from foveal.evaluate.ood import Energy
from foveal.features.extract import extract
from foveal.features.towers import encode_texts
from foveal.ship.answer import answer, unreadable
from foveal.ship.export import export_onnx

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

Progressed = Callable[[int, int], None]


@dataclass(frozen=True)
class ZeroShot:
    """An image network and one row of weights for each label. `predict` answers for images.

    Attributes:
        classifier: normalised images [B, 3, H, W] -> logits [B, C]; its backbone's features are cached.
        labels: in words, in the order of the logits.
    """

    classifier: Classifier
    labels: tuple[str, ...]

    def predict(
        self,
        images: str | Path | Image.Image | np.ndarray | Iterable[str | Path | Image.Image | np.ndarray],
        *,
        device: str = "auto",
        progress: Progressed | None = None,
    ) -> list[dict[str, Any]]:
        """Answer for images: files, folders, PIL images or uint8 arrays [H, W, 3].

        Returns:
            One row per image: image, label, probability (among these labels, not calibrated), unknown (None: without
            training images nobody can say what is strange), top (up to five [label, probability]). An image that
            cannot be decoded has label None and says why under `error`.

        Raises:
            DataError: no image, or none that can be decoded.
        """
        single = isinstance(images, str | Path) or hasattr(images, "getbands") or hasattr(images, "dtype")
        dataset = open_images([images] if single else list(images))  # type: ignore[list-item]
        found = extract(dataset, cast(Backbone, self.classifier.backbone), device=device, progress=progress)
        if len(found.errors) == len(dataset):
            raise DataError(f"none of the {len(dataset)} images can be decoded ({dataset.ids[0]}: {found.errors[0]})")
        with torch.inference_mode():
            probabilities = self.classifier.head(torch.from_numpy(found.X[:])).softmax(1).numpy()
        return [
            unreadable(dataset.ids[row], found.errors[row])
            if row in found.errors
            else {
                **answer(
                    dataset.ids[row], probabilities[row], 0.0, classes=self.labels, task="single-label", threshold=0.0
                ),
                "unknown": None,
            }
            for row in range(len(dataset))
        ]

    def export(self, path: str | Path, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Write one ONNX file of the image network and these labels; see `foveal.ship.export.export_onnx`.

        The words are in its weights: it takes uint8 photos and needs no language tower. It calls nothing unknown.

        Args:
            images: upright RGB photos to compare with torch on.

        Raises:
            UsageError: no images.
            FovealError: the network cannot be expressed in ONNX, or answers otherwise there.
        """
        model = Calibrated(self.classifier, 1.0, Energy(), "single-label")
        preprocessing = cast(Backbone, self.classifier.backbone).preprocessing
        never = sys.float_info.max
        return export_onnx(model, preprocessing, path, images=images, classes=self.labels, threshold=never)


def parse_labels(labels: str | Sequence[str]) -> tuple[str, ...]:
    """Labels from 'a cat,a dog', or as they are.

    Raises:
        UsageError: fewer than two, an empty one, or one twice.
    """
    found = [label.strip() for label in (labels.split(",") if isinstance(labels, str) else labels)]
    twice = next((label for label in found if found.count(label) > 1), None)
    if "" in found or twice is not None or len(found) < 2:
        only = f"there is only '{found[0]}'" if found else "there is none"
        wrong = "one is empty" if "" in found else f"'{twice}' comes twice" if twice else only
        raise UsageError(f"labels: {wrong}: expected two or more different ones, such as 'a cat,a dog'")
    return tuple(found)


def of_towers(towers: Towers, labels: str | Sequence[str], templates: Sequence[str] = TEMPLATES) -> ZeroShot:
    """A classifier whose classes are words: each label's prompts are averaged and made unit again.

    Raises:
        UsageError: see `parse_labels`.
        DataError: no template, or one without {}.
    """
    names = parse_labels(labels)
    texts = encode_texts(towers, filled_in(names, templates), device="cpu").unflatten(0, (len(names), len(templates)))
    return ZeroShot(towers.cpu().classifier(F.normalize(texts.mean(1))), names)


def zero_shot(
    labels: str | Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    *,
    backbone: str = DEFAULT,
    offline: bool = True,
    progress: Progressed | None = None,
) -> ZeroShot:
    """An ImageNet network whose classifier rows are what the labels' words make them; see `backbones.class_rows`.

    Raises:
        UsageError: see `parse_labels`.
        DataError: no template, or one without {}.
        MissingExtra: the sentence encoder is not installed.
    """
    names = parse_labels(labels)
    rows = rows_for(names, templates=templates, backbone=backbone, offline=offline, progress=progress)
    head = nn.Linear(rows.shape[1], len(names), bias=False).requires_grad_(False)
    head.weight.copy_(rows)
    return ZeroShot(Classifier(load_backbone(backbone, offline=offline), head).eval(), names)
