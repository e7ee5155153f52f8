"""Points in images, by a network of maps: photos of any size in, places in their own pixels out."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from foveal.backbones.adapter import normalise
from foveal.core.errors import BundleError, DataError
from foveal.core.families.dense import Dense
from foveal.core.preprocessing import Preprocessing
from foveal.data.dataset import Dataset
from foveal.data.geometry import fitted, moved
from foveal.features.session import pick_device

CHUNK = 32
WORKERS = 4


@dataclass(frozen=True)
class Located:
    """Places [n, K, 2] in the pixels of each image, how sure each is [n, K] in 0..1, sizes [n, 2] (width, height), and
    the reason for each row that could not be decoded (its places are NaN)."""

    xy: np.ndarray
    sure: np.ndarray
    sizes: np.ndarray
    errors: dict[int, str]


@torch.inference_mode()
def locate(
    method: Dense,
    model: nn.Module,
    dataset: Dataset,
    preprocessing: Preprocessing,
    outputs: int,
    *,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Located:
    """Find the points of every image; `model` is left in the mode it came in, on the device it ran on.

    Raises:
        BundleError: the network answers with something that is no number.
    """
    target = pick_device(device)
    training = model.training
    model.to(target).eval()
    n, errors = len(dataset), {}
    xy, sure = np.full((n, outputs, 2), np.nan), np.full((n, outputs), np.nan, np.float32)
    sizes = np.zeros((n, 2))

    def square(row: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int]] | str:
        try:
            image = dataset.image(row)
            return *fitted(image, preprocessing.size), image.size
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(WORKERS) as pool:
        for start in range(0, n, CHUNK):
            rows: list[int] = []
            found: list[tuple[Any, Any, Any]] = []
            span = range(start, min(n, start + CHUNK))
            for row, each in zip(span, pool.map(square, span), strict=True):
                if isinstance(each, str):
                    errors[row] = each
                else:
                    rows.append(row)
                    found.append(each)
            if rows:
                pixels = torch.from_numpy(np.stack([each[0] for each in found])).to(target)
                places, certain = method.locate(model, normalise(pixels, preprocessing))
                back = np.linalg.inv(np.stack([each[1] for each in found]))
                xy[rows], sure[rows] = moved(back, places.double().cpu().numpy()), certain.cpu().numpy()
                sizes[rows] = [each[2] for each in found]
                if not (np.isfinite(xy[rows]).all() and np.isfinite(sure[rows]).all()):
                    raise BundleError(f"the network answers {dataset.ids[rows[0]]} with NaN: its weights are damaged")
            if progress:
                progress(span.stop, n)
    model.train(training)
    return Located(xy, sure, sizes, errors)
