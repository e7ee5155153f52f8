"""Photos of things that an ImageNet network knows, and photos pasted on grounds it does not, with the place known."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from foveal.core.seeds import generator
from foveal.data.dataset import read_file
from foveal.data.images import decode
from foveal.data.open import open_dataset
from foveal.data.samples import folder_of

PHOTOS = {
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "rocket": "rocket.jpg",
    "astronaut": "astronaut.png",
    "motorcycle": "motorcycle_left.png",
}


def photos(names: Sequence[str] = tuple(PHOTOS)) -> dict[str, Image.Image]:
    """Photos that scikit-image ships, by name.

    Raises:
        MissingExtra: scikit-image is not installed.
    """
    folder = os.path.join(folder_of("skimage", "scikit-image", "photos"), "data")
    return {name: decode(read_file(os.path.join(folder, PHOTOS[name]))) for name in names}


def pasted(count: int, size: int, seed: int, area: float = 0.12) -> tuple[np.ndarray, np.ndarray]:
    """Squares of photos on woven fabric and on solar cells, one each.

    Returns:
        Images uint8 [count, size, size, 3], and where the square is, bool [count, size, size]. The square covers
        `area` of the image, its place and what it shows of which photo are drawn by `seed`.
    """
    shown = list(photos().values())
    grounds = [open_dataset("sample:textile"), open_dataset("sample:elpv")]
    side = round(math.sqrt(area) * size)
    images, truth = np.empty((count, size, size, 3), np.uint8), np.zeros((count, size, size), bool)
    for index in range(count):
        rng = generator(seed, "pasted", index)
        ground = grounds[index % len(grounds)]
        image = ground.image(int(rng.integers(len(ground)))).resize((size, size), Image.Resampling.BICUBIC)
        photo = shown[int(rng.integers(len(shown)))]
        cut = int(min(photo.size) * rng.uniform(0.6, 1.0))
        x, y = (int(rng.integers(length - cut + 1)) for length in photo.size)
        square = photo.crop((x, y, x + cut, y + cut)).resize((side, side), Image.Resampling.BICUBIC)
        left, top = (int(value) for value in rng.integers(size - side + 1, size=2))
        image.paste(square, (left, top))
        images[index] = np.asarray(image)
        truth[index, top : top + side, left : left + side] = True
    return images, truth
