"""`foveal fit --task forecast`: tracks in, a Bundle that forecasts them out."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from foveal.core import catalogue
from foveal.core.bundle import atomic_folder, seal, write_json
from foveal.core.errors import UsageError
from foveal.core.families.motion import MAP_SIDE, Motion
from foveal.core.folders import claim
from foveal.core.options import options_to_dict
from foveal.core.progress import Progress
from foveal.core.seeds import derive, generator, seed_everything
from foveal.data.tracks import Tracks, open_tracks, split_tracks
from foveal.evaluate.cost import timed
from foveal.evaluate.forecast import measure_forecasts, straight_on
from foveal.evaluate.forecast_page import Scene, write_forecasts
from foveal.features.foresee import foresee
from foveal.ship.bundle import load, save_weights
from foveal.train.loop import train
from foveal.train.tracks import TrackFeed
from foveal.verbs._adapt import report_event
from foveal.verbs._prepare import source_of
from foveal.verbs._write import finished
from foveal.verbs.fit import DEFAULT_BACKBONE
from foveal.verbs.reproduce import versions

SCENES = 12


def fit(
    data: str,
    *,
    method: str,
    backbone: str,
    out: Path,
    seed: int,
    budget: float | None,
    device: str,
    offline: bool,
    progress: Progress,
) -> Any:
    """See `foveal.verbs.fit.fit`.

    Raises:
        UsageError: a method that forecasts no motion, a backbone, or --out holds something else.
        DataError: DATA is no table of tracks, or its tracks are too short.
    """
    start = time.perf_counter()
    chosen = catalogue.create(method)
    if not isinstance(chosen, Motion):
        raise UsageError(f"{chosen.name} forecasts no motion: expected one of {', '.join(catalogue.names('motion'))}")
    if backbone != DEFAULT_BACKBONE:
        raise UsageError(f"--backbone {backbone}: {chosen.name} has an encoder of its own; leave --backbone out")
    request = {"data": str(data), "task": "forecast", "method": method, "seed": seed}
    if finished(out, request):
        progress.say(f"{out} already holds the Bundle of this very command")
        return load(out)
    tracks, window = open_tracks(data), chosen.window()
    rows = tracks.starts(*window)
    splits = split_tracks(tracks, rows, seed)
    part = {name: rows[splits == name] for name in ("train", "val", "test")}
    feed = TrackFeed(tracks, part["train"], window)
    seed_everything(derive(seed, "init"))
    model = chosen.attach(tracks.maps is not None, usual_step(feed))
    progress.say(
        f"{len(tracks.agents)} agents, a row every {tracks.dt:g} s, {'maps' if tracks.maps else 'no maps'}: "
        f"{len(part['train'])} windows to learn from, {len(part['val'])} to watch, {len(part['test'])} to measure on"
    )

    def measured(network: nn.Module, some: np.ndarray, resamples: int) -> dict[str, Any]:
        modes, _ = foresee(chosen, network, tracks, some, device=device)
        return measure_forecasts(modes, tracks.xy, tracks.agent, some, tracks.dt, resamples=resamples)

    work = out.with_name(out.name + ".work")
    _held = claim(work)
    write_json(work / "request.json", request)
    result = train(
        chosen, model, feed, seed, recipe=chosen.recipe(), device=device, work=work, budget_s=budget,
        validate=(lambda network: {"val_fde": measured(network, part["val"], 0)["fde"]["value"]})
        if len(part["val"])
        else None,
        on_event=lambda event: report_event(event, chosen.name, progress),
    )  # fmt: skip
    test = part["test"]
    straight = straight_on(tracks.xy, test, window[1])[:, None]
    modes, weights = foresee(chosen, result.model, tracks, test, device=device)
    metrics = {
        "split": "test",
        **measure_forecasts(modes, tracks.xy, tracks.agent, test, tracks.dt),
        "references": {"straight on": measure_forecasts(straight, tracks.xy, tracks.agent, test, tracks.dt)},
        "history": result.history,
    }
    manifest = {
        "foveal": versions(),
        "task": "forecast",
        "dt": tracks.dt,
        "maps": tracks.maps is not None,
        "history": window[0],
        "future": window[1],
        "method": {"name": chosen.name, "options": options_to_dict(chosen.options)},
        "why": "asked for",
        "seed": seed,
        "data": {
            "name": tracks.name,
            "source": source_of(data),
            "agents": len(tracks.agents),
            "rows": len(tracks),
            "splits": {name: len(some) for name, some in part.items()},
            "split_by": "the data" if tracks.splits is not None else "seed, by agent",
            "fingerprint": feed.fingerprint(),
        },
        "request": request,
        "parent": None,
        "seconds": round(time.perf_counter() - start, 2),
    }
    write(out, manifest, metrics, result.model, tracks, test, modes, weights, seed)
    shutil.rmtree(work, ignore_errors=True)
    return load(out)


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
