"""Images without labels for the loop, with a look at all of them every few epochs: what embeddings learn from."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveal.backbones.adapter import normalise
from foveal.core.families.retrieve import Retrieve
from foveal.core.method import Recipe
from foveal.core.preprocessing import Preprocessing
from foveal.core.threads import cpu_threads
from foveal.data.dataset import Dataset
from foveal.data.images import to_pixels
from foveal.train.batches import ahead, augment
from foveal.train.feed import Feed

AT_ONCE = 64


class PoolImages(Feed):
    """Images [b, 3, S, S], normalised, and their numbers `index` [b]. Labels are not read.

    Args:
        model: what the method attached and the loop trains; its buffers hold what was seen of the pool.
    """

    def __init__(
        self, dataset: Dataset, model: Any, method: Retrieve, preprocessing: Preprocessing, recipe: Recipe
    ) -> None:
        self.dataset, self.model, self.method = dataset, model, method
        self.preprocessing, self.recipe = preprocessing, recipe

    def __len__(self) -> int:
        return len(self.dataset)

    def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        pixels = augment(self.dataset.image(index), self.preprocessing, self.recipe.augment, rng)
        return {"images": pixels, "index": np.asarray(index)}

    def batches(self, size: int, seed: int, epoch: int) -> list[np.ndarray]:
        due = epoch - epoch % self.method.every()
        if int(self.model.looked) < due:
            self.method.look(self.model, self.vectors(), seed)
            self.model.looked.fill_(due)
        return self.method.batches(self.model, size, seed, epoch)

    def ready(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**batch, "images": normalise(batch["images"], self.preprocessing)}

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr(list(self.dataset.ids)).encode("utf-8", "backslashreplace"))
        digest.update(repr(self.preprocessing).encode())
        return digest.hexdigest()

    def vectors(self) -> Tensor:
        """`model.embed` of every image as prediction sees it, [n, D] float32 on the CPU."""
        device = next(self.model.parameters()).device
        training, found, waiting = self.model.training, [], []

        def embed() -> None:
            pixels = torch.from_numpy(np.stack(waiting)).to(device)
            found.append(self.model.embed(normalise(pixels, self.preprocessing)).float().cpu())
            waiting.clear()

        self.model.eval()
        try:
            with torch.no_grad(), ThreadPoolExecutor(cpu_threads()) as pool:
                read = lambda row: to_pixels(self.dataset.image(row), self.preprocessing)  # noqa: E731
                for pixels in ahead(read, range(len(self)), pool, 2 * AT_ONCE):
                    waiting.append(pixels)
                    if len(waiting) == AT_ONCE:
                        embed()
                if waiting:
                    embed()
        finally:
            self.model.train(training)
        return torch.cat(found)
