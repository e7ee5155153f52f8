"""Junctions where 80 of 100 agents go straight on, and only a noisy map says who will turn.

Twice the same network from the same weights, for the same number of epochs on the same windows: with the contrast to
the blind prior, and without it. Measured on agents that had no part in training: how far off the most likely future
ends for those that turn, and how much worse it gets when each agent is shown the map of another.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from foveal.core.seeds import derive, generator, seed_everything
from foveal.data.junctions import AHEAD, junctions
from foveal.data.tracks import Tracks, in_memory
from foveal.evaluate.forecast import errors, straight_on
from foveal.features.foresee import foresee
from foveal.methods.motion.cab import Cab, Options
from foveal.train.loop import train
from foveal.train.tracks import TrackFeed

HISTORY, FUTURE, TRAIN, TEST, EPOCHS, NOISE = 4, 8, 400, 300, 18, 60.0


def world(count: int, seed: int, swapped: bool = False) -> tuple[Tracks, np.ndarray, np.ndarray]:
    """Tracks, the rows to forecast from and the kinds; swapped: each agent with the map of another."""
    xy, maps, kinds = junctions(count, HISTORY, FUTURE, seed, noise=NOISE)
    if swapped:
        order = generator(seed, "swap").permutation(count)
        other = np.empty(count, np.int64)
        other[order] = np.roll(order, 1)
        maps = maps[other]
    tracks = in_memory(xy, dt=0.5, maps=maps, observed=HISTORY)
    return tracks, tracks.starts(HISTORY, FUTURE), kinds


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    train_count, test_count, epochs = (16, 40, 1) if tiny else (TRAIN, TEST, EPOCHS)
    learnt, rows, _ = world(train_count, derive(seed, "train"))
    test, places, kinds = world(test_count, derive(seed, "test"))
    swapped, _, _ = world(test_count, derive(seed, "test"), swapped=True)
    feed = TrackFeed(learnt, rows, (HISTORY, FUTURE))
    turning = kinds != AHEAD
    future = test.xy[places[:, None] + np.arange(1, FUTURE + 1)]
    straight = errors(straight_on(test.xy, places, FUTURE), future)[1]
    common: dict[str, Any] = {"modes": 6, "history": HISTORY, "future": FUTURE, "anneal": 40, "width": 48}
    common |= {"epochs": epochs, "batch_size": 32, "lr": 3e-3}
    values = {"straight-on.fde-turning": float(straight[turning].mean())}
    for name, contrast in (("cab", 5.0), ("baseline", 0.0)):
        method = Cab(Options(**common, contrast=contrast))
        seed_everything(derive(seed, "init"))
        model = method.attach(True, 1.0)
        with tempfile.TemporaryDirectory() as work:
            done = train(method, model, feed, seed, recipe=method.recipe(), device="cpu", work=Path(work)).model
        found = errors(foresee(method, done, test, places, device="cpu")[0][:, 0], future)
        other = errors(foresee(method, done, swapped, places, device="cpu")[0][:, 0], future)
        values |= {
            f"{name}.ade": float(found[0].mean()),
            f"{name}.fde": float(found[1].mean()),
            f"{name}.fde-turning": float(found[1][turning].mean()),
            f"{name}.context-use": float((other[1] - found[1]).mean()),
        }
    values["cab.wins"] = float(values["cab.fde-turning"] < values["baseline.fde-turning"])
    return values
