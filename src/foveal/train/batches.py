"""Batches for the loop: order from seed and epoch, augmentation from seed, epoch and image. Nothing to save."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image, ImageEnhance

from foveal.core.preprocessing import Preprocessing
from foveal.core.seeds import generator
from foveal.data.images import to_pixels

Augment = Literal["none", "light", "strong"]
RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
AREA = {"light": (0.6, 1.0), "strong": (0.25, 1.0)}
T = TypeVar("T")


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Shuffled positions 0..count-1 in the fewest batches of at most `batch_size`, all of nearly one size.

    No batch is a small rest, which batch normalisation could not take.
    """
    order = generator(seed, "order", epoch).permutation(count)
    return np.array_split(order, max(1, math.ceil(count / batch_size)))


def augment(image: Image.Image, p: Preprocessing, kind: Augment, rng: np.random.Generator) -> np.ndarray:
    """Image -> random view, uint8 [size, size, 3].

    light: a crop of 60 to 100% of the area, ratio 3/4 to 4/3, resized, and a mirror image half of the time.
    strong: 25 to 100%, and brightness, contrast and colour times 0.6 to 1.4, and up to a fifth of the area grey.
    none: what prediction sees.
    """
    if kind == "none":
        return to_pixels(image, p)
    box = random_box(image.width, image.height, AREA[kind], rng)
    view = image.resize((p.size, p.size), RESAMPLE[p.interpolation], box=box)
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if kind == "strong":
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            view = enhance(view).enhance(rng.uniform(0.6, 1.4))
    pixels = np.array(view, dtype=np.uint8)
    if kind == "strong" and rng.random() < 0.5:
        left, top, right, bottom = (round(edge) for edge in random_box(p.size, p.size, (0.02, 0.2), rng))
        pixels[top:bottom, left:right] = np.round(255 * np.asarray(p.mean)).astype(np.uint8)
    return pixels


def random_box(
    width: int, height: int, area: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """A box (left, top, right, bottom) of a random share of the area and a ratio from 3/4 to 4/3, inside the image."""
    for _ in range(10):
        share, ratio = rng.uniform(*area), math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
        w, h = math.sqrt(width * height * share * ratio), math.sqrt(width * height * share / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def ahead(work: Callable[[Any], T], items: Iterable[Any], pool: ThreadPoolExecutor, depth: int) -> Iterator[T]:
    """work(item) for each item in order, with at most `depth` of them started before they are asked for."""
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def stacked(arrays: Iterator[np.ndarray], sizes: Iterable[int]) -> Iterator[np.ndarray]:
    """Consecutive groups of the given sizes, each stacked along a new first axis."""
    for size in sizes:
        yield np.stack([next(arrays) for _ in range(size)])
