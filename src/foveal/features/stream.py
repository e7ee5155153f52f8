"""Images as pixels for any model, decoded by threads a little ahead; and features of images that are no one's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from foveal.backbones.adapter import Backbone
from foveal.core.errors import DataError
from foveal.core.preprocessing import Preprocessing
from foveal.core.threads import cpu_threads
from foveal.data.dataset import Dataset
from foveal.data.images import to_pixels
from foveal.data.worlds import garbage
from foveal.features.cache import KEY, RowStore, cache_root
from foveal.features.extract import chunks, run_ahead
from foveal.features.session import feature_session

GARBAGE = 64
"""Procedural images against which the unknown score is chosen."""
GARBAGE_VERSION = 1


def stream_pixels(
    dataset: Dataset, preprocessing: Preprocessing, errors: dict[int, str]
) -> Iterator[tuple[list[int], np.ndarray]]:
    """(rows, pixels uint8 [b, S, S, 3]) of a dataset in order; rows that cannot be decoded go to `errors`."""

    def read(rows: list[int]) -> tuple[list[int], list[np.ndarray], dict[int, str]]:
        pixels: list[np.ndarray] = []
        failed: dict[int, str] = {}
        for row in rows:
            try:
                pixels.append(to_pixels(dataset.image(row), preprocessing))
            except DataError as error:
                failed[row] = str(error)
        return [row for row in rows if row not in failed], pixels, failed

    for rows, pixels, failed in run_ahead(read, chunks(len(dataset)), cpu_threads()):
        errors.update(failed)
        if rows:
            yield rows, np.stack(pixels)


def garbage_features(backbone: Backbone, *, device: str = "auto") -> np.ndarray:
    """Features [GARBAGE, D] of procedural images that resemble no photo; made once per backbone and kept."""
    size = backbone.preprocessing.size
    store = RowStore(cache_root() / "features" / backbone.fingerprint(), np.float32, (backbone.width,))
    names = [f"garbage {GARBAGE_VERSION} {size} {index}" for index in range(GARBAGE)]
    keys = [hashlib.sha256(name.encode()).digest()[:KEY] for name in names]
    found, where = store.get(keys)
    if not found.all():
        store.append(keys, feature_session(backbone, device=device)(garbage(GARBAGE, size, 0)))
        _, where = store.get(keys)
    return store.read(where)
