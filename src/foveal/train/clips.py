"""Labelled clips for the loop: which frames is drawn first, then they are decoded and cut alike."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from PIL import Image
from torch import Tensor

from foveal.backbones.adapter import normalise
from foveal.core.families.video import Video
from foveal.core.options import options_to_dict
from foveal.core.preprocessing import Preprocessing
from foveal.data.clips import Clips, fold, unfold
from foveal.data.images import to_pixels
from foveal.train.batches import AREA, RESAMPLE, random_box
from foveal.train.feed import Feed


class LabelledClips(Feed):
    """Clips and their labels: clips [b, T, 3, S, S], labels [b], class_weights [C].

    Frames are drawn by the method's `sample`. With the option augment=light a crop of 60 to 100% of the area is cut
    from all frames of a clip alike; none are mirrored, which would turn left into right.
    """

    def __init__(
        self, clips: Clips, rows: np.ndarray, method: Video, preprocessing: Preprocessing, class_weights: Tensor
    ) -> None:
        self.clips, self.rows, self.method = clips, rows, method
        self.preprocessing, self.class_weights = preprocessing, class_weights
        self.augment = method.recipe().augment

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        row = int(self.rows[index])
        numbers = self.method.sample(int(self.clips.counts[row]), rng)
        images = self.clips.clips[row].read(numbers.tolist())
        return {"clips": self.cut(images, rng), "labels": np.asarray(self.clips.labels[row])}

    def cut(self, images: list[Image.Image], rng: np.random.Generator) -> np.ndarray:
        """uint8 [T, S, S, 3]."""
        p = self.preprocessing
        if self.augment == "none":
            return np.stack([to_pixels(image, p) for image in images])
        first = images[0]
        box = np.array(random_box(first.width, first.height, AREA[self.augment], rng)) / np.tile(first.size, 2)
        views = [image.resize((p.size, p.size), RESAMPLE[p.interpolation], tuple(box * np.tile(image.size, 2)))
                 for image in images]  # fmt: skip
        return np.stack([np.asarray(view) for view in views])

    def ready(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels = batch["clips"]
        clips = unfold(normalise(fold(pixels), self.preprocessing), pixels.shape[1])
        return {**batch, "clips": clips, "class_weights": self.class_weights.to(clips.device)}

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        rows = [(self.clips.digests[row], int(self.clips.labels[row])) for row in self.rows.tolist()]
        asked = [options_to_dict(self.method.options), self.preprocessing.to_dict(), self.class_weights.tolist()]
        digest.update(json.dumps([rows, asked]).encode())
        return digest.hexdigest()
