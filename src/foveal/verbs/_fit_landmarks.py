"""`foveal fit --task landmarks`: images with points in, a Bundle that finds them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from foveal.backbones.adapter import Backbone
from foveal.core.bundle import atomic_folder, seal, write_json
from foveal.core.families.dense import Dense
from foveal.core.options import options_to_dict
from foveal.core.seeds import derive, generator, seed_everything
from foveal.data.checks import near_duplicate_groups
from foveal.data.points import Points, open_points, split_points, survey
from foveal.evaluate.cost import module_cost
from foveal.evaluate.landmarks import distances, lengths, mean_places, measure_points, placed
from foveal.evaluate.landmarks_page import Shot, write_landmarks
from foveal.features.locate import Located, locate
from foveal.ship.bundle import load, save_weights
from foveal.train.landmarks import LandmarkFeed
from foveal.verbs._order import Order

SHOTS = 12


def fit(order: Order) -> Any:
    """See `foveal.verbs.fit.fit`.

    Raises:
        UsageError: a method that makes no maps, or --out holds something else.
        DataError: DATA is no table of points, or none of its images can be used.
    """
    chosen = order.chosen(Dense, "finds no points")
    if order.finished():
        return load(order.out)
    given = open_points(order.data)
    points, scan = survey(given)
    order.tell_set_aside(points.images.set_aside, "images")
    groups = near_duplicate_groups(scan["phash"])
    splits = split_points(points, groups, order.seed)
    part = {name: points.subset(splits == name) for name in ("train", "val", "test")}
    loaded = order.load_backbone()
    seed_everything(derive(order.seed, "init"))
    model = chosen.attach(loaded, len(points.names))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    options = options_to_dict(chosen.options)
    feed = LandmarkFeed(
        part["train"], loaded.preprocessing, augment=options.get("augment", "light"), flip=options.get("flip", "auto"),
        views=chosen.views(),
    )  # fmt: skip
    order.progress.say(
        f"{len(points)} images with {len(points.names)} points: {len(part['train'])} to learn from, "
        f"{len(part['val'])} to watch, {len(part['test'])} to measure on; "
        f"{'mirrored, twins known' if feed.flip else 'not mirrored'}"
    )

    def find(network: nn.Module, some: Points) -> Located:
        return locate(chosen, network, some.images, loaded.preprocessing, len(points.names), device=order.device)

    def validate(network: nn.Module) -> dict[str, float]:
        held, found = part["val"], find(network, part["val"])
        measured = measure_points(found.xy, held.xy, held.known, found.sizes, held.names, resamples=0)
        return {"val_nme": measured["nme"]["value"]}

    result = order.train(chosen, model, feed, validate if len(part["val"]) else None)
    test, found = part["test"], find(result.model, part["test"])
    metrics = judge(found, test, part["train"], sizes_of(scan, splits == "train"), result.history)
    remembered = {
        "name": points.images.name,
        "images": len(points),
        "set_aside": [list(item) for item in points.images.set_aside],
        "splits": {name: len(some) for name, some in part.items()},
        "split_by": "the data" if given.images.splits is not None else "seed, near-duplicates kept together",
        "fingerprint": feed.fingerprint(),
    }
    flip = None if points.flip is None else list(points.flip)
    manifest = order.manifest(chosen, remembered, classes=list(points.names), flip=flip, backbone=loaded.describe())
    write(order.out, manifest, metrics, result.model, loaded, trained, test, found, order.seed, order.device)
    return order.close()


def sizes_of(scan: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.stack([scan["width"][rows], scan["height"][rows]], -1).astype(np.float64)


def judge(
    found: Located, test: Points, learnt: Points, learnt_sizes: np.ndarray, history: list[dict[str, Any]]
) -> dict[str, Any]:
    """metrics.json: the network, beside guessing each point's mean place in the training images."""
    guess = placed(mean_places(learnt.xy, learnt.known, learnt_sizes), found.sizes)
    reference = measure_points(guess, test.xy, test.known, found.sizes, test.names)
    kept = ("nme", "pck_05", "pck_10", "pixels", "curve")
    return {
        "split": "test",
        **measure_points(found.xy, test.xy, test.known, found.sizes, test.names),
        "references": {"mean place": {key: reference[key] for key in kept}},
        "history": history,
    }


def write(
    out: Path,
    manifest: dict[str, Any],
    metrics: dict[str, Any],
    model: nn.Module,
    backbone: Backbone,
    trained: int,
    test: Points,
    found: Located,
    seed: int,
    device: str,
) -> None:
    """The Bundle, whole or not at all."""
    away = np.nanmean(distances(found.xy, test.xy, test.known), 1) / lengths(test.xy, test.known, found.sizes)
    shown = generator(seed, "shots").permutation(len(test))[:SHOTS]

    def shot(row: int) -> Shot:
        return Shot(
            test.images.ids[row], test.images.image(row), found.xy[row], test.xy[row], test.known[row], away[row]
        )

    with atomic_folder(out) as folder:
        save_weights(model, folder / "model.safetensors")
        write_json(folder / "metrics.json", metrics)
        spent = module_cost(model, backbone.preprocessing, trained, folder, device=device)
        write_json(folder / "cost.json", spent)
        worst = np.argsort(-away)[:SHOTS]
        write_landmarks(
            folder, manifest, metrics, spent, [shot(int(row)) for row in shown], [shot(int(row)) for row in worst]
        )
        seal(folder, manifest)
