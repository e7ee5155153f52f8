"""A stream of classes: which old images to keep, and one update of a classifier by new ones.

What a continual method does not have to care about: images that a frozen part has seen are stored once, balanced
rounds draw as many images of each class as the memory has, and stages follow one another, each resumable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foveal.backbones.adapter import normalise
from foveal.core.errors import UsageError
from foveal.core.families.continual import Continual
from foveal.core.method import Classifier
from foveal.core.preprocessing import Preprocessing
from foveal.core.seeds import derive, generator
from foveal.data.dataset import Dataset
from foveal.data.images import to_pixels
from foveal.train.events import Event, Listener, silent
from foveal.train.feed import Feed, LabelledImages
from foveal.train.loop import choose_device, train
from foveal.train.processes import accelerator_for

BATCH = 32


def herd(features: np.ndarray, count: int) -> np.ndarray:
    """The rows whose running mean stays nearest to the mean of all (Rebuffi et al. 2017, iCaRL, algorithm 4).

    Args:
        features: [n, D], of one class; each is scaled to length 1 first.
        count: how many; all when there are fewer.

    Returns:
        Rows in the order of choice: the first m of a larger choice are the choice of m.
    """
    X = features.astype(np.float64)
    X /= np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12)
    mean, total = X.mean(0) if len(X) else 0.0, np.zeros(X.shape[1])
    free = np.ones(len(X), bool)
    chosen: list[int] = []
    for step in range(1, min(count, len(X)) + 1):
        distance = np.linalg.norm(mean - (total + X) / step, axis=1)
        best = int(np.where(free, distance, np.inf).argmin())
        free[best] = False
        total += X[best]
        chosen.append(best)
    return np.array(chosen, np.int64)


def remembered(features: np.ndarray, labels: np.ndarray, per_class: int) -> np.ndarray:
    """Rows to keep of every class that occurs, `per_class` of each at most, in herding order class by class.

    Raises:
        UsageError: none may be kept.
    """
    if per_class < 1:
        raise UsageError(f"a memory of {per_class} images a class: expected at least 1, or a class would be forgotten")
    rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.concatenate([own[herd(features[own], per_class)] for own in rows])


def balanced(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Positions of `per_class` images of every class, drawn by seed; all of a class that has fewer."""
    rng = generator(seed, "balance")
    return np.concatenate(
        [np.sort(rng.permutation(np.flatnonzero(labels == label))[:per_class]) for label in np.unique(labels)]
    )


class Stored(Feed):
    """What a frozen part made of images, and their labels. Indices are positions in `rows`."""

    def __init__(self, arrays: Mapping[str, np.ndarray], labels: np.ndarray, rows: np.ndarray, about: str) -> None:
        self.arrays, self.labels, self.rows, self.about = arrays, labels, rows, about

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        row = int(self.rows[index])
        return {**{name: np.array(array[row]) for name, array in self.arrays.items()}, "labels": self.labels[row]}

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(self.about.encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.rows).tobytes() + np.ascontiguousarray(self.labels).tobytes())
        return digest.hexdigest()


@torch.no_grad()
def stored_given(
    method: Continual,
    grown: Classifier,
    dataset: Dataset,
    rows: np.ndarray,
    preprocessing: Preprocessing,
    folder: Path,
    device: str,
    on_event: Listener = silent,
) -> dict[str, np.ndarray] | None:
    """`Continual.given` of some images, on disk; None when the method needs the images themselves."""
    target = choose_device(device, accelerator_for(device))
    grown = grown.to(target).eval()
    arrays: dict[str, np.ndarray] = {}
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        pixels = np.stack([to_pixels(dataset.image(int(row)), preprocessing) for row in part])
        found = method.given(grown, normalise(torch.from_numpy(pixels).to(target), preprocessing))
        if found is None:
            return None
        for name, tensor in found.items():
            if name not in arrays:
                shape = (len(rows), *tensor.shape[1:])
                arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, shape)
            arrays[name][start : start + len(part)] = tensor.float().cpu().numpy()
        on_event({"event": "read", "done": start + len(part), "images": len(rows)})
    grown.cpu()
    return arrays


def learn(
    method: Continual,
    old: Classifier | None,
    grown: Classifier,
    dataset: Dataset,
    labels: np.ndarray,
    rows: np.ndarray,
    preprocessing: Preprocessing,
    seed: int,
    *,
    work: Path,
    per_class: int | None = None,
    device: str = "auto",
    on_event: Listener = silent,
) -> tuple[Classifier, list[Event]]:
    """One update: all stages of a method, on new images and the memory of old ones.

    Args:
        old: the model before, or None when these are its first classes (balanced stages are then left out).
        grown: what `method.grow` made of it; belongs to this call.
        labels: of all images of `dataset`, int64 [n], in the grown model's order of classes.
        rows: of `dataset`, to learn from: all new images, and the remembered old ones.
        per_class: images a class in balanced stages; default: of the class that has fewest.
        work: a folder; the same call goes on after a kill.

    Returns:
        The model and one record per epoch, numbered on from stage to stage, with its `stage`.
    """
    history: list[Event] = []
    work.mkdir(parents=True, exist_ok=True)
    arrays = stored_given(method, grown, dataset, rows, preprocessing, work, device, on_event)
    fewest = int(np.bincount(labels[rows])[np.unique(labels[rows])].min())
    for stage in method.stages():
        if stage.balanced and old is None:
            continue
        chosen = np.arange(len(rows))
        if stage.balanced:
            chosen = balanced(labels[rows], per_class or fewest, derive(seed, stage.name))
        torch.manual_seed(derive(seed, stage.name, "parts"))
        learner = method.update(old, grown, stage)  # pyright: ignore[reportArgumentType]
        if arrays is None:
            feed: Feed = LabelledImages(
                dataset, labels, rows[chosen], preprocessing, torch.ones(int(labels.max()) + 1), stage.recipe
            )
        else:
            feed = Stored(arrays, labels[rows], chosen, repr([dataset.ids[int(row)] for row in rows]))
        result = train(
            method, learner, feed, derive(seed, stage.name), recipe=stage.recipe, device=device,
            work=work / stage.name, on_event=on_event,
        )  # fmt: skip
        grown = result.model
        done = history[-1]["epoch"] if history else 0
        history += [{**each, "epoch": each["epoch"] + done, "stage": stage.name} for each in result.history]
    return grown.eval(), history


@torch.no_grad()
def both(
    old: Classifier, new: Classifier, dataset: Dataset, rows: np.ndarray, preprocessing: Preprocessing, device: str
) -> tuple[Tensor, Tensor]:
    """Logits [n, C_old] and [n, C] of two models for the very same batches, so that equal ones are equal bit by bit."""
    target = choose_device(device, accelerator_for(device))
    models = [model.to(target).eval() for model in (old, new)]
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        pixels = np.stack([to_pixels(dataset.image(int(row)), preprocessing) for row in part])
        images = normalise(torch.from_numpy(pixels).to(target), preprocessing)
        for answers, model in zip(found, models, strict=True):
            answers.append(model(images).cpu())
    for model in models:
        model.cpu()
    return torch.cat(found[0]), torch.cat(found[1])
