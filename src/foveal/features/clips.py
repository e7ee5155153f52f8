"""What a classifier of clips makes of them: features and logits, decoded as they are needed, flat in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foveal.backbones.adapter import normalise
from foveal.core.errors import BundleError, DataError
from foveal.core.families.video import ClipClassifier, Video
from foveal.core.preprocessing import Preprocessing
from foveal.core.seeds import generator
from foveal.data.clips import Clip, fold, unfold
from foveal.data.images import to_pixels
from foveal.features.session import pick_device

AT_ONCE = 4
"""Clips in one forward pass."""
WORKERS = 4


@dataclass(frozen=True)
class Judged:
    """Logits [n, C] and features [n, D] of clips; why a clip, whose rows are NaN, could not be decoded."""

    logits: Tensor
    features: Tensor
    errors: dict[int, str]


@torch.inference_mode()
def judge_clips(
    method: Video,
    model: ClipClassifier,
    clips: Sequence[Clip],
    preprocessing: Preprocessing,
    *,
    shuffled: int | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Judged:
    """Show a model the frames in the middle of their shares of each clip; its mode and device are as they were.

    Args:
        shuffled: a seed; the frames of each clip are then put in an order at random, to tell what order is worth.

    Raises:
        BundleError: the model answers with something that is no number.
    """
    target, training, home = pick_device(device), model.training, next(model.parameters()).device
    errors: dict[int, str] = {}
    logits: dict[int, Tensor] = {}
    features: dict[int, Tensor] = {}

    def seen(row: int) -> np.ndarray | str:
        try:
            numbers = method.sample(clips[row].count(), 0.5).tolist()
            images = clips[row].read(numbers)
        except DataError as error:
            return str(error)
        if shuffled is not None:
            images = [images[place] for place in generator(shuffled, "order of frames", row).permutation(len(images))]
        return np.stack([to_pixels(image, preprocessing) for image in images])

    model.to(target).eval()
    try:
        with ThreadPoolExecutor(WORKERS) as pool:
            for start in range(0, len(clips), AT_ONCE):
                span = range(start, min(len(clips), start + AT_ONCE))
                shown = dict(zip(span, pool.map(seen, span), strict=True))
                errors |= {row: each for row, each in shown.items() if isinstance(each, str)}
                pixels = {row: each for row, each in shown.items() if not isinstance(each, str)}
                if pixels:
                    found = model.features(normalised(np.stack(list(pixels.values())), preprocessing).to(target))
                    features |= zip(pixels, found.cpu(), strict=True)
                    logits |= zip(pixels, model.head(found).cpu(), strict=True)
                if progress:
                    progress(span[-1] + 1, len(clips))
    finally:
        model.train(training).to(home)
    for row, answer in logits.items():
        if not torch.isfinite(answer).all():
            raise BundleError(f"the model answers clip {row} with NaN: its weights are damaged, fit again")
    return Judged(rows(logits, len(clips)), rows(features, len(clips)), errors)


def normalised(pixels: np.ndarray, preprocessing: Preprocessing) -> Tensor:
    """Pixels uint8 [B, T, S, S, 3] -> clips [B, T, 3, S, S]."""
    clips = torch.from_numpy(pixels)
    return unfold(normalise(fold(clips), preprocessing), clips.shape[1])


def rows(found: dict[int, Tensor], count: int) -> Tensor:
    """Tensors by row -> [count, ...], NaN where there is none."""
    like = next(iter(found.values()), torch.zeros(1))
    table = like.new_full((count, *like.shape), torch.nan)
    for row, value in found.items():
        table[row] = value
    return table
