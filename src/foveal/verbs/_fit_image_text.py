"""`foveal fit --task image-text`: images with texts in, two towers with one space out."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from foveal.backbones.adapter import Backbone
from foveal.backbones.causal_text import BYTES, describe_text
from foveal.core.bundle import atomic_folder, seal, write_json
from foveal.core.families.language import Language
from foveal.core.method import trainable
from foveal.core.seeds import derive, generator, seed_everything
from foveal.data.checks import near_duplicate_groups
from foveal.data.pairs import Pairs, open_pairs, split_pairs, survey
from foveal.evaluate.cost import module_cost
from foveal.evaluate.pairs import both_ways, retrieval, same_text
from foveal.evaluate.pairs_page import Found, write_pairs
from foveal.features.towers import encode_images, encode_texts
from foveal.ship.bundle import load, save_weights
from foveal.ship.image_text import TOKENIZER
from foveal.train.pairs import PairFeed
from foveal.train.processes import Team
from foveal.verbs._order import Order

SHOTS, TEXTS = 12, 3


def fit(order: Order) -> Any:
    """See `foveal.verbs.fit.fit`.

    Raises:
        UsageError: a method that does not learn from pairs, or --out holds something else.
        DataError: DATA is no table of images and texts, or none of its images can be used.
    """
    chosen, seed, device = order.chosen(Language, "does not learn from pairs"), order.seed, order.device
    team = Team(device)
    if team.agree(order.finished):
        return load(order.out)
    given = open_pairs(order.data)
    pairs, scan = survey(given)
    order.tell_set_aside(pairs.images.set_aside, "images")
    splits = split_pairs(pairs, near_duplicate_groups(scan["phash"]), seed)
    part = {name: pairs.subset(splits == name) for name in ("train", "val", "test")}
    loaded = order.load_backbone()
    seed_everything(derive(seed, "init"))
    text = chosen.tower()
    model: Any = chosen.attach(loaded, text)
    trained = sum(p.numel() for _, p in trainable(model))
    feed = PairFeed(part["train"], loaded.preprocessing, text, chosen.crop())
    distinct = len({one for own in pairs.texts for one in own})
    order.progress.say(
        f"{len(pairs)} images with {distinct} different texts: {len(part['train'])} to learn from, "
        f"{len(part['val'])} to watch, {len(part['test'])} to measure on"
    )

    def validate(towers: Any) -> dict[str, float]:
        at = str(next(towers.parameters()).device.type)
        similarity, relevant, _ = compared(towers, part["val"], loaded, at)
        return {"val_r_at_1": retrieval(similarity, relevant, resamples=0)["r_at_1"]["value"]}

    result = order.train(chosen, model, feed, validate if len(part["val"]) > 1 else None, main=team.main)
    if not team.main:
        team.wait()
        return load(order.out)
    similarity, relevant, texts = compared(result.model, part["test"], loaded, device)
    metrics = {
        "split": "test",
        "n": len(part["test"]),
        **both_ways(similarity, relevant),
        "scale": float(result.model.scale.detach()),
        "history": result.history,
    }
    tokenizer = "" if text.tokenizer == BYTES else hashlib.sha256(text.tokenizer.encode()).hexdigest()
    remembered = {
        "name": pairs.images.name,
        "images": len(pairs),
        "texts": distinct,
        "set_aside": [list(item) for item in pairs.images.set_aside],
        "splits": {name: len(some) for name, some in part.items()},
        "split_by": "the data" if given.images.splits is not None else "seed, near-duplicates kept together",
        "fingerprint": feed.fingerprint(),
    }
    described = {**describe_text(text), "tokenizer": tokenizer}
    manifest = order.manifest(chosen, remembered, backbone=loaded.describe(), text=described, text_origin=text.origin)
    found = shots(part["test"], similarity, texts, seed)
    with atomic_folder(order.out) as folder:
        save_weights(result.model, folder / "model.safetensors")
        if tokenizer:
            (folder / TOKENIZER).write_bytes(text.tokenizer.encode())
        write_json(folder / "metrics.json", metrics)
        spent = module_cost(Pictures(result.model), loaded.preprocessing, trained, folder, device=device)
        spent["parameters"]["total"] = sum(value.numel() for value in result.model.state_dict().values())
        write_json(folder / "cost.json", spent)
        write_pairs(folder, manifest, metrics, spent, found)
        seal(folder, manifest)
    bundle = order.close()
    team.wait()
    return bundle


class Pictures(torch.nn.Module):
    """The image side of two towers: what a query costs once the texts are known."""

    def __init__(self, towers: Any) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.towers.encode_images(images)


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
