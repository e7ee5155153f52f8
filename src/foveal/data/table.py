"""CSV and Parquet tables with columns image,label[,split]."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from foveal.core.errors import DataError
from foveal.data.dataset import MAX_BYTES, Dataset, Files, Source, encode_labels, inside, printable, unique
from foveal.data.folder import SPLIT_NAMES

if TYPE_CHECKING:
    from foveal.core.method import Task

MAX_LINE = 2**20
EXPECTED = "expected columns image,label and, if you like, split"


@dataclass
class Table:
    """Rows of a table, and where in it they are ('line 7'). `split` is empty if there is no such column."""

    name: str
    image: list[str]
    label: list[Sequence[str] | str]
    split: list[str]
    where: list[str]


def open_csv(path: Path) -> Dataset:
    """A CSV file; paths are relative to its folder; `|` between labels makes the task multi-label.

    Raises:
        DataError: no such columns, an empty label, an unknown split, one image with two labels, no image that exists.
    """
    table = Table(printable(path.name), [], [], [], [])
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = bounded(file, table.name)
            header = next(lines, "")
            delimiter = max(",;\t", key=header.count)
            columns = {name.strip().strip('"').lower(): at for at, name in enumerate(header.split(delimiter))}
            check_columns(columns, table.name)
            image, label, split = columns["image"], columns["label"], columns.get("split")
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            for row in reader:
                if not row:
                    continue
                where = f"line {reader.line_num + 1}"
                if len(row) <= max(image, label, split or 0):
                    raise DataError(f"{table.name} {where} has {len(row)} fields: {EXPECTED}")
                table.image.append(row[image].strip())
                table.label.append(row[label].strip())
                table.split += [row[split].strip()] if split is not None else []
                table.where.append(where)
    except csv.Error as error:
        raise DataError(f"{table.name} is not a CSV file ({error}): {EXPECTED}") from None
    except OSError as error:
        raise DataError(f"{printable(str(path))} cannot be read ({error.strerror})") from None
    return from_paths(table, path.parent)


def bounded(file: TextIO, name: str) -> Iterator[str]:
    """The lines of a text file.

    Raises:
        DataError: one is longer than MAX_LINE characters.
    """
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise DataError(f"{name} has a line of more than {MAX_LINE >> 20} Mi characters: {EXPECTED}")
        yield line


def check_columns(
    columns: Any, name: str, needed: Sequence[str] = ("image", "label"), expected: str = EXPECTED
) -> None:
    missing = [column for column in needed if column not in columns]
    if missing:
        found = ", ".join(printable(str(column)) for column in columns) or "none"
        raise DataError(f"{name} has no column {' and no column '.join(missing)} (columns: {found}): {expected}")


def from_paths(table: Table, folder: Path) -> Dataset:
    """A Dataset of image files that a table names."""
    root = os.fspath(folder.absolute())
    aside: dict[int, str] = {}
    first: dict[str, int] = {}
    for row, path in enumerate(table.image):
        if not path:
            raise DataError(f"{table.name} {table.where[row]} names no image: fill it in or remove the line")
        if path in first:
            earlier = first[path]
            others = [column for column in (table.label, table.split) if column]
            if any(column[earlier] != column[row] for column in others):
                raise DataError(
                    f"{table.name} names {printable(path)} twice with different labels or splits "
                    f"({table.where[earlier]}, {table.where[row]}): keep one; write several labels as a|b"
                )
            aside[row] = f"named twice ({table.where[earlier]} and {table.where[row]})"
        elif not os.path.isfile(os.path.join(root, path)):
            aside[row] = "no such file"
        first.setdefault(path, row)
    if table.image and len(aside) == len(table.image):
        raise DataError(
            f"{table.name}: none of its {len(first)} images exist (the first would be "
            f"{printable(os.path.join(root, table.image[0]))}): paths are relative to the table's folder"
        )
    return assemble(table, [printable(path) for path in table.image], Files(root, table.image), aside)


def assemble(table: Table, ids: Sequence[str], source: Source, aside: dict[int, str]) -> Dataset:
    """Labels and splits of a table's rows, in the order of their ids."""
    if not ids:
        raise DataError(f"{table.name} has no rows: {EXPECTED}")
    names, task = read_labels(table) if table.label else ([[""]] * len(ids), "single-label")
    labels, classes = encode_labels(names, task)
    classes = classes if table.label else ()
    dataset = Dataset(table.name, unique(ids), labels, classes, task, read_splits(table), source)
    dataset = dataset.drop(aside)
    return dataset.subset(sorted(range(len(dataset)), key=dataset.ids.__getitem__))


def read_labels(table: Table) -> tuple[list[list[str]], Task]:
    several = any(not isinstance(label, str) or "|" in label for label in table.label)
    names = [
        [printable(name.strip()) for name in (label.split("|") if isinstance(label, str) else label) if name.strip()]
        for label in table.label
    ]
    if several:  # an image may have none of the labels
        if not any(names):
            raise DataError(f"{table.name}: no image has a label: {EXPECTED}, several labels as a|b")
        return names, "multi-label"
    for row, found in enumerate(names):
        if not found:
            raise DataError(f"{table.name} {table.where[row]} has an empty label: fill it in or remove the line")
    return names, "single-label"


def read_splits(table: Table) -> np.ndarray | None:
    if not any(table.split):
        return None
    for row, split in enumerate(table.split):
        if split.lower() not in SPLIT_NAMES:
            raise DataError(
                f"{table.name} {table.where[row]} has split '{printable(split)}': expected train, val or test"
            )
    return np.array([SPLIT_NAMES[split.lower()] for split in table.split])


def open_parquet(path: Path, *, labelled: bool = True) -> Dataset:
    """A Parquet file; the image column holds paths, encoded images, or {bytes, path} as Hugging Face writes it.

    Of a selection (`foveal.data.selection`) only the images that were kept are opened.

    Encoded images are copied once, row group by row group, to a temporary file that is gone when the program ends,
    since Parquet cannot hand out one row of its own. A column of paths may name any file, as in a CSV; the path of a
    {bytes, path} is whoever made the file's, and is followed only where it stays in the file's folder.

    Args:
        labelled: False opens a table without a label column, too; the Dataset then has no classes.

    Raises:
        DataError: as `open_csv`, and a file that is not Parquet or columns of other types.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = printable(path.name)
    with reading(name):
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        check_columns(schema.names, name, ("image", "label") if labelled else ("image",))
        kept = kept_rows(file)
        wanted = [column for column in ("label", "split") if column in schema.names]
        rest = file.read(columns=wanted).take(kept)
        table = Table(
            name,
            [],
            label_texts(rest["label"], class_names(schema, "label"), name) if "label" in wanted else [],
            ["" if value is None else str(value) for value in rest["split"].to_pylist()] if "split" in wanted else [],
            [f"row {row}" for row in kept.tolist()],
        )
        kind = schema.field("image").type
        of_paths = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if of_paths:
            table.image = [value or "" for value in file.read(columns=["image"])["image"].take(kept).to_pylist()]
    if of_paths:
        return from_paths(table, path.parent)
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)):
        raise DataError(f"{name}: column image has type {kind}, expected text (paths), bytes or {{bytes, path}}")
    wanted_rows = set(kept.tolist())
    images = (image for row, image in enumerate(images_of(file, name)) if row in wanted_rows)
    source, paths, aside = spill(images, len(kept), path.parent, name)
    return assemble(
        table, [given or f"{name}#{row:06d}" for row, given in zip(kept, paths, strict=True)], source, aside
    )


SELECTION = b"foveal.selection"
"""Key in the metadata of a Parquet file whose column `kept` says which of its images to use."""


def kept_rows(file: Any) -> np.ndarray:
    """Numbers of the rows to open: all, or of a selection those that were kept."""
    if SELECTION not in (file.schema_arrow.metadata or {}) or "kept" not in file.schema_arrow.names:
        return np.arange(file.metadata.num_rows)
    return np.flatnonzero(file.read(columns=["kept"])["kept"].to_numpy())


@contextmanager
def reading(name: str) -> Generator[None]:
    """
    Raises:
        DataError: pyarrow met damage.
    """
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise DataError(f"{name} cannot be read as Parquet ({str(error).splitlines()[0]})") from None


def class_names(schema: Any, column: str) -> list[str] | None:
    """The names that Hugging Face stores beside whole-number labels."""
    try:
        stored = json.loads((schema.metadata or {})[b"huggingface"])
        names = stored["info"]["features"][column]["names"]
        return [str(name) for name in names]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def label_texts(column: Any, names: list[str] | None, table: str) -> list[Sequence[str] | str]:
    """Label column (text, whole numbers, or lists of them) as text."""
    import pyarrow as pa

    kind = column.type
    inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    inner = inner.value_type if pa.types.is_dictionary(inner) else inner
    if not (pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_integer(inner)):
        raise DataError(f"{table}: column label has type {kind}, expected text, whole numbers or lists of them")

    def text(value: Any) -> str:
        if value is None:
            return ""
        if names is None or isinstance(value, str):
            return str(value).strip()
        return names[value] if 0 <= value < len(names) else ""

    return [[text(one) for one in value] if isinstance(value, list) else text(value) for value in column.to_pylist()]


def images_of(file: Any, name: str) -> Iterator[tuple[bytes | None, str | None]]:
    """(bytes, path) of every row's image, a few rows in memory at a time."""
    with reading(name):
        for batch in file.iter_batches(batch_size=64, columns=["image"]):
            for value in batch.column(0):
                image = value.as_py()
                if isinstance(image, dict):
                    yield image.get("bytes"), image.get("path")
                else:
                    yield image, None


@dataclass(frozen=True, eq=False)
class Spilled:
    """Images in one temporary file, or in the files they name: image i is `size[i]` bytes at `offset[i]`."""

    file: Any
    offset: np.ndarray
    size: np.ndarray
    elsewhere: dict[int, str]

    def read(self, index: int) -> bytes:
        if index in self.elsewhere:
            return Files("", [self.elsewhere[index]]).read(0)
        return os.pread(self.file.fileno(), int(self.size[index]), int(self.offset[index]))


def spill(
    images: Iterator[tuple[bytes | None, str | None]], count: int, folder: Path, name: str
) -> tuple[Spilled, list[str | None], dict[int, str]]:
    """Copy encoded images to a temporary file. Returns it, the path stored with each image, and rows to set aside."""
    offset, size = np.zeros(count, np.int64), np.zeros(count, np.int64)
    aside: dict[int, str] = {}
    elsewhere: dict[int, str] = {}
    paths: list[str | None] = []
    end = 0
    try:
        file = tempfile.TemporaryFile(prefix="foveal-")  # noqa: SIM115 (lives as long as the Dataset)
        for row, (data, path) in enumerate(images):
            paths.append(printable(path) if path else None)
            if data is None and path and not inside(os.path.join(folder, path), [folder]):
                aside[row] = "its path leads out of the folder of the table"
            elif data is None and path:
                elsewhere[row] = os.path.join(folder, path)
            elif data is None:
                aside[row] = "no image in this row"
            elif len(data) > MAX_BYTES:
                aside[row] = f"{len(data) >> 20} MiB: images up to {MAX_BYTES >> 20} MiB are read"
            else:
                file.write(data)
                offset[row], size[row] = end, len(data)
                end += len(data)
        file.flush()
    except OSError as error:
        raise DataError(
            f"cannot copy the images of {name} to {tempfile.gettempdir()} ({error.strerror}): free some space, "
            "or set TMPDIR to a folder that has it"
        ) from None
    if count and len(aside) == count:
        raise DataError(f"{name}: none of its {count} rows holds an image ({aside[0]})")
    return Spilled(file, offset, size, elsewhere), paths, aside
