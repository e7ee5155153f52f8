"""A tiny world for the loop's tests: 24 noisy colour images in memory, a small convnet, a method that trains it all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from foveal.core.method import Adapt, Classifier, Recipe
from foveal.core.preprocessing import Preprocessing
from foveal.core.seeds import derive, seed_everything
from foveal.data.dataset import Dataset, Memory
from foveal.train.classify import train_classifier
from foveal.train.events import TrainResult

SMALL = Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 0.875)
ROWS, ROWS_VAL = np.arange(24), np.arange(24, 36)


def tiny_dataset(count: int = 36, multi: bool = False) -> Dataset:
    """Class 0 is red, class 1 is green, with noise."""
    rng = np.random.default_rng(5)
    labels = np.arange(count) % 2
    images: list[bytes] = []
    for label in labels:
        pixels = rng.integers(0, 120, (20, 24, 3))
        pixels[..., label] += 100
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        images.append(file.getvalue())
    if multi:
        labels = np.stack([labels, 1 - labels, np.arange(count) % 3 == 0], axis=1).astype(np.uint8)
    classes = tuple("abc"[: 3 if multi else 2])
    task = "multi-label" if multi else "single-label"
    return Dataset("tiny", [f"{i:03}.png" for i in range(count)], labels, classes, task, None, Memory(images))


class Body(nn.Sequential):
    """Images [B, 3, 16, 16] -> [B, 8], with batch statistics and dropout, so that both are tested."""

    width = 8

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, 2, groups=2), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2),
        )  # fmt: skip


class Plain(Adapt):
    """Everything learns."""

    name = "plain"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.given = recipe

    def attach(self, backbone: Any, classes: int) -> Classifier:
        return Classifier(backbone, nn.Linear(backbone.width, classes))

    def recipe(self) -> Recipe:
        return self.given


def run(work: Path, recipe: Recipe, seed: int = 0, **extra: Any) -> TrainResult:
    method: Adapt = extra.pop("method", None) or Plain(recipe)
    dataset: Dataset = extra.pop("dataset", None) or tiny_dataset()
    seed_everything(derive(seed, "init"))
    model = method.attach(extra.pop("body", Body)(), len(dataset.classes))
    weights = torch.ones(len(dataset.classes))
    rows, rows_val = extra.pop("rows", ROWS), extra.pop("rows_val", ROWS_VAL)
    return train_classifier(
        method, model, dataset, SMALL, dataset.labels, rows, rows_val, weights, seed,
        recipe=recipe, work=work, **{"device": "cpu", **extra},
    )  # fmt: skip


def state(result: TrainResult) -> dict[str, Tensor]:
    return result.model.state_dict()


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
