"""Experiments of seconds on frozen features, the ground of the reproductions: samples, few-shot draws, one measure."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from foveal.backbones.adapter import DEFAULT, load_backbone
from foveal.core.method import Adapt
from foveal.core.seeds import generator
from foveal.data.checks import near_duplicate_groups
from foveal.data.dataset import Dataset
from foveal.data.open import open_dataset
from foveal.data.samples import folder_of
from foveal.data.split import make_split
from foveal.features.extract import extract

TINY = 40


@dataclass(frozen=True)
class Labelled:
    """Features X [n, D] float32, labels y [n], and numbers of groups of near-duplicates [n]."""

    X: Tensor
    y: Tensor
    groups: np.ndarray

    def take(self, rows: np.ndarray) -> Labelled:
        index = torch.from_numpy(rows)
        return Labelled(self.X[index], self.y[index], self.groups[rows])

    def halves(self, seed: int, test: float = 0.25) -> tuple[Labelled, Labelled]:
        """Rows to learn from and rows to measure on, drawn by seed; near-duplicates stay on one side."""
        held = make_split(self.y.numpy(), self.groups, seed, test, val=0.0) == "test"
        return self.take(np.flatnonzero(~held)), self.take(np.flatnonzero(held))

    def few(self, shots: int, seed: int) -> Labelled:
        """`shots` rows of every class, drawn by seed."""
        rng, y = generator(seed, "shots", shots), self.y.numpy()
        drawn = [rng.permutation(np.flatnonzero(y == c))[:shots] for c in range(int(y.max()) + 1)]
        return self.take(np.sort(np.concatenate(drawn)))


def features_of(dataset: Dataset, tiny: bool = False) -> Labelled:
    """Features of the default backbone, from the cache where they are; `tiny`: 16 x 16 grey pixels of a few images."""
    if not tiny:
        found = extract(dataset, load_backbone(DEFAULT))
        X, groups = np.asarray(found.X), near_duplicate_groups(found.scan["phash"], found.X)
    else:
        rows = [np.flatnonzero(dataset.labels == c)[:TINY] for c in range(len(dataset.classes))]
        dataset = dataset.subset(np.sort(np.concatenate(rows)))
        grey = [dataset.image(row).convert("L").resize((16, 16)) for row in range(len(dataset))]
        X, groups = np.stack([np.asarray(image, np.float32).ravel() / 255 for image in grey]), np.arange(len(grey))
    return Labelled(torch.from_numpy(X), torch.from_numpy(dataset.labels), groups)


def brightness_of(dataset: Dataset, tiny: bool = False) -> Labelled:
    """Mean and deviation of each image's grey values: what a method must beat to have learnt more than exposure."""
    found = features_of(dataset, tiny)
    if tiny:
        return replace(found, X=torch.stack([found.X.mean(1), found.X.std(1)], 1))
    scan = extract(dataset, load_backbone(DEFAULT)).scan
    return replace(found, X=torch.from_numpy(np.stack([scan["mean"], scan["std"]], 1).astype(np.float32)))


def elpv_extremes(tiny: bool = False) -> Labelled:
    """Solar cells whose photo certainly shows a defect (1) or certainly shows none (0); doubtful ones left out."""
    dataset = open_dataset("sample:elpv")
    table = Path(folder_of("elpv_dataset", "elpv-dataset", "elpv"), "data", "labels.csv").read_text("ascii")
    probability = {path: float(p) for path, p, _ in (line.split() for line in table.splitlines() if line.strip())}
    p = np.array([probability[name] for name in dataset.ids])
    certain = np.flatnonzero((p == 0) | (p == 1))
    chosen = dataset.subset(certain)
    found = features_of(chosen, tiny)
    return found if tiny else replace(found, y=torch.from_numpy((p[certain] == 1).astype(np.int64)))


def digit_pixels(tiny: bool = False) -> Labelled:
    """scikit-learn's digits as their 64 raw pixels."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    found = Labelled(torch.from_numpy(X.astype(np.float32)), torch.from_numpy(y.astype(np.int64)), np.arange(len(y)))
    return found.few(TINY, 0) if tiny else found


def fitted(method: Adapt, rows: Labelled, seed: int) -> nn.Module:
    """The method's head on these rows, every class counting the same."""
    count = torch.bincount(rows.y).float()
    weights = (1 / count)[rows.y]
    return method.fit_features(rows.X, rows.y, weights / weights.mean(), seed)


def balanced_accuracy(head: nn.Module, rows: Labelled) -> float:
    """Mean recall of the classes, in 0..1."""
    with torch.inference_mode():
        right = (head(rows.X).argmax(1) == rows.y).double()
    return float(torch.stack([right[rows.y == c].mean() for c in rows.y.unique()]).mean())


def few_shot(
    methods: Mapping[str, Adapt], rows: Labelled, world: str, shots: Iterable[int], seed: int
) -> dict[str, float]:
    """`METHOD.WORLD_SHOTS.balanced_accuracy` of every method, on the same draws and the same test rows."""
    pool, test = rows.halves(seed)
    values: dict[str, float] = {}
    for count in shots:
        drawn = pool.few(count, seed)
        for name, method in methods.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # fewer images than neighbours asked for
                head = fitted(method, drawn, seed)
            values[f"{name}.{world}_{count}.balanced_accuracy"] = balanced_accuracy(head, test)
    return values


def mean_over(values: Mapping[str, float], method: str, world: str, shots: Iterable[int]) -> float:
    """Mean of a method's balanced accuracy over some shot counts."""
    return float(np.mean([values[f"{method}.{world}_{count}.balanced_accuracy"] for count in shots]))
