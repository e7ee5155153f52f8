"""Windows of tracks for the loop."""

from __future__ import annotations

import hashlib

import numpy as np
from torch import Tensor

from foveal.core.families.motion import as_planes
from foveal.data.tracks import Tracks
from foveal.train.feed import Feed


class TrackFeed(Feed):
    """Past [b, H + 1, 2], future [b, T, 2] and, where the tracks have maps, maps [b, 3, S, S] in 0..1.

    Args:
        rows: of `tracks`, the last observed steps to learn from.
        window: (H, T).
    """

    def __init__(self, tracks: Tracks, rows: np.ndarray, window: tuple[int, int]) -> None:
        self.tracks, self.rows = tracks, rows
        self.past, self.future = (each.astype(np.float32) for each in tracks.cut(rows, *window))

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        found = {"past": self.past[index], "future": self.future[index]}
        return found if self.tracks.maps is None else {**found, "maps": self.tracks.map(int(self.rows[index]))}

    def ready(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**batch, "maps": as_planes(batch["maps"])} if "maps" in batch else batch

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.past.tobytes() + self.future.tobytes())
        if self.tracks.maps is not None:
            digest.update(repr([self.tracks.maps.ids[each] for each in self.tracks.map_of[self.rows]]).encode())
        return digest.hexdigest()
