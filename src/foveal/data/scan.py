"""A few numbers per image, taken in passing while it is decoded: size, brightness, contrast, a perceptual hash."""

from __future__ import annotations

import numpy as np
from PIL import Image

BITS = 256
SCAN = np.dtype(
    [("ok", "u1"), ("width", "u4"), ("height", "u4"), ("mean", "f4"), ("std", "f4"), ("phash", "u8", (BITS // 64,))]
)
"""ok is 1 for a decoded image; mean and std of grey are in 0..255; phash is `perceptual_hash`."""

SIDE = 32
frequency, position = np.arange(SIDE)[:, None], np.arange(SIDE)[None, :]
COSINES = np.cos(np.pi * frequency * (2 * position + 1) / (2 * SIDE)).astype(np.float32)
# The BITS lowest frequencies but the mean, diagonal by diagonal.
LOWEST = sorted(
    ((u, v) for u in range(SIDE) for v in range(SIDE) if u + v > 0), key=lambda uv: (sum(uv), max(uv), uv[0])
)[:BITS]
ROWS, COLUMNS = (np.array(axis) for axis in zip(*LOWEST, strict=True))
ROUNDING = 0.5
GREY = np.arange(256, dtype=np.float64)


def scan(image: Image.Image) -> np.void:
    """The SCAN record of a decoded image. Mean and standard deviation are of every pixel, exactly."""
    grey = image if image.mode == "L" else image.convert("L")
    histogram = np.array(grey.histogram(), dtype=np.float64)
    count = histogram.sum()
    mean = histogram @ GREY / count
    std = np.sqrt(histogram @ (GREY - mean) ** 2 / count)
    record = np.zeros(1, SCAN)
    record[0] = (1, image.width, image.height, mean, std, perceptual_hash(grey))
    return record[0]


def perceptual_hash(grey: Image.Image) -> np.ndarray:
    """uint64 [4]: which of the 256 lowest frequencies of the picture's cosine transform lie above their median.

    Scaling and re-encoding leave low frequencies alone, and brightness and contrast leave their order alone, so copies
    differ in a few bits (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", with 256
    bits for its 64: among photos that all look alike, such as cells of one solar module, 64 cannot tell a second photo
    of the same cell from another cell, 256 can). A picture of one colour has the hash 0.
    """
    small = grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    low = (COSINES @ np.asarray(small, dtype=np.float32) @ COSINES.T)[ROWS, COLUMNS]
    low[np.abs(low) < ROUNDING] = 0
    return np.packbits(low > np.median(low)).view(np.uint64)
