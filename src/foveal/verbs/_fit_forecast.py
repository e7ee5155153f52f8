"""`foveal fit --task forecast`: tracks in, a Bundle that forecasts them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from foveal.core.bundle import atomic_folder, seal, write_json
from foveal.core.errors import UsageError
from foveal.core.families.motion import MAP_SIDE, Motion
from foveal.core.seeds import derive, generator, seed_everything
from foveal.data.tracks import Tracks, open_tracks, split_tracks
from foveal.evaluate.cost import timed
from foveal.evaluate.forecast import measure_forecasts, straight_on
from foveal.evaluate.forecast_page import Scene, write_forecasts
from foveal.features.foresee import foresee
from foveal.ship.bundle import load, save_weights
from foveal.train.tracks import TrackFeed
from foveal.verbs._order import Order
from foveal.verbs.fit import DEFAULT_BACKBONE

SCENES = 12


def fit(order: Order) -> Any:
    """See `foveal.verbs.fit.fit`.

    Raises:
        UsageError: a method that forecasts no motion, a backbone, or --out holds something else.
        DataError: DATA is no table of tracks, or its tracks are too short.
    """
    chosen = order.chosen(Motion, "forecasts no motion")
    if order.backbone != DEFAULT_BACKBONE:
        raise UsageError(f"--backbone {order.backbone}: {chosen.name} has an encoder of its own; leave --backbone out")
    if order.scratch:
        raise UsageError(f"--scratch: {chosen.name} always starts from random weights; leave --scratch out")
    if order.finished():
        return load(order.out)
    tracks, window = open_tracks(order.data), chosen.window()
    rows = tracks.starts(*window)
    splits = split_tracks(tracks, rows, order.seed)
    part = {name: rows[splits == name] for name in ("train", "val", "test")}
    feed = TrackFeed(tracks, part["train"], window)
    seed_everything(derive(order.seed, "init"))
    model = chosen.attach(tracks.maps is not None, usual_step(feed))
    order.progress.say(
        f"{len(tracks.agents)} agents, a row every {tracks.dt:g} s, {'maps' if tracks.maps else 'no maps'}: "
        f"{len(part['train'])} windows to learn from, {len(part['val'])} to watch, {len(part['test'])} to measure on"
    )

    def measured(network: nn.Module, some: np.ndarray, resamples: int) -> dict[str, Any]:
        modes, _ = foresee(chosen, network, tracks, some, device=order.device)
        return measure_forecasts(modes, tracks.xy, tracks.agent, some, tracks.dt, resamples=resamples)

    def validate(network: nn.Module) -> dict[str, float]:
        return {"val_fde": measured(network, part["val"], 0)["fde"]["value"]}

    result = order.train(chosen, model, feed, validate if len(part["val"]) else None)
    test = part["test"]
    straight = straight_on(tracks.xy, test, window[1])[:, None]
    modes, weights = foresee(chosen, result.model, tracks, test, device=order.device)
    metrics = {
        "split": "test",
        **measure_forecasts(modes, tracks.xy, tracks.agent, test, tracks.dt),
        "references": {"straight on": measure_forecasts(straight, tracks.xy, tracks.agent, test, tracks.dt)},
        "history": result.history,
    }
    remembered = {
        "name": tracks.name,
        "agents": len(tracks.agents),
        "rows": len(tracks),
        "splits": {name: len(some) for name, some in part.items()},
        "split_by": "the data" if tracks.splits is not None else "seed, by agent",
        "fingerprint": feed.fingerprint(),
    }
    manifest = order.manifest(
        chosen, remembered, dt=tracks.dt, maps=tracks.maps is not None, history=window[0], future=window[1]
    )
    write(order.out, manifest, metrics, result.model, tracks, test, modes, weights, order.seed)
    return order.close()


def usual_step(feed: TrackFeed) -> float:
    """Root of the mean squared length of a future step; 1 where nothing moves."""
    steps = np.diff(np.concatenate([feed.past[:, -1:], feed.future], 1), axis=1)
    return float(np.sqrt(np.square(steps).sum(-1).mean())) or 1.0


def write(
    out: Path,
    manifest: dict[str, Any],
    metrics: dict[str, Any],
    model: nn.Module,
    tracks: Tracks,
    rows: np.ndarray,
    modes: np.ndarray,
    weights: np.ndarray,
    seed: int,
) -> None:
    """The Bundle, whole or not at all."""
    history, future = manifest["history"], manifest["future"]

    def scene(place: int) -> Scene:
        row = rows[place]
        return Scene(
            tracks.agents[tracks.agent[row]],
            tracks.xy[row - history : row + 1],
            tracks.xy[row + 1 : row + 1 + future],
            modes[place],
            weights[place],
        )

    off = np.linalg.norm(modes[:, 0, -1] - tracks.xy[rows + future], axis=-1)
    shown = generator(seed, "scenes").permutation(len(rows))[:SCENES]
    with atomic_folder(out) as folder:
        save_weights(model, folder / "model.safetensors")
        write_json(folder / "metrics.json", metrics)
        spent = cost(model, manifest["maps"], history, folder)
        write_json(folder / "cost.json", spent)
        worst = np.argsort(-off, kind="stable")[:SCENES]
        write_forecasts(
            folder, manifest, metrics, spent, [scene(int(at)) for at in shown], [scene(int(at)) for at in worst]
        )
        seal(folder, manifest)


def cost(model: nn.Module, maps: bool, history: int, folder: Path) -> dict[str, Any]:
    """The content of cost.json: parameters, bytes, and the time of one forecast on the CPU."""
    model = model.cpu()
    total = sum(parameter.numel() for parameter in model.parameters())
    past = torch.zeros(1, history + 1, 2)
    around = torch.zeros(1, 3, MAP_SIDE, MAP_SIDE) if maps else None
    with torch.no_grad():
        one = timed(lambda: model(past, around))
    where = {"threads": torch.get_num_threads(), "engine": "torch cpu"}
    return {
        "parameters": {"total": total, "trained": total},
        "bytes": (folder / "model.safetensors").stat().st_size,
        "latency": [{"batch": 1, **where, "milliseconds": round(1000 * one, 3)}],
    }
