"""Ordinary damage to images, which needs no attacker: bad light, noise, blur, small files, small pictures.

Five kinds at three strengths, on the square a model sees, uint8 [S, S, 3]. Strengths are set so that a person still
recognises the picture at each of them.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

STRENGTHS = (1, 2, 3)

Corrupt = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def darker(pixels: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """Light falls to 0.7, 0.5 and 0.3."""
    return np.rint(pixels * (0.7, 0.5, 0.3)[strength - 1]).astype(np.uint8)


def noisy(pixels: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise, of a deviation of 4%, 8% and 16% of the range."""
    noise = rng.normal(0, 255 * (0.04, 0.08, 0.16)[strength - 1], pixels.shape)
    return np.rint(pixels + noise).clip(0, 255).astype(np.uint8)


def blurred(pixels: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur, of a radius of 0.5%, 1% and 2% of the side."""
    radius = (0.005, 0.01, 0.02)[strength - 1] * len(pixels)
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def compressed(pixels: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """JPEG of quality 40, 20 and 10."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=(40, 20, 10)[strength - 1])
    with Image.open(buffer) as image:
        return np.asarray(image.convert("RGB"))


def small(pixels: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """Shrunk to 60%, 40% and 25% of the side, and enlarged again."""
    side = max(2, round((0.6, 0.4, 0.25)[strength - 1] * len(pixels)))
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX)
    return np.asarray(image.resize((len(pixels), len(pixels)), Image.Resampling.BILINEAR))


CORRUPTIONS: dict[str, Corrupt] = {
    "darker": darker,
    "noisy": noisy,
    "blurred": blurred,
    "compressed": compressed,
    "small": small,
}
