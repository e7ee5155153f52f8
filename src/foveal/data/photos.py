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


LANDMARKS = 10


def warped(count: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One photo, turned, scaled, sheared and shifted at random, with ten places on it that move along.

    Returns:
        Images uint8 [count, size, size, 3], and points float64 [count, 10, 2] in their pixels; the centre of the top
        left pixel is (0, 0). Image i depends on seed, size and i alone; a few points fall outside.
    """
    from foveal.data.geometry import Carry, moved

    photo = photos(("astronaut",))["astronaut"].crop((112, 0, 368, 256))
    places = np.round(generator(0, "landmarks").uniform(50, 205, (LANDMARKS, 2)))
    images, points = np.empty((count, size, size, 3), np.uint8), np.empty((count, LANDMARKS, 2))
    for index in range(count):
        rng = generator(seed, "warped", size, index)
        angle, scale = rng.uniform(-0.6, 0.6), size / 256 * rng.uniform(0.85, 1.25)
        c, s = scale * math.cos(angle), scale * math.sin(angle)
        linear = np.array([[c, -s], [s, c]]) @ np.array([[1, rng.uniform(-0.2, 0.2)], [0, rng.uniform(0.85, 1.15)]])
        matrix = np.eye(3)
        matrix[:2, :2] = linear
        matrix[:2, 2] = (size - 1) / 2 + rng.uniform(-0.08, 0.08, 2) * size - linear @ [127.5, 127.5]
        images[index] = np.asarray(Carry(matrix, (size, size))(photo))
        points[index] = moved(matrix, places)
    return images, points
