"""DATA -> images looked at once -> a selection -> its manifest and its page."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from foveal.core.errors import DataError
from foveal.core.families.curate import Curate, Selection
from foveal.core.folders import atomic_file
from foveal.core.options import options_to_dict
from foveal.core.progress import Progress
from foveal.core.threads import cpu_threads
from foveal.data.dataset import Dataset
from foveal.data.groups import group_names, series
from foveal.data.images import decode
from foveal.data.open import open_pool
from foveal.data.selection import Chosen, write_selection
from foveal.evaluate.curated import Cluster, ends, shot, write_curated
from foveal.features.extract import chunks, extract, one_line, run_ahead

HELD_BACK = ("val", "test")


@dataclass(frozen=True)
class Pool:
    """Images that can be read: what a method is told of each, and the groups they belong to.

    `free` [n] are the images to choose from; those of other splits stay.
    """

    dataset: Dataset
    seen: np.ndarray
    groups: list[str] | None
    free: np.ndarray
    notes: tuple[str, ...]


def open_images_of(
    data: str | Path | Dataset,
    groups: str | None,
    method: Curate,
    *,
    backbone: str,
    offline: bool,
    device: str,
    progress: Progress,
) -> Pool:
    """Read every image once; those that cannot be read are set aside.

    Raises:
        DataError: no image can be read.
        UsageError: groups that the data do not have; what the method refuses.
    """
    dataset = open_pool(data, offline=offline)
    names = group_names(dataset, groups, data)
    if method.reads() == "features":
        from foveal.backbones.adapter import load_backbone

        found = extract(
            dataset,
            load_backbone(backbone, offline=offline),
            device=device,
            progress=lambda done, total: progress.update("reading images", done, total),
        )
        errors, seen = found.errors, found.X[np.setdiff1d(np.arange(len(dataset)), list(found.errors))]
    else:
        seen, errors = looked_at(dataset, method, progress)
    if len(errors) == len(dataset):
        raise DataError(
            f"none of the {len(dataset)} images of {dataset.name} can be read ({next(iter(errors.values()))})"
        )
    kept = np.setdiff1d(np.arange(len(dataset)), list(errors))
    names = None if names is None else [names[row] for row in kept]
    dataset = dataset.drop(errors) if errors else dataset
    notes: list[str] = []
    if dataset.set_aside:
        notes.append(f"{len(dataset.set_aside)} images set aside (first: {': '.join(dataset.set_aside[0])})")
    if groups is None and (count := series(dataset.ids)):
        notes.append(
            f"the names look like slices or frames of {count} series: with --groups (such as --groups 1, the first "
            "folder) none stands for a slice of another"
        )
    free = np.ones(len(dataset), bool) if dataset.splits is None else ~np.isin(dataset.splits, HELD_BACK)
    return Pool(dataset, seen, names, free, tuple(notes))


def looked_at(dataset: Dataset, method: Curate, progress: Progress) -> tuple[np.ndarray, dict[int, str]]:
    """What `method.look` says of each image that can be read, in order; and why the others cannot."""

    def look(rows: list[int]) -> tuple[list[np.ndarray], dict[int, str]]:
        found: list[np.ndarray] = []
        failed: dict[int, str] = {}
        for row in rows:
            try:
                found.append(method.look(decode(dataset.read(row), deep=True)))
            except (DataError, OSError) as error:
                failed[row] = one_line(error)
        return found, failed

    seen: list[np.ndarray] = []
    errors: dict[int, str] = {}
    with closing(run_ahead(look, chunks(len(dataset)), cpu_threads())) as parts:
        for found, failed in parts:
            seen += found
            errors |= failed
            progress.update("reading images", len(seen) + len(errors), len(dataset))
    return np.stack(seen) if seen else np.zeros((0, 0)), errors


def choose(method: Curate, pool: Pool, keep: float | None) -> Selection:
    """The method's selection of the images that may be dropped; numbers are those of the whole pool.

    Raises:
        DataError: no image may be dropped.
    """
    rows = np.flatnonzero(pool.free)
    if not len(rows):
        raise DataError(f"{pool.dataset.name} has no images outside of val and test: there is nothing to choose from")
    names = ["" for _ in rows] if pool.groups is None else [pool.groups[row] for row in rows]
    _, groups = np.unique(names, return_inverse=True)
    found = method.select(pool.seen[rows], groups.astype(np.int64), keep)
    n = len(pool.dataset)
    exemplar, distance, score = np.arange(n), np.zeros(n, np.float32), np.zeros(n, np.float32)
    exemplar[rows], distance[rows], score[rows] = rows[found.exemplar], found.distance, found.score
    reasons = ["kept: of a split that is measured on"] * n
    for row, reason in zip(rows.tolist(), found.reasons, strict=True):
        reasons[row] = reason
    notes = (*pool.notes, *found.notes)
    return replace(found, exemplar=exemplar, distance=distance, score=score, reasons=reasons, notes=notes)


def write(
    out: Path, data: str | Path | Dataset, pool: Pool, selection: Selection, *, method: Curate, keep: float | None
) -> dict[str, Any]:
    """Write the manifest and the page beside it; returns what the verb answers."""
    dataset, page = pool.dataset, out.with_suffix(".html")
    kept = selection.kept & pool.free
    content: dict[str, Any] = {
        "data": dataset.name if isinstance(data, Dataset) else str(data),
        "method": method.name,
        "options": options_to_dict(method.options),
        "keep": keep,
        "images": int(pool.free.sum()),
        "kept": int(kept.sum()),
        "untouched": int((~pool.free).sum()),
        "groups": 1 if pool.groups is None else len(set(pool.groups)),
        "chosen": dict(selection.chosen),
        "curve": [dict(row) for row in selection.curve],
        "audit": {name: round(float(value), 4) for name, value in selection.audit.items()},
        "notes": list(selection.notes),
        "set_aside": [list(item) for item in dataset.set_aside],
        "manifest": str(out),
        "page": str(page),
    }
    chosen = Chosen(
        selection.kept, selection.score, selection.exemplar, selection.distance, selection.reasons, pool.groups
    )
    write_selection(out, dataset, chosen, content)
    rows = np.flatnonzero(pool.free)
    place = np.zeros(len(dataset), np.int64)
    place[rows] = np.arange(len(rows))
    fullest, emptiest = ends(place[selection.exemplar[rows]], selection.distance[rows])
    with atomic_file(page) as staging:
        sheets = ([shown(cluster, dataset, rows) for cluster in end] for end in (fullest, emptiest))
        write_curated(staging, content, *sheets)
    return content


def shown(cluster: Cluster, dataset: Dataset, rows: np.ndarray) -> dict[str, Any]:
    said = ["stays", *(f"{apart:.3g} away" for apart in cluster.distances)]
    shots = [
        (picture(dataset, int(rows[row])), dataset.ids[int(rows[row])], text)
        for row, text in zip([cluster.exemplar, *cluster.members], said, strict=True)
    ]
    return {"size": cluster.size, "shots": shots}


def picture(dataset: Dataset, row: int) -> str:
    """A small picture; '' when the image cannot be read any more."""
    try:
        return shot(dataset.image(row))
    except DataError:
        return ""
