"""Data against a Bundle: are these its classes, and are these the very images it was fitted on?"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from foveal.core.errors import BackboneError, DataError
from foveal.core.progress import Progress
from foveal.data.dataset import Dataset
from foveal.ship.bundle import Bundle
from foveal.verbs._prepare import Prepared, manifest_data, prepare, source_of


def check_knows(bundle: Bundle, dataset: Dataset) -> None:
    """Raises DataError unless the data are of the Bundle's task and every class is one it knows."""
    if dataset.task != bundle.task:
        raise DataError(
            f"{dataset.name} is {dataset.task}, the Bundle {bundle.path} is {bundle.task}: use data of its task"
        )
    unknown = sorted(set(dataset.classes) - set(bundle.classes))
    if unknown:
        raise DataError(
            f"{dataset.name} has classes the Bundle does not know ({', '.join(unknown)}); it knows "
            f"{', '.join(bundle.classes)}: rename or drop them"
        )


def own_split(
    bundle: Bundle, data: str | Path | Dataset, *, offline: bool, device: str, progress: Progress
) -> tuple[Prepared, np.ndarray] | None:
    """The data with the split they were fitted by, if they are the very images and labels that the Bundle was fitted
    on; else None."""
    held = bundle.manifest["data"]
    if source_of(data) != held["source"] or bundle.manifest.get("seed") is None:
        return None
    try:
        prepared = prepare(data, bundle.manifest["backbone"]["name"], offline=offline, device=device, progress=progress)
        splits = prepared.splits(bundle.manifest["seed"])
    except (BackboneError, DataError):  # its backbone or some of its images are not here any more
        return None
    return (prepared, splits) if manifest_data(prepared, splits)["fingerprint"] == held.get("fingerprint") else None
