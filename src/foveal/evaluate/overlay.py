"""A heat map drawn over its photo, at the photo's own resolution."""

from __future__ import annotations

import numpy as np
from PIL import Image

ANCHORS = np.array(
    [(20, 8, 60), (90, 20, 110), (160, 44, 96), (216, 78, 62), (246, 140, 30), (252, 200, 70), (255, 250, 190)],
    np.float32,
)
"""From little to much: dark violet, red, orange, pale yellow; lightness rises evenly."""
STRIP = 256
"""Rows drawn at once."""


def overlay(photo: Image.Image, map: np.ndarray, seen: tuple[float, float, float, float]) -> Image.Image:
    """The photo in grey, coloured by how much each pixel matters; outside of what the model sees it is dimmed.

    Args:
        map: [H, W] of the photo, scaled by its maximum; what speaks against the class, below 0, is drawn as 0.
        seen: left, top, right, bottom of what the model sees, in pixels.
    """
    height, width = map.shape
    left, top, right, bottom = (round(edge) for edge in seen)
    highest = max(float(map.max()), 0.0) or 1.0
    drawn = np.empty((height, width, 3), np.uint8)
    for start in range(0, height, STRIP):
        rows = slice(start, start + STRIP)
        strip = np.asarray(photo.crop((0, start, width, min(start + STRIP, height))), np.float32)
        grey = (strip @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
        base = 0.75 * grey + 0.25 * strip
        level = np.clip(map[rows] / highest, 0, 1).astype(np.float32)
        cover = (0.85 * level**0.8)[..., None]
        mixed = (1 - cover) * 0.8 * base + cover * colours(level)
        inside = np.zeros(level.shape, bool)
        inside[max(0, top - start) : max(0, bottom - start), left:right] = True
        drawn[rows] = np.rint(np.where(inside[..., None], mixed, 0.35 * base)).astype(np.uint8)
    return Image.fromarray(drawn)


def colours(level: np.ndarray) -> np.ndarray:
    """Levels in 0..1 [...] -> RGB [..., 3] of 0 to 255."""
    at = level * (len(ANCHORS) - 1)
    low = np.minimum(at.astype(np.int64), len(ANCHORS) - 2)
    share = (at - low)[..., None].astype(np.float32)
    return (1 - share) * ANCHORS[low] + share * ANCHORS[low + 1]
