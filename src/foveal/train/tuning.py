"""Training images for a method that changes a model's structure: some to score it on, and steps that repair it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveal.backbones.adapter import normalise
from foveal.core.errors import DataError
from foveal.core.families.shrink import TaskData
from foveal.core.method import Classifier, Recipe, Spec, Trained, classification_loss, method
from foveal.core.preprocessing import Preprocessing
from foveal.core.seeds import derive, generator
from foveal.data.dataset import Dataset
from foveal.data.images import to_pixels
from foveal.train.batches import epoch_batches
from foveal.train.events import Event
from foveal.train.feed import LabelledImages
from foveal.train.loop import train


@method(Spec(family="shrink", title="Tuning on the task", year=2017, arxiv=None))
class Tuning(Trained):
    """What the loop trains between the steps of a method: the classification loss, nothing else."""

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": classification_loss(model(batch["images"]), batch)}


class Steps(LabelledImages):
    """As many batches as there are optimiser steps, in one epoch."""

    steps: int

    def batches(self, size: int, seed: int, epoch: int) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        while len(found) < self.steps:
            found += [self.rows[batch] for batch in epoch_batches(len(self), size, seed, epoch + len(found))]
        return found[: self.steps]


class TrainingImages(TaskData):
    """Some rows of a data set, and the loop.

    Args:
        labels: of all images of `dataset`: int64 [n], or uint8 [n, C] of 0 and 1.
        rows: of the training images.
        class_weights: [C], float32.
        work: folder of the checkpoints; the same calls in the same order go on after a kill.
        on_progress: called with (stage, done, total).

    Attributes:
        stage: what `progress` tells about.
        history: what the loop told after each call of `tune`.
    """

    batch = 32

    def __init__(
        self,
        dataset: Dataset,
        labels: np.ndarray,
        rows: np.ndarray,
        preprocessing: Preprocessing,
        class_weights: Tensor,
        seed: int,
        *,
        device: torch.device,
        work: Path,
        augment: str = "light",
        on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    ) -> None:
        self.dataset, self.labels, self.rows, self.preprocessing = dataset, labels, rows, preprocessing
        self.class_weights, self.seed, self.device, self.work = class_weights, seed, device, work
        self.augment: Any = augment
        self.on_progress, self.stage = on_progress, "shrinking"
        self.history: list[Event] = []

    def batches(self, images: int, size: int) -> Iterator[Mapping[str, Tensor]]:
        """
        Raises:
            DataError: there is no training image, or one cannot be decoded.
        """
        if len(self.rows) == 0:
            raise DataError("no training images: expected some to score the model on")
        chosen = generator(self.seed, "score").permutation(self.rows)[:images]
        for part in np.array_split(chosen, max(1, round(len(chosen) / size))):
            pixels = np.stack([to_pixels(self.dataset.image(int(row)), self.preprocessing) for row in part])
            yield {
                "images": normalise(torch.from_numpy(pixels).to(self.device), self.preprocessing),
                "labels": torch.from_numpy(self.labels[part]).to(self.device),
                "class_weights": self.class_weights.to(self.device),
            }

    def tune(self, model: Classifier, steps: int, lr: float) -> Classifier:
        call = len(self.history)
        recipe = Recipe(epochs=1, batch_size=min(self.batch, len(self.rows)), lr=lr, augment=self.augment)
        feed = Steps(self.dataset, self.labels, self.rows, self.preprocessing, self.class_weights, recipe)
        feed.steps = steps
        result = train(
            Tuning(),
            model,
            feed,
            derive(self.seed, "tune", call),
            recipe=recipe,
            device=self.device.type,
            work=self.work / f"tune-{call}",
            on_event=self.told,
        )
        self.history.append({**result.history[-1], "epoch": call + 1})
        return result.model.to(self.device).eval()

    def told(self, event: Event) -> None:
        if event["event"] == "step":
            self.on_progress(f"{self.stage}: tuning", event["step"], event["steps"])

    def progress(self, done: int, total: int) -> None:
        self.on_progress(self.stage, done, total)
