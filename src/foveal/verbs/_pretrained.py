"""What `foveal pretrain` reads, measures and writes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone, normalise
from foveal.backbones.masked import evaluating
from foveal.backbones.weights import FORMAT, RECORD, TENSORS
from foveal.core.bundle import atomic_folder, read_json, sha256, write_json
from foveal.core.errors import DataError, UsageError
from foveal.core.families.pretrain import Pretrain
from foveal.core.preprocessing import Preprocessing
from foveal.core.progress import Progress
from foveal.core.seeds import derive, generator
from foveal.data.dataset import Dataset
from foveal.data.images import to_pixels
from foveal.data.open import open_images, open_pool
from foveal.evaluate.pretrained import write_pretrained
from foveal.evaluate.probe import effective_rank, neighbour_accuracy
from foveal.features.extract import Extraction, extract

PROBED = 1000
"""Images whose features are looked at, at most."""
MEASURED, SHOWN = 64, 6
"""Images whose loss is measured, and images on the page, at most."""


@dataclass(frozen=True)
class Pool:
    """Images to learn from; labels, where there are any, are for the probe alone."""

    dataset: Dataset
    labelled: bool
    features: Extraction
    """What the backbone makes of them before it is trained; rows are those of `dataset`."""

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"".join(self.features.keys)).hexdigest()


def open_unlabelled(data: str | Path | Dataset, *, offline: bool) -> tuple[Dataset, bool]:
    """The images of DATA in any form, and whether they have labels; what the data call 'test' is left out.

    Raises:
        DataError: as `open_dataset`, or nothing is left.
    """
    try:
        dataset = open_pool(data, offline=offline)
    except DataError:
        if isinstance(data, Dataset) or not os.path.isdir(os.path.expanduser(data)):
            raise
        dataset = open_images([os.path.expanduser(data)])  # folders, but not of classes
    if dataset.splits is not None:
        dataset = dataset.subset(dataset.splits != "test")
    if not len(dataset):
        raise DataError(f"{dataset.name} holds no image outside of its test split: there is nothing to learn from")
    return dataset, dataset.task == "single-label" and len(dataset.classes) > 1


def read_pool(
    data: str | Path | Dataset, backbone: Backbone, *, offline: bool, device: str, progress: Progress
) -> Pool:
    """Read every image once; those that cannot be decoded are set aside.

    Raises:
        DataError: as `open_unlabelled`, or fewer than two images can be decoded.
    """
    dataset, labelled = open_unlabelled(data, offline=offline)
    read = extract(
        dataset, backbone, device=device, progress=lambda done, total: progress.update("reading images", done, total)
    )
    if read.errors:
        kept = np.setdiff1d(np.arange(len(dataset)), list(read.errors))
        dataset, read = dataset.drop(read.errors), read.take(kept)
    if dataset.set_aside:
        name, reason = dataset.set_aside[0]
        progress.say(f"{len(dataset.set_aside)} images set aside (first: {name}: {reason}); all are in {RECORD}")
    if len(dataset) < 2:
        raise DataError(f"{len(dataset)} images of {dataset.name} can be decoded: pretraining needs at least two")
    return Pool(dataset, labelled, read)


class Probe:
    """The same look at a backbone before and after: its loss on a few images, and the features of more."""

    def __init__(self, pool: Pool, method: Pretrain, preprocessing: Preprocessing, seed: int) -> None:
        self.pool, self.method, self.seed = pool, method, seed
        order = generator(seed, "probe").permutation(len(pool.dataset))
        self.rows = np.sort(order[:PROBED])
        self.pixels = np.stack([to_pixels(pool.dataset.image(int(row)), preprocessing) for row in order[:MEASURED]])
        self.images = normalise(torch.from_numpy(self.pixels), preprocessing)

    def __call__(self, model: nn.Module, X: np.ndarray) -> dict[str, float | None]:
        """
        Args:
            model: what the method attached, on the CPU; its mode is as before afterwards.
            X: features [n, D] of `rows`.
        """
        labels = self.pool.dataset.labels[self.rows]
        told = self.pool.labelled and len(np.unique(labels)) > 1
        views = self.images[:, None].expand(-1, self.method.views().count, -1, -1, -1)
        with torch.no_grad(), torch.random.fork_rng([]), evaluating(model):
            torch.manual_seed(derive(self.seed, "probe"))
            parts = self.method.loss(model, {"views": views})
        return {
            "loss": float(parts["loss"]),
            "blank": float(parts["blank"]) if "blank" in parts else None,
            "neighbour_accuracy": neighbour_accuracy(X, labels) if told else None,
            "effective_rank": effective_rank(X),
        }

    def pictures(self, model: nn.Module, preprocessing: Preprocessing) -> list[tuple[str, list[np.ndarray]]]:
        """(caption, pictures uint8 [S, S, 3]) of the first few images, and of what the method makes of them."""
        with torch.no_grad(), torch.random.fork_rng([]), evaluating(model):
            torch.manual_seed(derive(self.seed, "pictures"))
            made = self.method.pictures(model, self.images[:SHOWN])
        drawn = [(name, list(to_uint8(images, preprocessing))) for name, images in made.items()]
        return [("the image", list(self.pixels[:SHOWN])), *drawn]


def to_uint8(images: Tensor, preprocessing: Preprocessing) -> np.ndarray:
    """Normalised images [B, 3, H, W] -> pixels [B, H, W, 3]."""
    mean, std = (torch.tensor(each).reshape(3, 1, 1) for each in (preprocessing.mean, preprocessing.std))
    return (images * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def finished(out: Path, request: Mapping[str, Any]) -> bool:
    """Whether `out` holds the weights of this very request.

    Raises:
        UsageError: it holds something else, which is not overwritten.
    """
    if not os.path.exists(out) or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        held = read_json(out / RECORD)["request"]
        differs = ", ".join(f"{key} {held.get(key)}" for key in request if held.get(key) != request[key])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"--out {out} exists and holds no weights of foveal: choose another --out") from None
    if differs:
        raise UsageError(f"--out {out} holds the weights of another command ({differs}): choose another --out")
    return True


def write_weights(
    out: Path, backbone: Backbone, record: dict[str, Any], pictures: list[tuple[str, list[np.ndarray]]]
) -> None:
    """model.safetensors, weights.json and report.html, or nothing."""
    from safetensors.torch import save_file

    tensors = {name: value.contiguous().clone() for name, value in backbone.model.state_dict().items()}
    with atomic_folder(out) as folder:
        save_file(tensors, folder / TENSORS, {"architecture": backbone.arch})
        write_pretrained(folder / "report.html", record, pictures)
        write_json(folder / RECORD, {"format": FORMAT, **record, "sha256": sha256(folder / TENSORS)})
