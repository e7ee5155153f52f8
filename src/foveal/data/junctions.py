"""A seeded world of junctions, where only the map says who will turn."""

from __future__ import annotations

import numpy as np

from foveal.core.families.motion import MAP_SIDE
from foveal.core.seeds import generator

AHEAD, LEFT, RIGHT = 0, 1, 2


def junctions(
    count: int, history: int, future: int, seed: int, turning: float = 0.2, noise: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Agents that come straight to a junction at the same range of speeds, whatever they do there.

    Args:
        turning: share that turns, half to the left.
        noise: standard deviation of the map's pixels, of 255.

    Returns:
        xy [count, history + 1 + future, 2], each under a heading of its own, 1 being a usual step; maps at step
        `history`, uint8 [count, MAP_SIDE, MAP_SIDE, 3]: the way in red, the open arm in the colour of its kind; and the
        kind [count].
    """
    xy = np.zeros((count, history + 1 + future, 2))
    maps = np.zeros((count, MAP_SIDE, MAP_SIDE, 3), np.uint8)
    kinds = np.zeros(count, np.int64)
    for index in range(count):
        rng = generator(seed, "junction", index)
        kinds[index] = AHEAD if rng.random() >= turning else int(rng.integers(LEFT, RIGHT + 1))
        speed, facing = rng.uniform(0.8, 1.2), rng.uniform(-np.pi, np.pi)
        way = np.array([0.0, 1.0, -1.0])[kinds[index]] * np.pi / 2
        bend = np.clip((np.arange(future) - 0.5) / max(1.0, future / 2), 0, 1)
        headings = facing + np.concatenate([np.zeros(history), way * bend])
        steps = speed * np.stack([np.cos(headings), np.sin(headings)], -1) + rng.normal(0, 0.03, (len(headings), 2))
        xy[index] = rng.uniform(-50, 50, 2) + np.concatenate([np.zeros((1, 2)), np.cumsum(steps, 0)])
        maps[index] = drawn(int(kinds[index]), noise, rng)
    return xy, maps, kinds


def drawn(kind: int, noise: float, rng: np.random.Generator) -> np.ndarray:
    """The map of a junction whose agent comes from below: [MAP_SIDE, MAP_SIDE, 3]."""
    middle, half = MAP_SIDE // 2, MAP_SIDE // 10
    picture = np.zeros((MAP_SIDE, MAP_SIDE, 3))
    lane = slice(middle - half, middle + half)
    cross = slice(middle - 3 * half, middle - half)
    picture[middle - half :, lane, 0] = 255
    arms = {
        AHEAD: (slice(0, middle - half), lane),
        LEFT: (cross, slice(0, middle)),
        RIGHT: (cross, slice(middle, None)),
    }
    for each, (rows, columns) in arms.items():
        picture[rows, columns, 1] = 255 if each == kind else 60
        picture[rows, columns, 2] = 60 if each == kind else 255
    return np.clip(picture + noise * rng.standard_normal(picture.shape), 0, 255).astype(np.uint8)
