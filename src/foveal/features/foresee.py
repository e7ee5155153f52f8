"""Forecasts from rows of tracks, in batches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from foveal.core.families.motion import Motion, as_planes
from foveal.data.tracks import Tracks, unframed
from foveal.features.session import pick_device

BATCH = 256


@torch.no_grad()
def foresee(
    method: Motion,
    model: nn.Module,
    tracks: Tracks,
    rows: np.ndarray,
    *,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Futures [m, K, T, 2] where the tracks are, the most likely first, and their probabilities [m, K].

    Args:
        rows: last observed steps [m], each with enough rows of its agent before it and, if the tracks have maps, one.

    Raises:
        DataError: a map cannot be read.
    """
    target = pick_device(device)
    history, future = method.window()
    model = model.to(target).eval()
    modes, weights = [np.zeros((0, 1, future, 2))], [np.zeros((0, 1))]
    for first in range(0, len(rows), BATCH):
        some = rows[first : first + BATCH]
        past = torch.from_numpy(tracks.cut(some, history, 0)[0]).float().to(target)
        maps = None
        if tracks.maps is not None:
            pixels = torch.from_numpy(np.stack([tracks.map(int(row)) for row in some]))
            maps = as_planes(pixels.to(target))
        found, sure = method.forecast(model, past, maps)
        modes.append(unframed(found.cpu().double().numpy(), *tracks.frames(some, history)))
        weights.append(sure.cpu().double().numpy())
        if progress:
            progress(first + len(some), len(rows))
    return (np.concatenate(modes[1:]), np.concatenate(weights[1:])) if len(rows) else (modes[0], weights[0])
