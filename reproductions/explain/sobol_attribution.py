"""Deletion and insertion of Sobol attribution on five photos, beside the reversed order, cells at random, the centre,
the channel norm, and RISE-like masks with twice the passes. EfficientNet-Lite0 at 160 pixels, probability of its first
class, 6 x 6 cells, 32 points. Seed 0 is the plain sequence, later seeds scramble it.

The total-order index did not reach RISE. The signed effects (`index=effect`) were added after that, developed on other
photos, and stand beside it with 8 points, an eighth of RISE's passes.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from foveal.backbones.adapter import DEFAULT, imagenet_classifier, load_backbone
from foveal.backbones.wrapper import OpenModel, Scorer
from foveal.core.seeds import generator
from foveal.data.images import to_pixels
from foveal.data.photos import PHOTOS, photos
from foveal.evaluate.explanation import follow, rivals
from foveal.features.scorer import feature_scorer
from foveal.methods.explain.sobol_attribution import Options, SobolAttribution

SIZE, GRID, POINTS, RANDOM = 160, 6, 32, 5
FEWER = 4
"""How many times fewer points the signed effects have."""


def rise_map(model: Scorer, image: Tensor, target: int, passes: int, seed: int, cells: int = 7) -> Tensor:
    """RISE (Petsiuk et al. 2018): the mean of random smooth masks [H, W], weighted by the score of what they show."""
    rng, size = generator(seed, "rise"), image.shape[-1]
    step = -(-size // cells)
    total = torch.zeros(size, size)
    for start in range(0, passes, model.batch):
        count = min(model.batch, passes - start)
        coarse = torch.from_numpy((rng.random((count, 1, cells, cells)) < 0.5).astype(np.float32))
        whole = torch.nn.functional.interpolate(coarse, (size + step,) * 2, mode="bilinear")[:, 0]
        shifts = rng.integers(0, step, (count, 2)).tolist()
        masks = torch.stack([each[y : y + size, x : x + size] for each, (y, x) in zip(whole, shifts, strict=True)])
        scores = model.of(torch.lerp(model.neutral, image, masks[:, None]), torch.full((count,), target))
        total += (scores[:, None, None] * masks).sum(0)
    return total / passes


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    size, grid, points = (64, 3, 4) if tiny else (SIZE, GRID, POINTS)
    backbone = load_backbone(DEFAULT, size=size)
    classifier = imagenet_classifier()
    model = feature_scorer(backbone, lambda features: classifier.head(features).softmax(1), device="cpu")
    layers = OpenModel(classifier, replace(backbone.preprocessing, size=size))
    method = SobolAttribution(Options(grid=grid, points=points, scramble=seed > 0, seed=seed))
    signed = SobolAttribution(Options(grid=grid, points=max(2, points // FEWER), index="effect", seed=seed))
    areas: dict[str, list[dict[str, float]]] = {}
    values: dict[str, float] = {}
    ordered = 0
    for name, photo in photos(tuple(PHOTOS)[: 2 if tiny else None]).items():
        image = torch.from_numpy(to_pixels(photo, backbone.preprocessing).copy()).permute(2, 0, 1)[None].float() / 255
        target = model(image).argmax(1)
        ours = method.explain(model, image, target)[0]
        others = rivals((size, size), features=layers.feature_map(image)[0], cells=grid, draws=RANDOM, seed=seed)
        maps = {
            "sobol-attribution": ours,
            "reversed": -ours,
            "effect": signed.explain(model, image, target)[0],
            "rise": rise_map(model, image[0], int(target), 2 * method.passes(), seed),
            **others,
        }
        curves = follow(
            lambda images, target=target: model.of(images, target.expand(len(images))),
            image[0],
            maps,
            model.neutral,
            cells=grid,
            steps=grid**2,
        )
        found = {order: curve.areas() for order, curve in curves.items()}
        drawn = [found.pop(order) for order in list(found) if order.startswith("random-")]
        found["random"] = {key: float(np.mean([each[key] for each in drawn])) for key in ("deletion", "insertion")}
        for order, area in found.items():
            areas.setdefault(order, []).append(area)
            values[f"{order}.{name}.deletion"] = area["deletion"]
        mine, random, backwards = (found[each]["deletion"] for each in ("sobol-attribution", "random", "reversed"))
        ordered += mine < random < backwards
    for order, rows in areas.items():
        for key in ("deletion", "insertion"):
            values[f"{order}.{key}"] = float(np.mean([row[key] for row in rows]))
    passes = {"passes": float(method.passes()), "effect.passes": float(signed.passes())}
    return {**values, "photos_in_order": float(ordered), **passes}
