"""What the loop draws from: examples, the order they come in, and what a batch of them becomes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from foveal.backbones.adapter import normalise
from foveal.core.method import Recipe
from foveal.core.preprocessing import Preprocessing
from foveal.data.dataset import Dataset
from foveal.train.batches import augment, epoch_batches


class Feed(ABC):
    """Examples by number. Subclasses say how many, and read one; the rest has defaults."""

    @abstractmethod
    def __len__(self) -> int:
        """How many examples one epoch draws from."""

    @abstractmethod
    def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One example, decoded and augmented. Called from several threads; whatever is random comes from `rng`,
        which follows from seed, epoch and index."""

    def batches(self, size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """The indices of each batch of an epoch, of about `size`; as many batches in every epoch.

        Default: 0..n-1, shuffled. An index that comes twice in an epoch gives the same example twice.
        """
        return epoch_batches(len(self), size, seed, epoch)

    def ready(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stacked examples [b, ...], on the device -> what the method's loss reads: normalised, constants added."""
        return batch

    @abstractmethod
    def fingerprint(self) -> str:
        """Of everything that decides the examples; a checkpoint goes on only with an equal one."""


class LabelledImages(Feed):
    """Images and their labels, augmented as the recipe says: images [b, 3, S, S], labels, class_weights [C].

    Indices are rows of the data set.
    """

    def __init__(
        self,
        dataset: Dataset,
        labels: np.ndarray,
        rows: np.ndarray,
        preprocessing: Preprocessing,
        class_weights: Tensor,
        recipe: Recipe,
    ) -> None:
        self.dataset, self.labels, self.rows = dataset, labels, rows
        self.preprocessing, self.class_weights, self.recipe = preprocessing, class_weights, recipe

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        pixels = augment(self.dataset.image(index), self.preprocessing, self.recipe.augment, rng)
        return {"images": pixels, "labels": np.asarray(self.labels[index])}

    def batches(self, size: int, seed: int, epoch: int) -> list[np.ndarray]:
        return [self.rows[batch] for batch in super().batches(size, seed, epoch)]

    def ready(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images = normalise(batch["images"], self.preprocessing)
        return {**batch, "images": images, "class_weights": self.class_weights.to(images.device)}

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr([self.dataset.ids[int(row)] for row in self.rows]).encode())
        digest.update(np.ascontiguousarray(self.labels[self.rows]).tobytes())
        digest.update(self.class_weights.cpu().numpy().tobytes())
        return digest.hexdigest()


def stacked(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Examples -> one tensor [b, ...] for each of their names."""
    return {name: torch.from_numpy(np.stack([each[name] for each in examples])) for name in examples[0]}
