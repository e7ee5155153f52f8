"""`foveal fit --task image-text`: images with texts in, two towers with one space out."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveal.backbones.adapter import Backbone, load_backbone
from foveal.backbones.causal_text import BYTES, describe_text
from foveal.core import catalogue
from foveal.core.bundle import atomic_folder, seal, write_json
from foveal.core.errors import UsageError
from foveal.core.families.language import Language
from foveal.core.folders import claim
from foveal.core.method import trainable
from foveal.core.options import options_to_dict, parse_options, split_choice
from foveal.core.progress import Progress
from foveal.core.seeds import derive, generator, seed_everything
from foveal.data.checks import near_duplicate_groups
from foveal.data.pairs import Pairs, open_pairs, split_pairs, survey
from foveal.evaluate.cost import module_cost
from foveal.evaluate.pairs import both_ways, retrieval, same_text
from foveal.evaluate.pairs_page import Found, write_pairs
from foveal.features.towers import encode_images, encode_texts
from foveal.ship.bundle import load, save_weights
from foveal.ship.image_text import TOKENIZER
from foveal.train.loop import train
from foveal.train.pairs import PairFeed
from foveal.train.processes import Team
from foveal.verbs._adapt import report_event
from foveal.verbs._prepare import source_of
from foveal.verbs._write import finished
from foveal.verbs.reproduce import versions

SHOTS, TEXTS = 12, 3


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
        UsageError: a method that does not learn from pairs, or --out holds something else.
        DataError: DATA is no table of images and texts, or none of its images can be used.
    """
    start = time.perf_counter()
    chosen = choose(method)
    request = {"data": str(data), "task": "image-text", "method": method, "backbone": backbone, "seed": seed}
    team = Team(device)
    if team.agree(lambda: finished(out, request)):
        progress.say(f"{out} already holds the Bundle of this very command")
        return load(out)
    given = open_pairs(data)
    pairs, scan = survey(given)
    if pairs.images.set_aside:
        name, reason = pairs.images.set_aside[0]
        progress.say(f"{len(pairs.images.set_aside)} images set aside (first: {name}: {reason})")
    splits = split_pairs(pairs, near_duplicate_groups(scan["phash"]), seed)
    part = {name: pairs.subset(splits == name) for name in ("train", "val", "test")}
    loaded = load_backbone(backbone, offline=offline)
    seed_everything(derive(seed, "init"))
    text = chosen.tower()
    model: Any = chosen.attach(loaded, text)
    trained = sum(p.numel() for _, p in trainable(model))
    feed = PairFeed(part["train"], loaded.preprocessing, text, chosen.crop())
    distinct = len({one for own in pairs.texts for one in own})
    progress.say(
        f"{len(pairs)} images with {distinct} different texts: {len(part['train'])} to learn from, "
        f"{len(part['val'])} to watch, {len(part['test'])} to measure on"
    )

    def validate(towers: Any) -> dict[str, float]:
        at = str(next(towers.parameters()).device.type)
        similarity, relevant, _ = compared(towers, part["val"], loaded, at)
        return {"val_r_at_1": retrieval(similarity, relevant, resamples=0)["r_at_1"]["value"]}

    work = out.with_name(out.name + ".work")
    _held = claim(work) if team.main else None
    if team.main:
        write_json(work / "request.json", request)
    result = train(
        chosen, model, feed, seed, recipe=chosen.recipe(), device=device, work=work, budget_s=budget,
        validate=validate if len(part["val"]) > 1 else None,
        on_event=lambda event: report_event(event, chosen.name, progress),
    )  # fmt: skip
    if not team.main:
        team.wait()
        return load(out)
    similarity, relevant, texts = compared(result.model, part["test"], loaded, device)
    metrics = {
        "split": "test",
        "n": len(part["test"]),
        **both_ways(similarity, relevant),
        "scale": float(result.model.scale.detach()),
        "history": result.history,
    }
    tokenizer = "" if text.tokenizer == BYTES else hashlib.sha256(text.tokenizer.encode()).hexdigest()
    manifest = {
        "foveal": versions(),
        "task": "image-text",
        "backbone": loaded.describe(),
        "text": {**describe_text(text), "tokenizer": tokenizer},
        "text_origin": text.origin,
        "method": {"name": chosen.name, "options": options_to_dict(chosen.options)},
        "why": "asked for",
        "seed": seed,
        "data": {
            "name": pairs.images.name,
            "source": source_of(data),
            "images": len(pairs),
            "texts": distinct,
            "set_aside": [list(item) for item in pairs.images.set_aside],
            "splits": {name: len(some) for name, some in part.items()},
            "split_by": "the data" if given.images.splits is not None else "seed, near-duplicates kept together",
            "fingerprint": feed.fingerprint(),
        },
        "request": request,
        "parent": None,
        "seconds": round(time.perf_counter() - start, 2),
    }
    found = shots(part["test"], similarity, texts, seed)
    with atomic_folder(out) as folder:
        save_weights(result.model, folder / "model.safetensors")
        if tokenizer:
            (folder / TOKENIZER).write_bytes(text.tokenizer.encode())
        write_json(folder / "metrics.json", metrics)
        spent = module_cost(Pictures(result.model), loaded.preprocessing, trained, folder, device=device)
        spent["parameters"]["total"] = sum(value.numel() for value in result.model.state_dict().values())
        write_json(folder / "cost.json", spent)
        write_pairs(folder, manifest, metrics, spent, found)
        seal(folder, manifest)
    shutil.rmtree(work, ignore_errors=True)
    team.wait()
    return load(out)


class Pictures(torch.nn.Module):
    """The image side of two towers: what a query costs once the texts are known."""

    def __init__(self, towers: Any) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.towers.encode_images(images)


def choose(text: str) -> Language:
    name, given = split_choice(text)
    cls = catalogue.get(name)
    method = cls(parse_options(cls.Options, given, name))
    if not isinstance(method, Language):
        raise UsageError(f"{name} does not learn from pairs: expected one of {', '.join(catalogue.names('language'))}")
    return method


def compared(towers: Any, pairs: Pairs, backbone: Backbone, device: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Cosines [images, texts] of the pairs' images with all their different texts, whose own they are, the texts."""
    texts = list(dict.fromkeys(one for own in pairs.texts for one in own))
    images = encode_images(towers, pairs.images, backbone.preprocessing, device=device)
    similarity = (images @ encode_texts(towers, texts, device=device).T).numpy()
    return similarity, same_text(pairs.texts, texts), texts


def shots(pairs: Pairs, similarity: np.ndarray, texts: list[str], seed: int) -> list[Found]:
    rows = generator(seed, "shots").permutation(len(pairs))[:SHOTS]
    return [
        Found(
            pairs.images.ids[row],
            pairs.images.image(row),
            pairs.texts[row],
            [(texts[at], float(similarity[row, at])) for at in np.argsort(-similarity[row], kind="stable")[:TEXTS]],
        )
        for row in map(int, rows)
    ]
