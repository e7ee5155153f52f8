"""Digits of seven strokes, each drawn by its own hand, and the same hand's drawing of any other digit: endless, and the
truth of an edit is known to the pixel."""

from __future__ import annotations

import numpy as np

from foveal.core.seeds import generator

STROKES = {
    "0": "abcdef",
    "1": "bc",
    "2": "abdeg",
    "3": "abcdg",
    "4": "bcfg",
    "5": "acdfg",
    "6": "acdefg",
    "7": "abc",
    "8": "abcdefg",
    "9": "abcdfg",
}
ENDS = {
    "a": ((0, 0), (1, 0)),
    "b": ((1, 0), (1, 1)),
    "c": ((1, 1), (1, 2)),
    "d": ((0, 2), (1, 2)),
    "e": ((0, 1), (0, 2)),
    "f": ((0, 0), (0, 1)),
    "g": ((0, 1), (1, 1)),
}
"""From the top clockwise, then the middle; corners in halves of the glyph's height."""


def glyph(digit: str, hand: int, seed: int, size: int = 16) -> np.ndarray:
    """A digit in grey, float32 [size, size] in 0..1; place, size, slant and ink follow from seed and hand alone."""
    rng = generator(seed, "glyph", hand)
    unit = size * rng.uniform(0.22, 0.3)
    left, top = (size - 1) / 2 - unit / 2, (size - 1) / 2 - unit
    left, top = left + rng.uniform(-1, 1) * size / 16, top + rng.uniform(-1, 1) * size / 16
    slant, width, ink = rng.uniform(-0.2, 0.2), size / 16 * rng.uniform(0.7, 1.0), rng.uniform(0.75, 1.0)
    y, x = np.mgrid[:size, :size].astype(float)
    found = np.zeros((size, size))
    for stroke in STROKES[digit]:
        (x0, y0), (x1, y1) = ((left + unit * (u - slant * (v - 1)), top + unit * v) for u, v in ENDS[stroke])
        along = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2), 0, 1)
        away = np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0))
        found = np.maximum(found, np.clip(1.5 - away / width, 0, 1))
    return (ink * found).astype(np.float32)
