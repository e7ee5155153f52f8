"""Images without labels for the loop, in [0, 1]: what attacks learn from."""

from __future__ import annotations

import hashlib

import numpy as np
from torch import Tensor

from foveal.core.preprocessing import Preprocessing
from foveal.data.dataset import Dataset
from foveal.data.images import to_pixels
from foveal.train.feed import Feed


class UnitImages(Feed):
    """Some rows of a data set as a model sees them, before normalisation: images [b, 3, S, S] in [0, 1]."""

    def __init__(self, dataset: Dataset, rows: np.ndarray, preprocessing: Preprocessing) -> None:
        self.dataset, self.rows, self.preprocessing = dataset, rows, preprocessing

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"images": to_pixels(self.dataset.image(int(self.rows[index])), self.preprocessing)}

    def ready(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"images": batch["images"].permute(0, 3, 1, 2).float() / 255}

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr([self.dataset.ids[int(row)] for row in self.rows]).encode())
        digest.update(repr(self.preprocessing).encode())
        return digest.hexdigest()
