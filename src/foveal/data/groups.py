"""Groups of images that belong together: a patient, a volume, a video, a folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from foveal.core.errors import DataError, UsageError
from foveal.data.dataset import Dataset, printable
from foveal.data.table import check_columns, reading

SERIES = re.compile(r"\d+(?=\D*$)")
"""The last number in a name."""
FEW = 4
"""Images a numbered series has at least, on average."""


def group_names(dataset: Dataset, by: str | None, data: str | Path | Dataset) -> list[str] | None:
    """The name of each image's group; None when all are one.

    Args:
        by: a number of folder levels (1: the first folder in an image's name; -1: the folder it lies in), `label`, or
            a column of the table that `data` is.

    Raises:
        UsageError: no such level or column.
    """
    if by is None:
        return None
    if re.fullmatch(r"-?\d+", by):
        level = int(by)
        folders = [name.split("/")[:-1] for name in dataset.ids]
        depth = min(len(each) for each in folders)
        if level == 0 or level > depth or (level < 0 and depth == 0):
            raise UsageError(
                f"--groups {by}: {dataset.ids[0]} and others lie {depth} folders deep: expected 1 to {depth}"
            )
        return ["/".join(each if level < 0 else each[:level]) for each in folders]
    if by == "label" and dataset.classes:
        if dataset.task == "multi-label":
            raise UsageError("--groups label: these images have several labels each: name a column or a folder level")
        return [dataset.classes[int(label)] for label in dataset.labels]
    return from_column(dataset, by, data)


def from_column(dataset: Dataset, column: str, data: str | Path | Dataset) -> list[str]:
    path = Path("" if isinstance(data, Dataset) else os.path.expanduser(data))
    kind = path.suffix.lower()
    if kind not in (".csv", ".parquet", ".pq") or not path.is_file():
        raise UsageError(f"--groups {column}: expected a folder level such as 1, label, or a column of a table as DATA")
    images, values = csv_columns(path, column) if kind == ".csv" else parquet_columns(path, column)
    found = dict(zip(images, values, strict=True))
    try:
        return [found[name] for name in dataset.ids]
    except KeyError as error:
        raise DataError(f"{path.name}: no row says the {column} of {error.args[0]}: expected image paths") from None


def csv_columns(path: Path, column: str) -> tuple[list[str], list[str]]:
    import csv

    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        header = file.readline()
        file.seek(0)
        reader = csv.DictReader(file, delimiter=max(",;\t", key=header.count))
        names = {name.strip().lower(): name for name in reader.fieldnames or ()}
        check_columns(names, printable(path.name), ("image", column.lower()))
        rows = [(row[names["image"]].strip(), row[names[column.lower()]]) for row in reader]
    return [printable(image) for image, _ in rows], [str(value) for _, value in rows]


def parquet_columns(path: Path, column: str) -> tuple[list[str], list[str]]:
    import pyarrow.parquet as pq

    with reading(printable(path.name)):
        file = pq.ParquetFile(path)
        check_columns(file.schema_arrow.names, printable(path.name), ("image", column))
        table = file.read(columns=["image", column])
    images = [value.get("path") if isinstance(value, dict) else value for value in table["image"].to_pylist()]
    return [printable(str(image)) for image in images], [str(value) for value in table[column].to_pylist()]


def series(names: Sequence[str]) -> int:
    """How many numbered series of slices or frames the names look like; 0 when they do not, or are one."""
    stems = Counter(SERIES.sub("#", name) for name in names if SERIES.search(name))
    numbered = sum(stems.values())
    return len(stems) if len(stems) > 1 and numbered == len(names) and numbered >= FEW * len(stems) else 0
