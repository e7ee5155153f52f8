"""A small ViT taught to find photos pasted on fabric and solar cells, run on a quarter of its tokens from half depth.

Overlap of the mask it gives (16 x 16 tokens) with the true one: all tokens, Expedit (5 rounds and none), Expedit one
block later, and average pooling with bilinear upsampling of the same 8 x 8 clusters. `tau` is the paper's 0.02 for
tokens of 1,024 numbers, times 1,024 over the 64 here. And the time of one image of 384 pixels through a plain ViT
(vit_tiny, random weights, 24 x 24 tokens) in ONNX Runtime: all tokens, and three budgets, timed in turns.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone, load_backbone, normalise
from foveal.backbones.tokens import TokenHook
from foveal.core.method import Classifier, Recipe, Spec, Trained, method
from foveal.core.seeds import derive, seed_everything
from foveal.core.threads import cpu_threads
from foveal.data.photos import pasted
from foveal.methods.accelerate.expedit import Clusters, Expedit, Options
from foveal.ship.beside import Exporter
from foveal.ship.variants import time_in_turns
from foveal.train.feed import Feed
from foveal.train.loop import train
from foveal.train.small import small_vit

SIZE, PATCH, GRID, SMALL, DEPTH = 64, 4, (16, 16), (8, 8), 6


class Masks(Feed):
    """Composites and which of their tokens lie on the photo, turned and mirrored at random."""

    def __init__(self, count: int, seed: int, preprocessing: Any) -> None:
        self.pixels, truth = pasted(count, SIZE, seed)
        self.truth = truth.reshape(count, GRID[0], PATCH, GRID[1], PATCH).mean((2, 4)) > 0.5
        self.preprocessing, self.seed = preprocessing, seed

    def __len__(self) -> int:
        return len(self.pixels)

    def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        turns, mirrored = int(rng.integers(4)), int(rng.integers(2))
        pair = (np.rot90(each[index], turns)[:, :: 1 - 2 * mirrored] for each in (self.pixels, self.truth))
        return dict(zip(("images", "truth"), map(np.ascontiguousarray, pair), strict=True))

    def ready(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"images": normalise(batch["images"], self.preprocessing), "truth": batch["truth"].flatten(1).float()}

    def fingerprint(self) -> str:
        return f"pasted {len(self)} {self.seed}"


class Segmenter(nn.Module):
    """Images -> a logit for each patch token [B, N]."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.width, 1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.backbone.tokens(images)[:, self.backbone.prefix :]
        return self.head(self.backbone.model.norm(tokens))[..., 0]


@method(Spec(family="dense", title="Per-token masks", year=2021, arxiv=None))
class TokenMasks(Trained):
    def loss(self, model: Any, batch: Any) -> dict[str, Tensor]:
        return {"loss": F.binary_cross_entropy_with_logits(model(batch["images"]), batch["truth"])}


class Pooled(TokenHook):
    """The baseline: average pooling, and bilinear upsampling at the end."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.start = start

    def forward(self, done: int, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        if done == self.start:
            return resized(tokens, GRID, lambda maps: F.adaptive_avg_pool2d(maps, SMALL))
        if done == DEPTH:
            return resized(tokens, SMALL, lambda maps: F.interpolate(maps, GRID, mode="bilinear"))
        return tokens


def resized(tokens: Tensor, grid: tuple[int, int], change: Any) -> Tensor:
    maps = change(tokens[:, 1:].transpose(1, 2).unflatten(2, grid))
    return torch.cat([tokens[:, :1], maps.flatten(2).transpose(1, 2)], 1)


@torch.inference_mode()
def overlap(model: Segmenter, hook: TokenHook | None, test: Masks) -> float:
    """Intersection over union of all masks together, with a hook between the blocks."""
    model.backbone.token_hook = hook
    given = normalise(torch.from_numpy(test.pixels), test.preprocessing)
    found = torch.cat([model(part) > 0 for part in given.split(50)])
    true = torch.from_numpy(test.truth).flatten(1)
    return float((found & true).sum() / (found | true).sum())


def clusters(start: int, iterations: int) -> Clusters:
    chosen = Options(tau=0.02 * 1024 / 64, iterations=iterations)
    return Clusters(1, GRID, SMALL, start, DEPTH, True, chosen)


def times(tiny: bool) -> dict[str, float]:
    """Milliseconds of one image, dense and at three budgets, beginning after 5 of the 12 blocks."""
    seed_everything(0)
    backbone = load_backbone(
        "test_vit" if tiny else "vit_tiny_patch16_224", pretrained=False, size=160 if tiny else 384
    )
    model = Classifier(backbone, nn.Linear(backbone.width, 2)).eval()
    photo = pasted(1, backbone.preprocessing.size, 0)[0]
    exporter = Exporter(backbone.preprocessing, ("a", "b"), "single-label", [Image.fromarray(photo[0])], cpu_threads())
    models = {"dense": model}
    for share in (0.8, 0.6, 0.4):
        side = int(share * (10 if tiny else 24))
        made = Expedit(Options(after=1 if tiny else 5, height=side, width=side)).shrink(model, None, None)
        models[f"expedit-{round(100 * share)}"] = made.module
    with tempfile.TemporaryDirectory() as folder:
        opened = {name: exporter.runtime(each, Path(folder) / f"{name}.onnx") for name, each in models.items()}
        timed = time_in_turns(opened, photo, batches=(1,), seconds=0.1 if tiny else 4.0)
    return {f"{name}.milliseconds": rows[0]["milliseconds"] for name, rows in timed.items()}


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    backbone = small_vit(seed, size=SIZE, patch=PATCH, width=64, depth=DEPTH)
    learning = Masks(8 if tiny else 240, derive(seed, "train") % 2**31, backbone.preprocessing)
    test = Masks(4 if tiny else 150, derive(seed, "test") % 2**31, backbone.preprocessing)
    recipe = Recipe(epochs=1 if tiny else 10, batch_size=24, lr=2e-3, weight_decay=0.01)
    with tempfile.TemporaryDirectory() as work:
        model = train(
            TokenMasks(), Segmenter(backbone), learning, seed, recipe=recipe, device="cpu", work=Path(work)
        ).model
    dense = overlap(model, None, test)
    found = {
        "expedit": overlap(model, clusters(3, 5), test),
        "no-rounds": overlap(model, clusters(3, 0), test),
        "later": overlap(model, clusters(4, 5), test),
        "pooled": overlap(model, Pooled(3), test),
    }
    drops = {f"{name}.drop": dense - value for name, value in found.items()}
    return {"dense.overlap": dense, **drops, **times(tiny)}
