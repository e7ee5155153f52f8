"""Training a student beside its teacher: labelled images, and as many unlabelled ones in each step if there are any."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveal.backbones.adapter import normalise
from foveal.core.families.distill import Distill
from foveal.core.method import Recipe, classification_loss
from foveal.core.preprocessing import Preprocessing
from foveal.core.seeds import generator
from foveal.data.dataset import Dataset
from foveal.train.batches import augment
from foveal.train.classify import read_shared
from foveal.train.events import Listener, TrainResult, balanced_accuracy, silent
from foveal.train.feed import LabelledImages
from foveal.train.loop import train
from foveal.train.processes import accelerator_for


class TaughtImages(LabelledImages):
    """The same view of an image for student and teacher, each at its own size and normalisation.

    An epoch is one pass over the labelled images. With unlabelled ones, every batch holds as many of these, drawn pass
    after pass; numbers from `len(dataset)` on stand for them.
    """

    def __init__(
        self,
        dataset: Dataset,
        labels: np.ndarray,
        rows: np.ndarray,
        preprocessing: Preprocessing,
        class_weights: Tensor,
        recipe: Recipe,
        *,
        teacher: Preprocessing | None = None,
        unlabelled: Dataset | None = None,
    ) -> None:
        super().__init__(dataset, labels, rows, preprocessing, class_weights, recipe)
        self.teacher, self.unlabelled = teacher, unlabelled

    def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        labelled = index < len(self.dataset)
        if labelled or self.unlabelled is None:
            image, label = self.dataset.image(index), self.labels[index]
        else:
            image, label = self.unlabelled.image(index - len(self.dataset)), np.zeros_like(self.labels[0])
        drawn = rng.bit_generator.state
        found = {
            "images": augment(image, self.preprocessing, self.recipe.augment, rng),
            "labels": np.asarray(label),
            "labelled": np.asarray(labelled),
        }
        if self.teacher is not None and picture(self.teacher) != picture(self.preprocessing):
            rng.bit_generator.state = drawn
            found["teacher_images"] = augment(image, self.teacher, self.recipe.augment, rng)
        return found

    def batches(self, size: int, seed: int, epoch: int) -> list[np.ndarray]:
        labelled = super().batches(size, seed, epoch)
        if self.unlabelled is None:
            return labelled
        start = epoch * len(self.rows)
        found: list[np.ndarray] = []
        for batch in labelled:
            others = len(self.dataset) + endless(len(self.unlabelled), start, len(batch), seed)
            start += len(batch)
            both = np.concatenate([batch, others])
            found.append(generator(seed, "mixed", start).permutation(both))  # any share of it holds some of both
        return found

    def ready(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        ready = super().ready(batch)
        if self.teacher is not None:
            ready["teacher_images"] = normalise(batch.get("teacher_images", batch["images"]), self.teacher)
        return ready

    def fingerprint(self) -> str:
        others = [] if self.unlabelled is None else list(self.unlabelled.ids)
        teacher = None if self.teacher is None else self.teacher.to_dict()
        return hashlib.blake2b(repr((super().fingerprint(), others, teacher)).encode(), digest_size=16).hexdigest()


def picture(preprocessing: Preprocessing) -> tuple[int, str, float]:
    """What decides the pixels, before they are normalised."""
    return preprocessing.size, preprocessing.interpolation, preprocessing.crop


def endless(count: int, start: int, length: int, seed: int) -> np.ndarray:
    """Places start .. start + length - 1 of an endless row of shuffled passes over 0 .. count - 1."""
    passes = range(start // count, (start + length - 1) // count + 1)
    drawn = np.concatenate([generator(seed, "unlabelled", number).permutation(count) for number in passes])
    begin = start % count
    return drawn[begin : begin + length]


def train_student(
    method: Distill,
    pair: Any,
    feed: TaughtImages,
    rows_val: np.ndarray,
    seed: int,
    *,
    device: str = "auto",
    work: Path,
    budget_s: float | None = None,
    on_event: Listener = silent,
) -> TrainResult:
    """Train what `method.pair` made, from where `work` left off. See `foveal.train.loop.train`.

    Args:
        rows_val: rows of the feed's data set on which the student is measured after each epoch (may be empty).

    Returns:
        The student alone.
    """

    def validate(pair: Any) -> dict[str, float]:
        target = next(iter(pair.student.parameters())).device
        accelerator = accelerator_for(device)
        logits, _ = read_shared(pair.student, feed.dataset, rows_val, feed.preprocessing, target, accelerator)
        held = torch.from_numpy(feed.labels[rows_val])
        loss = classification_loss(logits, {"labels": held, "class_weights": feed.class_weights.cpu()})
        return {"val_loss": float(loss), "val_balanced_accuracy": balanced_accuracy(logits, held)}

    return train(
        method,
        pair,
        feed,
        seed,
        recipe=feed.recipe,
        device=device,
        work=work,
        budget_s=budget_s,
        validate=validate if len(rows_val) else None,
        on_event=on_event,
    )
