"""DATA -> images read, checked, grouped and split, with their frozen features: what every verb starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from foveal.backbones.adapter import Backbone, load_backbone
from foveal.core.errors import DataError, UsageError
from foveal.core.progress import Progress
from foveal.data.checks import near_duplicate_groups
from foveal.data.dataset import Dataset
from foveal.data.open import open_dataset
from foveal.data.split import enough, make_split
from foveal.features.extract import Extraction, Rows, extract


@dataclass(frozen=True)
class Prepared:
    """A data set whose every image was read once. Rows of `X`, `scan`, `groups` are the images of `dataset`."""

    dataset: Dataset
    backbone: Backbone
    extraction: Extraction
    groups: np.ndarray
    source: str
    """What the user called the data; a path is made absolute."""
    timed: dict[str, float] = field(default_factory=dict)
    """Seconds that the backbone's session took for a batch, once measured, by device."""
    featured: bool = True

    @property
    def features(self) -> Rows | None:
        """Of the images by the frozen backbone [n, D]; None where they say nothing."""
        return self.extraction.X if self.featured else None

    @cached_property
    def has_test(self) -> bool:
        return comes_split(self.dataset)

    def splits(self, seed: int) -> np.ndarray:
        """'train', 'val' or 'test' for each image.

        Splits that the data came with are kept: without 'test', 'val' is what is measured; without a 'val' beside
        'test', one is cut from 'train'. Data without any are split by `seed`.
        """
        given = self.dataset.splits
        if given is None or not self.has_test:
            return make_split(self.dataset.labels, self.groups, seed, classes=self.dataset.classes)
        splits = given.copy()
        if not (splits == "test").any():
            splits[splits == "val"] = "test"
        if not (splits == "val").any():
            train = np.flatnonzero(splits == "train")
            if len(train) == 0:
                raise DataError(
                    f"{self.dataset.name} has no images in 'train': expected a train split beside the others"
                )
            cut = make_split(
                self.dataset.labels[train], self.groups[train], seed, test=0.0, val=0.125, classes=self.dataset.classes
            )
            splits[train] = cut
        return splits

    def label_weights(self, rows: np.ndarray, class_weights: str) -> tuple[np.ndarray, np.ndarray]:
        """Weights per image [len(rows)] (mean 1) and per class [C] from the labels of `rows`.

        'auto' weighs every class alike (inverse frequency); 'none' every image. With several labels per image the
        class weight is the ratio of images without the label to images with it, bounded to 1..100.
        """
        labels, count = self.dataset.labels[rows], len(self.dataset.classes)
        if self.dataset.task == "multi-label":
            positive = labels.sum(axis=0).clip(1)
            per_class = ((len(rows) - positive) / positive).clip(1, 100) if class_weights == "auto" else np.ones(count)
            return np.ones(len(rows), np.float32), per_class.astype(np.float32)
        frequency = np.bincount(labels, minlength=count)
        if (frequency == 0).any():
            empty = ", ".join(self.dataset.classes[index] for index in np.flatnonzero(frequency == 0))
            raise DataError(f"no training image of class {empty}: add some, or drop the class from every split")
        per_class = len(rows) / (count * frequency) if class_weights == "auto" else np.ones(count)
        return per_class[labels].astype(np.float32), per_class.astype(np.float32)


def prepare(
    data: str | Path | Dataset,
    backbone: str | Backbone,
    *,
    offline: bool = False,
    device: str = "auto",
    split: bool = False,
    featured: bool = True,
    progress: Progress | None = None,
) -> Prepared:
    """Open DATA, load the backbone and read every image once; images that cannot be decoded are set aside.

    Args:
        split: the data will be split; too few images of a class are then said before any is read.
        featured: False for a backbone whose features say nothing yet; copies are then told by hashes alone.

    Raises:
        DataError: nothing usable in DATA.
    """
    progress = progress or Progress()
    dataset = open_dataset(data, offline=offline)
    if split and not comes_split(dataset):
        enough(dataset.labels, np.arange(len(dataset)), dataset.classes)
    loaded = backbone if isinstance(backbone, Backbone) else load_backbone(backbone, offline=offline)
    extraction = extract(
        dataset, loaded, device=device, featured=featured,
        progress=lambda done, total: progress.update("reading images", done, total),
    )  # fmt: skip
    if extraction.errors:
        if len(extraction.errors) == len(dataset):
            first = next(iter(extraction.errors.items()))
            raise DataError(
                f"none of the {len(dataset)} images of {dataset.name} can be decoded "
                f"(first: {dataset.ids[first[0]]}: {first[1]}): check that these are images"
            )
        kept = np.setdiff1d(np.arange(len(dataset)), list(extraction.errors))
        dataset, extraction = dataset.drop(extraction.errors), extraction.take(kept)
    if dataset.set_aside:
        name, reason = dataset.set_aside[0]
        progress.say(
            f"{len(dataset.set_aside)} images set aside (first: {name}: {reason}); all are named in the report"
        )
    groups = near_duplicate_groups(extraction.scan["phash"], extraction.X if featured else None)
    return Prepared(dataset, loaded, extraction, groups, source_of(data), featured=featured)


def comes_split(dataset: Dataset) -> bool:
    """Whether the data themselves say what to measure on."""
    return dataset.splits is not None and bool(np.isin(dataset.splits, ["test", "val"]).any())


def source_of(data: str | Path | Dataset) -> str:
    if isinstance(data, Dataset):
        return data.name
    return str(Path(data).absolute()) if Path(data).exists() else str(data)


def parse_budget(text: str | None) -> float | None:
    """'90s', '10m', '2h' or a number of seconds -> seconds.

    Raises:
        UsageError: anything else.
    """
    if text is None:
        return None
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        seconds = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UsageError(f"--budget {text}: expected a time such as 90s, 10m or 2h")
    return seconds


def check_choices(*, device: str, class_weights: str = "auto") -> None:
    """Refuse words that no part of foveal knows.

    Raises:
        UsageError: naming what came and what can be had.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device}: expected auto, cpu or cuda")
    if class_weights not in ("auto", "none"):
        raise UsageError(f"--class-weights {class_weights}: expected auto or none")


def manifest_data(prepared: Prepared, splits: np.ndarray) -> dict[str, Any]:
    """What a Bundle remembers of its data: counts and a fingerprint of image bytes and labels."""
    import hashlib

    digest = hashlib.sha256()
    for key in prepared.extraction.keys:
        digest.update(key)
    digest.update(np.ascontiguousarray(prepared.dataset.labels).tobytes())
    names, counts = np.unique(splits, return_counts=True)
    return {
        "name": prepared.dataset.name,
        "source": prepared.source,
        "images": len(prepared.dataset),
        "set_aside": [list(item) for item in prepared.dataset.set_aside],
        "splits": {str(name): int(count) for name, count in zip(names, counts, strict=True)},
        "split_by": "the data" if prepared.has_test else "seed, stratified, near-duplicates kept together",
        "near_duplicate_images": int(len(prepared.groups) - len(np.unique(prepared.groups))),
        "fingerprint": digest.hexdigest(),
    }
