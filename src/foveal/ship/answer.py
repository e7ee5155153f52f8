"""What a model says of one image, as the row that `foveal predict --json` prints and `foveal serve` sends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

TOP = 5


def answer(
    image: str, probabilities: np.ndarray, score: float, *, classes: Sequence[str], task: str, threshold: float
) -> dict[str, Any]:
    """One row: image, label, probability, unknown, top (up to five [label, probability]).

    Args:
        image: its name.
        probabilities: [C], in the order of `classes`.
        score: unknown score; above `threshold` the image resembles no training image.
        task: with 'multi-label', `label` joins by `|` those of the top that have at least 0.5, and `probability` is
            the smallest of theirs, or that of no label at all.
    """
    order = np.argsort(-probabilities, kind="stable")[:TOP]
    top = [[classes[index], float(probabilities[index])] for index in order]
    chosen = top[:1]
    if task == "multi-label":
        chosen = [item for item in top if item[1] >= 0.5]
    return {
        "image": image,
        "label": "|".join(sorted(str(name) for name, _ in chosen)),
        "probability": min((p for _, p in chosen), default=1 - float(probabilities.max())),
        "unknown": bool(score > threshold),
        "top": top,
    }


def unreadable(image: str, reason: str) -> dict[str, Any]:
    """The row of an image that cannot be decoded."""
    return {"image": image, "label": None, "probability": None, "unknown": True, "top": [], "error": reason}
