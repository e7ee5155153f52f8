"""The feed of pretraining: images without labels, each in one or more random views."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance
from torch import Tensor

from foveal.backbones.adapter import normalise
from foveal.core.families.pretrain import Views
from foveal.core.preprocessing import Preprocessing
from foveal.data.dataset import Dataset
from foveal.train.batches import RESAMPLE, random_box
from foveal.train.feed import Feed


@dataclass(frozen=True)
class ViewFeed(Feed):
    """Every image of a dataset. Batches hold `views` [B, V, 3, S, S], normalised.

    Attributes:
        identity: what tells these images from others, such as a hash of their files.
    """

    dataset: Dataset
    preprocessing: Preprocessing
    views: Views
    identity: str

    def __len__(self) -> int:
        return len(self.dataset)

    def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = self.dataset.image(index)
        return {"views": np.stack([view(image, self.preprocessing, self.views, rng) for _ in range(self.views.count)])}

    def ready(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels = batch["views"]
        views = normalise(pixels.flatten(0, 1), self.preprocessing)
        return {"views": views.unflatten(0, pixels.shape[:2])}

    def fingerprint(self) -> str:
        return repr((self.identity, self.preprocessing, self.views))


def view(image: Image.Image, p: Preprocessing, views: Views, rng: np.random.Generator) -> np.ndarray:
    """One random view, uint8 [size, size, 3]."""
    box = random_box(image.width, image.height, views.area, rng)
    seen = image.resize((p.size, p.size), RESAMPLE[p.interpolation], box=box)
    if views.mirror and rng.random() < 0.5:
        seen = seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if views.colour:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            seen = enhance(seen).enhance(rng.uniform(1 - views.colour, 1 + views.colour))
    return np.array(seen, dtype=np.uint8)
