"""A few numbers per image, taken in passing while it is decoded: size, brightness, contrast, a perceptual hash."""

from __future__ import annotations

import numpy as np
from PIL import Image

SCAN = np.dtype(
    [("ok", "u1"), ("width", "u4"), ("height", "u4"), ("mean", "f4"), ("std", "f4"), ("phash", "u8")],
)
"""ok is 1 for a decoded image; mean and std of grey are in 0..255; phash is `perceptual_hash`."""

SIDE, LOW = 32, 8
_frequency, _position = np.arange(LOW + 1)[:, None], np.arange(SIDE)[None, :]
DCT = np.cos(np.pi * _frequency * (2 * _position + 1) / (2 * SIDE)).astype(np.float32)
# The 64 lowest frequencies but the mean, by diagonals: of the 9 x 9 corner, those with u + v from 1 to 10, first 64.
LOWEST = sorted(
    ((u, v) for u in range(LOW + 1) for v in range(LOW + 1) if u + v > 0), key=lambda uv: (sum(uv), max(uv), uv[0])
)[:64]
ROWS, COLUMNS = (np.array(axis) for axis in zip(*LOWEST, strict=True))
BITS = np.uint64(1) << np.arange(64, dtype=np.uint64)
GREY = np.arange(256, dtype=np.float64)


def scan(image: Image.Image) -> np.void:
    """The SCAN record of a decoded image. Mean and standard deviation are of every pixel, exactly."""
    grey = image if image.mode == "L" else image.convert("L")
    histogram = np.array(grey.histogram(), dtype=np.float64)
    count = histogram.sum()
    mean = histogram @ GREY / count
    std = np.sqrt(max(histogram @ (GREY - mean) ** 2 / count, 0.0))
    record = np.zeros((), SCAN)
    record[()] = (1, image.width, image.height, mean, std, perceptual_hash(grey))
    return record[()]


def perceptual_hash(grey: Image.Image) -> np.uint64:
    """64 bits: the sign, against their median, of the 64 lowest frequencies of the picture's cosine transform.

    Scaling and re-encoding leave low frequencies alone and brightness or contrast leave the bits alone, so copies
    differ in a few bits (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", DCT hash).
    Gradient hashes (dHash) are cheaper but see single pixels of the reduced picture, which is noise in smooth photos.
    """
    small = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0), dtype=np.float32)
    low = (DCT @ small @ DCT.T)[ROWS, COLUMNS]
    return np.bitwise_or.reduce(BITS[low > np.median(low)], initial=np.uint64(0))
