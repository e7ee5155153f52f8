"""CSV and Parquet tables of images with named points: image, x1,y1,...,xK,yK or NAME_x,NAME_y.

Optional columns: v1..vK or NAME_v (0: not labelled), split, and flip, in every row the same list of numbers: which
point each becomes when left and right are swapped ("2 1 3"). Without it, names that say left and right tell.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveal.core.errors import DataError
from foveal.data.dataset import Dataset, Files, Memory, Source, printable, unique
from foveal.data.scan import SCAN, scan
from foveal.data.split import Stock
from foveal.data.table import Table, bounded, images_of, read_splits, reading, spill

EXPECTED = "expected columns image and x1,y1,x2,y2,... or NAME_x,NAME_y, and if you like v1,... or NAME_v, split, flip"
WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True, eq=False)
class Points:
    """Images with points.

    Attributes:
        images: a Dataset without classes.
        xy: float64 [n, K, 2]; the centre of the pixel in column i and row j is (i, j), the image upright.
        known: bool [n, K]; a point that is not labelled has (0, 0).
        names: of the K points.
        flip: point k of a mirrored image is point flip[k] of the image; None when the data do not say.
    """

    images: Dataset
    xy: np.ndarray
    known: np.ndarray
    names: tuple[str, ...]
    flip: tuple[int, ...] | None

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, rows: np.ndarray) -> Points:
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return replace(self, images=self.images.subset(rows), xy=self.xy[rows], known=self.known[rows])

    def drop(self, reasons: Mapping[int, str]) -> Points:
        """Set the images at these rows aside, each for its reason."""
        kept = np.ones(len(self), bool)
        kept[list(reasons)] = False
        return replace(self, images=self.images.drop(reasons), xy=self.xy[kept], known=self.known[kept])


def open_points(data: str | Path) -> Points:
    """Open a table of images with points. Nothing is decoded.

    Raises:
        DataError: not a table, no such columns, coordinates that are no finite numbers, points without their images.
    """
    path = Path(os.path.expanduser(os.fspath(data)))
    name = printable(path.name)
    if not path.is_file():
        raise DataError(f"{printable(str(data))} is not a file: landmarks come as a .csv or .parquet table, {EXPECTED}")
    if path.suffix.lower() in (".parquet", ".pq"):
        columns, source, images, aside = parquet_columns(path, name)
    elif path.suffix.lower() == ".csv":
        columns = csv_columns(path, name)
        images = [str(value) for value in pick(columns, "image", name)]
        source, aside = file_source(path.parent, images, name)
    else:
        raise DataError(f"{name} is neither .csv nor .parquet: {EXPECTED}")
    found = pairs(columns, name)
    shape = (len(images), len(found))
    xy, known = np.zeros((*shape, 2)), np.ones(shape, bool)
    for k, (point, across, down, seen) in enumerate(found):
        if seen is not None:
            known[:, k] = numbers(columns[seen], seen, name) > 0
        for axis, column in enumerate((across, down)):
            values = numbers(columns[column], column, name)
            bad = np.flatnonzero(~np.isfinite(values) & known[:, k])
            if len(bad):
                raise DataError(
                    f"{name} row {int(bad[0]) + 1}: {column} is {columns[column][int(bad[0])]!r}, expected a number: a "
                    f"point that is not labelled needs 0 in a column {'v1' if point.isdigit() else point + '_v'}"
                )
            xy[:, k, axis] = np.where(known[:, k], values, 0)
    names = tuple(point for point, *_ in found)
    splits = [str(value or "") for value in columns["split"]] if "split" in columns else []
    table = Table(name, images, [""] * len(images), splits, [f"row {row + 1}" for row in range(len(images))])
    dataset = Dataset(
        name, unique([printable(image) for image in images]), np.zeros(len(images), np.int64), (), "single-label",
        read_splits(table), source,
    )  # fmt: skip
    aside |= {int(row): "no point is labelled" for row in np.flatnonzero(~known.any(1)) if int(row) not in aside}
    if len(aside) == len(images):
        first = next(iter(aside.items()))
        raise DataError(f"{name}: none of its {len(images)} images can be used ({dataset.ids[first[0]]}: {first[1]})")
    return Points(dataset, xy, known, names, flip_of(columns, names, name)).drop(aside)


def csv_columns(path: Path, name: str, expected: str = EXPECTED) -> dict[str, list[Any]]:
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = bounded(file, name)
            header = next(lines, "")
            delimiter = max(",;\t", key=header.count)
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            heads = [head.strip().strip('"').lower() for head in header.strip().split(delimiter)]
            columns: dict[str, list[Any]] = {head: [] for head in heads}
            for row in filter(None, rows):
                if len(row) != len(heads):
                    raise DataError(f"{name} line {rows.line_num + 1} has {len(row)} fields, expected {len(heads)}")
                for head, value in zip(heads, row, strict=True):
                    columns[head].append(value.strip())
    except csv.Error as error:
        raise DataError(f"{name} is not a CSV file ({error}): {expected}") from None
    except OSError as error:
        raise DataError(f"{name} cannot be read ({error.strerror})") from None
    return columns


def parquet_columns(path: Path, name: str) -> tuple[dict[str, list[Any]], Source, list[str], dict[int, str]]:
    """Columns by lower-case name, where the images are, their names, and rows to set aside."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(name):
        file = pq.ParquetFile(path)
        heads = [head for head in file.schema_arrow.names if head.lower() != "image"]
        columns = {head.lower(): file.read(columns=[head])[head].to_pylist() for head in heads}
        if "image" not in file.schema_arrow.names:
            raise DataError(f"{name} has no column image (columns: {', '.join(heads)}): {EXPECTED}")
        kind = file.schema_arrow.field("image").type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            images = [value or "" for value in file.read(columns=["image"])["image"].to_pylist()]
            source, aside = file_source(path.parent, images, name)
            return columns, source, images, aside
        count = file.metadata.num_rows
    source, paths, aside = spill(images_of(file, name), count, path.parent, name)
    return columns, source, [given or f"{name}#{row:06d}" for row, given in enumerate(paths)], aside


def file_source(folder: Path, images: Sequence[str], name: str) -> tuple[Files, dict[int, str]]:
    root = os.fspath(folder.absolute())
    aside = {
        row: "no such file"
        for row, image in enumerate(images)
        if not image or not os.path.isfile(os.path.join(root, image))
    }
    if not images:
        raise DataError(f"{name} has no rows: {EXPECTED}")
    if len(aside) == len(images):
        raise DataError(
            f"{name}: none of its {len(images)} images exist (the first would be "
            f"{printable(os.path.join(root, images[0]))}): paths are relative to the table's folder"
        )
    return Files(root, images), aside


def pick(columns: Mapping[str, list[Any]], column: str, name: str) -> list[Any]:
    if column not in columns:
        heads = ", ".join(map(printable, columns)) or "none"
        raise DataError(f"{name} has no column {column} (columns: {heads}): {EXPECTED}")
    return columns[column]


def pairs(columns: Mapping[str, list[Any]], name: str) -> list[tuple[str, str, str, str | None]]:
    """(point, column of x, column of y, column that says whether it is labelled) of every point, in column order."""
    found: list[tuple[str, str, str, str | None]] = []
    for column in columns:
        numbered, named = re.fullmatch(r"x_?(\d+)", column), re.fullmatch(r"(.+)_x", column)
        if not (numbered or named):
            continue
        down = "y" + column[1:] if numbered else column[:-1] + "y"
        if down not in columns:
            raise DataError(f"{name} has a column {printable(column)} but no {printable(down)}: {EXPECTED}")
        seen = ["v" + column[1:]] if numbered else [column[:-1] + "v", column[:-1] + "visible"]
        point = numbered[1] if numbered else column[:-2]
        found.append((printable(point), column, down, next((each for each in seen if each in columns), None)))
    if not found:
        heads = ", ".join(map(printable, columns)) or "none"
        raise DataError(f"{name} has no points (columns: {heads}): {EXPECTED}")
    return found


def numbers(values: Sequence[Any], column: str, name: str) -> np.ndarray:
    """float64; an empty cell is NaN."""
    found = np.full(len(values), np.nan)
    for row, value in enumerate(values):
        try:
            found[row] = float(value) if value not in ("", None) else np.nan
        except (TypeError, ValueError):
            raise DataError(
                f"{name} row {row + 1}: {printable(column)} is {printable(repr(value))}, expected a number"
            ) from None
    return found


def flip_of(columns: Mapping[str, list[Any]], names: Sequence[str], name: str) -> tuple[int, ...] | None:
    """Which point each becomes in a mirror, from the column flip or from names that say left and right."""
    if "flip" in columns:
        texts = {str(value or "").strip(" []()") for value in columns["flip"]}
        if len(texts) > 1:
            raise DataError(f"{name}: flip differs between rows ({', '.join(sorted(texts)[:2])}): expected one list")
        found = [int(part) - 1 for part in re.findall(r"\d+", texts.pop())]
        if sorted(found) != list(range(len(names))) or any(found[found[k]] != k for k in range(len(names))):
            raise DataError(
                f"{name}: flip is {[k + 1 for k in found]}, expected the numbers 1 to {len(names)}, each point swapped "
                "with its mirror twin or with itself"
            )
        return tuple(found)
    twins = [re.sub("left|right", lambda side: "right" if side[0] == "left" else "left", each) for each in names]
    if list(names) == twins or not set(twins) <= set(names):
        return None
    return tuple(names.index(twin) for twin in twins)


def survey(points: Points) -> tuple[Points, np.ndarray]:
    """Decode every image once: images that cannot be read, or show none of their points, are set aside.

    Returns:
        What can be used, and the `foveal.data.scan` record of each image.

    Raises:
        DataError: points given as (row, column), or no image that can be used.
    """
    records, aside = np.zeros(len(points), SCAN), {}

    def look(row: int) -> str:
        try:
            records[row] = scan(points.images.image(row))
        except DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(WORKERS) as pool:
        aside = {row: reason for row, reason in enumerate(pool.map(look, range(len(points)))) if reason}
    sizes = np.stack([records["width"], records["height"]], -1).astype(float)
    check_order(points, sizes, np.isin(np.arange(len(points)), list(aside), invert=True))
    inside = (points.known & contained(points.xy, sizes)).any(1)
    for row in np.flatnonzero(~inside).tolist():
        aside.setdefault(row, "every point lies outside of the image")
    if len(aside) == len(points):
        first = next(iter(sorted(aside.items())))
        raise DataError(
            f"{points.images.name}: none of its {len(points)} images can be used ({points.images.ids[first[0]]}: "
            f"{first[1]}): points are in pixels of the image, (0, 0) the centre of its top left one"
        )
    kept = np.setdiff1d(np.arange(len(points)), list(aside))
    return points.drop(aside), records[kept]


def contained(xy: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Whether points [n, K, 2] lie in images of sizes [n, 2] (width, height)."""
    return np.all((xy >= -0.5) & (xy <= sizes[:, None] - 0.5), axis=-1)


def check_order(points: Points, sizes: np.ndarray, read: np.ndarray) -> None:
    """
    Raises:
        DataError: points lie outside of their images, and inside once x and y change places.
    """
    as_given = contained(points.xy, sizes) | ~points.known
    swapped = contained(points.xy[..., ::-1], sizes) | ~points.known
    wrong = read & ~as_given.all(1)
    if wrong.any() and (swapped | ~wrong[:, None]).all() and wrong.sum() >= 0.1 * read.sum():
        row = int(np.flatnonzero(wrong)[0])
        k = int(np.flatnonzero(~as_given[row])[0])
        x, y = points.xy[row, k]
        raise DataError(
            f"{points.images.name}: point {points.names[k]} of {points.images.ids[row]} is at x={x:g}, y={y:g}, "
            f"outside of its {sizes[row, 0]:.0f} x {sizes[row, 1]:.0f} pixels (width x height), and so in "
            f"{int(wrong.sum())} images, but all fit as (row, column): swap the columns, x counts columns from the left"
        )


def in_memory(
    images: np.ndarray, xy: np.ndarray, names: Sequence[str] = (), flip: tuple[int, ...] | None = None
) -> Points:
    """Images uint8 [n, H, W, 3] and their points [n, K, 2], all labelled, as `open_points` would give them."""
    encoded: list[bytes] = []
    for pixels in images:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        encoded.append(file.getvalue())
    ids = [f"image-{row:05d}" for row in range(len(images))]
    dataset = Dataset("memory", ids, np.zeros(len(ids), np.int64), (), "single-label", None, Memory(encoded))
    named = tuple(names) or tuple(str(k + 1) for k in range(xy.shape[1]))
    return Points(dataset, xy.astype(np.float64), np.ones(xy.shape[:2], bool), named, flip)


def split_points(points: Points, groups: np.ndarray, seed: int) -> np.ndarray:
    """'train', 'val' or 'test' for each image.

    Splits that the data came with are kept; without 'test', 'val' is what is measured. Data without any are split by
    `seed`, 7 to 1 to 2; images of one group stay on one side.

    Raises:
        DataError: too few images, or a given split that leaves none to learn from.
    """
    given = points.images.splits
    if given is not None and np.isin(given, ["test", "val"]).any():
        splits = given.copy()
        if not (splits == "test").any():
            splits[splits == "val"] = "test"
        if not (splits == "train").any():
            raise DataError(f"{points.images.name} has no images in 'train': expected a train split beside the others")
        return splits
    distinct = len(np.unique(groups))
    if distinct < 5:
        raise DataError(
            f"{points.images.name} has {distinct} distinct images (near-duplicates count once), expected 5 at least "
            "to learn from and to measure on: add images, or a column split"
        )
    stock = Stock.of(np.zeros(len(points), np.int64), groups, None)
    return np.array(["train", "val", "test"])[stock.share(np.array([0.7, 0.1, 0.2]), seed)[stock.group_of]]
