"""Images and texts through two towers, in order, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveal.backbones.adapter import normalise
from foveal.backbones.text import BATCH
from foveal.core.errors import DataError
from foveal.core.preprocessing import Preprocessing
from foveal.data.dataset import Dataset
from foveal.features.session import pick_device
from foveal.features.stream import stream_pixels


@torch.inference_mode()
def encode_images(
    towers: Any,
    dataset: Dataset,
    preprocessing: Preprocessing,
    *,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Unit vectors [n, dim] of images, float32 on the CPU.

    Raises:
        DataError: an image cannot be decoded.
    """
    target = pick_device(device)
    model, errors = towers.to(target).eval(), {}
    found = np.zeros((len(dataset), towers.dim), np.float32)
    for rows, pixels in stream_pixels(dataset, preprocessing, errors):
        images = normalise(torch.from_numpy(pixels).to(target), preprocessing)
        found[rows] = model.encode_images(images).float().cpu().numpy()
        if progress:
            progress(rows[-1] + 1, len(dataset))
    if errors:
        row, reason = next(iter(errors.items()))
        raise DataError(f"{dataset.ids[row]} cannot be read ({reason})")
    return torch.from_numpy(found)


@torch.inference_mode()
def encode_texts(towers: Any, texts: Sequence[str], *, device: str = "auto") -> Tensor:
    """Unit vectors [n, dim] of texts, float32 on the CPU.

    Raises:
        DataError: a text that is empty or too long.
    """
    target = pick_device(device)
    model = towers.to(target).eval()
    found: list[Tensor] = []
    for start in range(0, len(texts), BATCH):
        ids, mask = towers.text.tokens(texts[start : start + BATCH])
        found.append(model.encode_texts(ids.to(target), mask.to(target)).float().cpu())
    return torch.cat(found).clone()
