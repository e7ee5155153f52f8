"""The selection manifest: a Parquet file that says of every image whether it was kept and why, and is itself DATA."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foveal.core.errors import DataError, UsageError
from foveal.core.folders import atomic_file
from foveal.data.dataset import Dataset, Files, Rows, Source, printable
from foveal.data.open import Given
from foveal.data.table import SELECTION

ROWS = 256
"""Rows written at once."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """Columns of a manifest, a row for each image of a Dataset.

    Attributes:
        kept: bool [n].
        score: float32 [n].
        exemplar: number of the image that stands for each [n].
        distance: float32 [n], to that image.
        reasons: one line each.
        groups: name of each image's group, or None without groups.
    """

    kept: np.ndarray
    score: np.ndarray
    exemplar: np.ndarray
    distance: np.ndarray
    reasons: Sequence[str]
    groups: Sequence[str] | None = None


def write_selection(out: Path, dataset: Dataset, chosen: Chosen, about: Mapping[str, Any]) -> None:
    """Write a manifest, whole or not at all.

    Columns: image, label and split (where there are any), group (likewise), kept, score, cluster, distance, reason.
    `image` is a path (relative to the manifest where it lies below it); images that are no files of their own are
    stored as {bytes, path}, with bytes where they are kept. `cluster` is the name of the image that stands for this
    one, as in the data.

    Raises:
        UsageError: `out` is there and no selection.
        DataError: an image cannot be read, or its name cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_free(out)
    paths = [path_of(dataset.source, row) for row in range(len(dataset))]
    of_paths = all(path is not None for path in paths)
    image = pa.string() if of_paths else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    label = pa.string() if dataset.task == "single-label" else pa.list_(pa.string())
    fields = [
        pa.field("image", image),
        *([pa.field("label", label)] if dataset.classes else []),
        *([pa.field("split", pa.string())] if dataset.splits is not None else []),
        *([pa.field("group", pa.string())] if chosen.groups is not None else []),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("score", pa.float32()),
        pa.field("cluster", pa.string()),
        pa.field("distance", pa.float32()),
        pa.field("reason", pa.string()),
    ]
    schema = pa.schema(fields, metadata={SELECTION: json.dumps(dict(about))})
    root = os.path.realpath(out.parent)
    try:
        with atomic_file(out) as staging, pq.ParquetWriter(staging, schema) as writer:
            for rows in batches(len(dataset)):
                table: dict[str, Sequence[Any]] = {
                    "image": [
                        placed(str(paths[row]), root) if of_paths else stored(dataset, row, bool(chosen.kept[row]))
                        for row in rows
                    ],
                    "label": [label_of(dataset, row) for row in rows] if dataset.classes else [],
                    "split": [str(dataset.splits[row]) for row in rows] if dataset.splits is not None else [],
                    "group": [chosen.groups[row] for row in rows] if chosen.groups is not None else [],
                    "kept": chosen.kept[rows].tolist(),
                    "score": chosen.score[rows].tolist(),
                    "cluster": [dataset.ids[int(row)] for row in chosen.exemplar[rows]],
                    "distance": chosen.distance[rows].tolist(),
                    "reason": [chosen.reasons[row] for row in rows],
                }
                arrays = [pa.array(table[each.name], each.type) for each in schema]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    except UnicodeEncodeError as error:
        raise DataError(
            f"the name {printable(str(error.object))} is not UTF-8 and cannot be written: rename it"
        ) from None


def check_free(out: Path) -> None:
    """
    Raises:
        UsageError: something else than a selection lies there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if out.suffix.lower() not in (".parquet", ".pq"):
        raise UsageError(f"--out {out}: expected a name that ends in .parquet")
    if not out.exists():
        return
    try:
        ours = SELECTION in (pq.read_schema(out).metadata or {})
    except (OSError, pa.ArrowException):
        ours = False
    if not ours:
        raise UsageError(f"--out {out} exists and is no selection: choose another --out")


def batches(n: int) -> Iterator[np.ndarray]:
    return (np.arange(start, min(start + ROWS, n)) for start in range(0, n, ROWS))


def path_of(source: Source, row: int) -> str | None:
    """The file an image lies in by itself; None where it has none."""
    if isinstance(source, Rows):
        return path_of(source.source, int(source.rows[row]))
    if isinstance(source, Files):
        return os.path.join(source.root, source.paths[row])
    item = source.items[row] if isinstance(source, Given) else None
    return os.path.abspath(item) if isinstance(item, str) else None


def placed(path: str, root: str) -> str:
    """A path as a manifest in `root` names it."""
    real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    return os.path.relpath(real, root) if real.startswith(os.path.join(root, "")) else os.path.abspath(path)


def stored(dataset: Dataset, row: int, kept: bool) -> dict[str, Any]:
    return {"bytes": dataset.read(row) if kept else None, "path": dataset.ids[row]}


def label_of(dataset: Dataset, row: int) -> str | list[str]:
    if dataset.task == "single-label":
        return dataset.classes[int(dataset.labels[row])]
    return [dataset.classes[index] for index in np.flatnonzero(dataset.labels[row])]
