"""A world with exact captions: two handwritten digits side by side, and the words for them in that order."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from foveal.core.seeds import generator
from foveal.data.dataset import Dataset, Memory
from foveal.data.open import open_dataset
from foveal.data.pairs import Pairs

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 32


def digit_pairs(train: int, val: int, test: int, seed: int) -> Pairs:
    """Canvases of 32 x 32 pixels, grey on a shade of grey, and 'three then seven'.

    Those of train, val and test are different handwriting: no digit of one split is in another.
    """
    digits = open_dataset("sample:digits")
    order = generator(seed, "digit pairs").permutation(len(digits))
    shares = np.array([train, val, test]) / (train + val + test)
    pools = np.split(order, (np.cumsum(shares)[:2] * len(order)).astype(int))
    images: list[bytes] = []
    texts: list[tuple[str, ...]] = []
    splits: list[str] = []
    for split, count, pool in zip(("train", "val", "test"), (train, val, test), pools, strict=True):
        for index in range(count):
            rng = generator(seed, "digit pair", split, index)
            left, right = rng.choice(pool, 2)
            canvas = Image.new("L", (SIDE, SIDE), int(rng.integers(0, 60)))
            for row, x in ((left, 0), (right, SIDE // 2)):
                digit = digits.image(int(row)).convert("L").resize((SIDE // 2, SIDE // 2))
                canvas.paste(digit, (x, SIDE // 4), digit)
            file = io.BytesIO()
            canvas.convert("RGB").save(file, "PNG", compress_level=1)
            images.append(file.getvalue())
            texts.append((f"{WORDS[digits.labels[left]]} then {WORDS[digits.labels[right]]}",))
            splits.append(split)
    ids = [f"{split}-{row:05d}.png" for row, split in enumerate(splits)]
    dataset = Dataset(
        "digit-pairs", ids, np.zeros(len(ids), np.int64), (), "single-label", np.array(splits), Memory(images)
    )
    return Pairs(dataset, tuple(texts))
