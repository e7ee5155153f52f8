"""Less is More on solar cells: the counts of 2,624 cells; 400 cells in six jittered copies each; and SimCLR on those
copies, beside SimCLR on the reduced pool and on as many images drawn at random, by a probe for defects on other cells.

Pools are compared at equal steps, the reduced one also at equal epochs.
"""

import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from foveal.core.method import Recipe, Spec, Trained, method
from foveal.core.seeds import derive, generator, seed_everything
from foveal.data.open import open_dataset
from foveal.evaluate.metrics import auroc
from foveal.methods.adapt.linear import Linear
from foveal.methods.curate.less_is_more import LessIsMore, Options
from foveal.train.feed import Feed
from foveal.train.loop import train

COPIES, CELLS, PROBED, SIDE, BATCH, STEPS, TEMPERATURE = 6, 400, 800, 32, 128, 90, 0.5


@cache
def photos(count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Grey cells, uint8 [300, 300] each, and whether each is defective."""
    dataset = open_dataset("sample:elpv")
    rows = np.linspace(0, len(dataset) - 1, count).astype(int)
    pictures = [np.asarray(dataset.image(int(row)).convert("L")) for row in rows]
    return pictures, dataset.labels[rows] == dataset.classes.index("defective")


def jittered(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shifted by up to 2 pixels each way, with noise of 4 grey levels."""
    down, right = rng.integers(-2, 3, 2)
    moved = np.roll(picture, (down, right), (0, 1)).astype(np.float64)
    return (moved + rng.normal(0, 4, picture.shape)).clip(0, 255).round().astype(np.uint8)


def hashed(pictures: list[np.ndarray]) -> np.ndarray:
    look = LessIsMore().look
    return np.stack([look(Image.fromarray(each)) for each in pictures])


def small(pictures: list[np.ndarray]) -> Tensor:
    """Pictures at SIDE pixels, [n, 1, SIDE, SIDE] in 0..1."""
    shrunk = [np.asarray(Image.fromarray(each).resize((SIDE, SIDE), Image.Resampling.BOX)) for each in pictures]
    return torch.from_numpy(np.stack(shrunk))[:, None].float() / 255


class Pairs(Feed):
    """Two views of each image of a pool: shifted, mirrored, of another brightness and contrast."""

    def __init__(self, pool: Tensor, draws: int) -> None:
        self.pool, self.draws = pool.numpy(), draws

    def __len__(self) -> int:
        return self.draws

    def view(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        grown = np.pad(image, ((0, 0), (4, 4), (4, 4)), mode="reflect")
        top, left = rng.integers(0, 9, 2)
        cut = grown[:, top : top + SIDE, left : left + SIDE]
        cut = cut[:, :, :: int(rng.choice([-1, 1]))]
        return np.ascontiguousarray((cut - cut.mean()) * rng.uniform(0.6, 1.4) + rng.uniform(-0.2, 0.2), np.float32)

    def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = self.pool[index % len(self.pool)]
        return {"one": self.view(image, rng), "two": self.view(image, rng)}

    def fingerprint(self) -> str:
        return f"{self.pool.sum()} {self.draws}"


@method(Spec(family="pretrain", title="SimCLR", year=2020, arxiv="2002.05709"))
class SimClr(Trained):
    """The yardstick: NT-Xent between two views, every other image of the batch a negative."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        z = F.normalize(model(torch.cat([batch["one"], batch["two"]])), dim=1)
        scores = z @ z.T / TEMPERATURE - torch.diag(torch.full((len(z),), 1e9))
        partner = torch.arange(len(z)).roll(len(z) // 2)
        return {"loss": F.cross_entropy(scores, partner)}


def network(seed: int) -> nn.Sequential:
    """Encoder and projector."""
    seed_everything(derive(seed, "simclr"))
    layers: list[nn.Module] = []
    for before, after in ((1, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(encoder, nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64)))


def pretrained(pool: Tensor, steps: int, batch: int, seed: int) -> tuple[nn.Module, float]:
    """An encoder after that many steps on a pool, and seconds a step."""
    feed = Pairs(pool, steps * batch)
    recipe = Recipe(epochs=1, batch_size=batch, lr=2e-3)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        trained = train(SimClr(), network(seed), feed, seed, recipe=recipe, device="cpu", work=Path(work)).model
    return trained[0], (time.perf_counter() - start) / steps


def probe(encoder: nn.Module, images: Tensor, defective: np.ndarray) -> float:
    """AUROC of a linear probe on the second half of the images, taught on the first (they alternate)."""
    with torch.no_grad():
        X = encoder(images - images.mean((1, 2, 3), keepdim=True))
    y = torch.from_numpy(defective.astype(np.int64))
    weights = 1 / torch.bincount(y[::2])[y[::2]].float()
    head = Linear().fit_features(X[::2], y[::2], weights / weights.mean(), 0)
    with torch.no_grad():
        scores = head(X[1::2]).softmax(1)[:, 1].numpy()
    return auroc(scores, defective[1::2])


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    cells, probed, steps, batch = (20, 40, 2, 16) if tiny else (CELLS, PROBED, STEPS, BATCH)
    pictures, defective = photos(60 if tiny else 2624)
    order = generator(seed, "cells").permutation(len(pictures))
    chosen, others = order[:cells], order[cells : cells + probed]
    rng = generator(seed, "jitter")
    pool = [jittered(pictures[row], rng) for row in chosen for _ in range(COPIES)]
    seen, one = hashed(pool), np.zeros(len(pool), np.int64)
    values: dict[str, float] = {}
    for radius in (0, 3, 6):
        selection = LessIsMore(Options(radius=radius)).select(seen, one, None)
        covered = np.bincount(np.flatnonzero(selection.kept) // COPIES, minlength=cells) > 0
        values[f"copies_{radius}.kept"] = float(selection.kept.mean())
        values[f"copies_{radius}.covered"] = float(covered.mean())
    cell_hashes = hashed_cells(tiny)
    for radius in (0, 3, 6, 12):
        selection = LessIsMore(Options(radius=radius)).select(cell_hashes, np.zeros(len(cell_hashes), np.int64), None)
        values[f"cells_{radius}.kept"] = float(selection.kept.sum())

    reduced = np.flatnonzero(LessIsMore(Options(radius=3)).select(seen, one, None).kept)
    drawn = np.sort(generator(seed, "random").permutation(len(pool))[: len(reduced)])
    images, test = small(pool), small([pictures[row] for row in others])
    fewer = max(1, round(steps * len(reduced) / len(pool)))
    for name, rows, count in (
        ("full", np.arange(len(pool)), steps),
        ("reduced", reduced, steps),
        ("random", drawn, steps),
        ("reduced_equal_epochs", reduced, fewer),
    ):
        encoder, seconds = pretrained(images[rows], count, batch, seed)
        values[f"{name}.auc"] = probe(encoder, test, defective[others])
        values[f"{name}.seconds_per_epoch"] = seconds * len(rows) / batch
    return values


@cache
def hashed_cells(tiny: bool) -> np.ndarray:
    return hashed(photos(60 if tiny else 2624)[0])
