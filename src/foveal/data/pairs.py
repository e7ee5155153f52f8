"""Images and the texts that describe them: CSV and Parquet tables with columns image,text[,split].

An image may come in several rows with a text each; `|` is not special. All texts of an image are its own.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foveal.core.errors import DataError
from foveal.core.threads import cpu_threads
from foveal.data.dataset import Dataset, Files, Source, printable, unique
from foveal.data.scan import SCAN, scan
from foveal.data.split import Stock
from foveal.data.table import Table, bounded, images_of, read_splits, reading, spill

EXPECTED = "expected columns image,text and, if you like, split"
SHARES = (0.7, 0.1, 0.2)
"""To learn from, to watch, to measure on."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Images with texts.

    Attributes:
        images: a Dataset without classes.
        texts: of each image, one or more.
    """

    images: Dataset
    texts: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, rows: np.ndarray) -> Pairs:
        """The images at these rows (integers or a mask), in that order."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return Pairs(self.images.subset(rows), tuple(self.texts[int(row)] for row in rows))

    def drop(self, reasons: Mapping[int, str]) -> Pairs:
        """Set the images at these rows aside, each for its reason."""
        kept = tuple(texts for row, texts in enumerate(self.texts) if row not in reasons)
        return Pairs(self.images.drop(reasons), kept)


def open_pairs(data: str | Path | Pairs) -> Pairs:
    """Open a table of images with texts. Nothing is decoded.

    Raises:
        DataError: not a table, no such columns, an empty text, one image in two splits, no image that exists.
    """
    if isinstance(data, Pairs):
        return data
    path = Path(os.path.expanduser(os.fspath(data)))
    name = printable(path.name)
    if not path.is_file():
        raise DataError(f"{printable(str(data))} is not a file: pairs come as a .csv or .parquet table, {EXPECTED}")
    if path.suffix.lower() == ".csv":
        return collect(read_csv(path, name), path.parent)
    if path.suffix.lower() in (".parquet", ".pq"):
        return read_parquet(path, name)
    raise DataError(f"{name} is neither .csv nor .parquet: {EXPECTED}")


def read_csv(path: Path, name: str) -> Table:
    """A Table whose labels are texts."""
    table = Table(name, [], [], [], [])
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = bounded(file, name)
            header = next(lines, "")
            delimiter = max(",;\t", key=header.count)
            heads = [head.strip().strip('"').lower() for head in header.split(delimiter)]
            check_columns(heads, name)
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            for row in filter(None, reader):
                where = f"line {reader.line_num + 1}"
                if len(row) != len(heads):
                    raise DataError(
                        f"{name} {where} has {len(row)} fields, expected {len(heads)}: put quotes around a text with "
                        f"a '{delimiter}'"
                    )
                cells = dict(zip(heads, row, strict=True))
                table.image.append(cells["image"].strip())
                table.label.append(cells["text"].strip())
                table.split += [cells["split"].strip()] if "split" in cells else []
                table.where.append(where)
    except csv.Error as error:
        raise DataError(f"{name} is not a CSV file ({error}): {EXPECTED}") from None
    except OSError as error:
        raise DataError(f"{name} cannot be read ({error.strerror})") from None
    return table


def read_parquet(path: Path, name: str) -> Pairs:
    """The image column holds paths, encoded images, or {bytes, path} as Hugging Face writes it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(name):
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        check_columns(schema.names, name)
        rest = file.read(columns=[column for column in ("text", "split") if column in schema.names])
        count = rest.num_rows
        texts = rest["text"].to_pylist()
        split = rest["split"].to_pylist() if "split" in rest.column_names else []
        splits = ["" if value is None else str(value) for value in split]
        table = Table(name, [], [str(text or "").strip() for text in texts], splits, [f"row {n}" for n in range(count)])
        kind = schema.field("image").type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            table.image = [value or "" for value in file.read(columns=["image"])["image"].to_pylist()]
            return collect(table, path.parent)
    source, paths, aside = spill(images_of(file, name), count, path.parent, name)
    table.image = [given or f"{name}#{row:06d}" for row, given in enumerate(paths)]
    return gathered(table, np.arange(count), [[row] for row in range(count)], source, aside)


def check_columns(heads: list[str], name: str) -> None:
    missing = [column for column in ("image", "text") if column not in heads]
    if missing:
        found = ", ".join(printable(head) for head in heads) or "none"
        raise DataError(f"{name} has no column {' and no column '.join(missing)} (columns: {found}): {EXPECTED}")


def collect(table: Table, folder: Path) -> Pairs:
    """Rows that name image files; those of one image become one."""
    if not table.image:
        raise DataError(f"{table.name} has no rows: {EXPECTED}")
    root = os.fspath(folder.absolute())
    rows: dict[str, list[int]] = {}
    for row, path in enumerate(table.image):
        if not path:
            raise DataError(f"{table.name} {table.where[row]} names no image: fill it in or remove the line")
        rows.setdefault(path, []).append(row)
    firsts = np.array([own[0] for own in rows.values()])
    aside = {place: "no such file" for place, path in enumerate(rows) if not os.path.isfile(os.path.join(root, path))}
    if len(aside) == len(rows):
        raise DataError(
            f"{table.name}: none of its {len(rows)} images exist (the first would be "
            f"{printable(os.path.join(root, next(iter(rows))))}): paths are relative to the table's folder"
        )
    return gathered(table, firsts, list(rows.values()), Files(root, list(rows)), aside)


def gathered(table: Table, firsts: np.ndarray, rows: list[list[int]], source: Source, aside: dict[int, str]) -> Pairs:
    """Images (the row each is first named in, all rows of each) with their texts and splits."""
    for row, text in enumerate(table.label):
        if not text:
            raise DataError(f"{table.name} {table.where[row]} has an empty text: fill it in or remove the line")
    splits = read_splits(table)
    if splits is not None:
        for own in rows:
            if len({str(splits[row]) for row in own}) > 1:
                raise DataError(
                    f"{table.name} has {printable(table.image[own[0]])} in two splits ({table.where[own[0]]}, "
                    f"{table.where[own[-1]]}): an image belongs to one"
                )
    ids = unique([printable(table.image[int(row)]) for row in firsts])
    images = Dataset(
        table.name, ids, np.zeros(len(ids), np.int64), (), "single-label",
        None if splits is None else splits[firsts], source,
    )  # fmt: skip
    texts = tuple(tuple(dict.fromkeys(printable(str(table.label[row])) for row in own)) for own in rows)
    return Pairs(images, texts).drop(aside)


def survey(pairs: Pairs) -> tuple[Pairs, np.ndarray]:
    """Decode every image once; those that cannot be read are set aside.

    Returns:
        What can be used, and the `foveal.data.scan` record of each image.

    Raises:
        DataError: no image can be read.
    """
    records = np.zeros(len(pairs), SCAN)

    def look(row: int) -> str:
        try:
            records[row] = scan(pairs.images.image(row))
        except DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(cpu_threads()) as pool:
        aside = {row: reason for row, reason in enumerate(pool.map(look, range(len(pairs)))) if reason}
    if len(aside) == len(pairs):
        first = next(iter(aside))
        raise DataError(
            f"{pairs.images.name}: none of its {len(pairs)} images can be read ({pairs.images.ids[first]}: "
            f"{aside[first]})"
        )
    return pairs.drop(aside), records[np.setdiff1d(np.arange(len(pairs)), list(aside))]


def split_pairs(pairs: Pairs, groups: np.ndarray, seed: int) -> np.ndarray:
    """'train', 'val' or 'test' for each image.

    Splits that the data came with are kept; without 'test', 'val' is what is measured. Data without any are split by
    `seed`; images of one group stay on one side.

    Raises:
        DataError: too few images, or a given split that leaves none to learn from.
    """
    given = pairs.images.splits
    if given is not None and np.isin(given, ["test", "val"]).any():
        splits = given.copy()
        if not (splits == "test").any():
            splits[splits == "val"] = "test"
        if (splits == "train").sum() < 2:
            raise DataError(f"{pairs.images.name} has fewer than 2 images in 'train': one pair has no negatives")
        return splits
    distinct = len(np.unique(groups))
    if distinct < 10:
        raise DataError(
            f"{pairs.images.name} has {distinct} distinct images (near-duplicates count once), expected 10 at least "
            "to learn from and to measure on: add images, or a column split"
        )
    stock = Stock.of(np.zeros(len(pairs), np.int64), groups, None)
    return np.array(["train", "val", "test"])[stock.share(np.array(SHARES), seed)[stock.group_of]]
