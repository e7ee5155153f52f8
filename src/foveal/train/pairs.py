"""Image-text pairs for the loop: a random crop of each image, and one of its texts."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveal.backbones.adapter import normalise
from foveal.backbones.text import TextTower
from foveal.core.preprocessing import Preprocessing
from foveal.data.images import to_pixels
from foveal.data.pairs import Pairs
from foveal.train.batches import RESAMPLE, random_box
from foveal.train.feed import Feed


class PairFeed(Feed):
    """Training images of `Pairs`.

    Args:
        pairs: what to learn from.
        preprocessing: of the image tower.
        text: gives the token ids of every text, once.
        crop: which share of an image's area a view shows, from and to; (1, 1): what prediction sees.

    Raises:
        DataError: a text too long for the language tower; it is named.
    """

    def __init__(
        self, pairs: Pairs, preprocessing: Preprocessing, text: TextTower, crop: tuple[float, float] = (1.0, 1.0)
    ) -> None:
        self.pairs, self.preprocessing, self.crop = pairs, preprocessing, crop
        self.tokenizer = hashlib.sha256(text.tokenizer.encode()).hexdigest()
        counts = [len(own) for own in pairs.texts]
        self.first = np.concatenate([[0], np.cumsum(counts)])
        ids, mask = text.tokens([one for own in pairs.texts for one in own])
        self.ids, self.mask = ids.numpy(), mask.numpy()

    def __len__(self) -> int:
        return len(self.pairs)

    def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        text = int(rng.integers(self.first[index], self.first[index + 1]))
        image, p = self.pairs.images.image(index), self.preprocessing
        if self.crop[0] >= 1:
            pixels = to_pixels(image, p)
        else:
            box = random_box(image.width, image.height, self.crop, rng)
            pixels = np.asarray(image.resize((p.size, p.size), resample(p), box=box), np.uint8)
        return {"images": pixels, "ids": self.ids[text], "mask": self.mask[text]}

    def ready(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        longest = int(batch["mask"].sum(1).max())
        return {
            "images": normalise(batch["images"], self.preprocessing),
            "ids": batch["ids"][:, :longest],
            "mask": batch["mask"][:, :longest].to(torch.bool),
        }

    def fingerprint(self) -> str:
        told = (list(self.pairs.images.ids), self.pairs.texts, self.crop, self.preprocessing.to_dict(), self.tokenizer)
        return hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest()


def resample(p: Preprocessing) -> Image.Resampling:
    return RESAMPLE[p.interpolation]
