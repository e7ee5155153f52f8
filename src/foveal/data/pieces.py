"""DATA of any size in pieces, one open at a time: what `foveal embed` streams through, and deals out to nodes.

A tar shard is a piece, and so are some row groups of a Parquet file with images inside; neither is opened before its
turn. Of folders and tables of paths the names are listed, and cut into pieces.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foveal.core.errors import DataError
from foveal.data.dataset import MAX_BYTES, Dataset, Files, Memory, Ranges, Source, printable, unique
from foveal.data.dataset import Rows as SourceRows
from foveal.data.open import open_pool
from foveal.data.shards import expand, index, label_of
from foveal.data.table import SELECTION, class_names, label_texts, spill


@dataclass(frozen=True, eq=False)
class Images:
    """Some images with what is known of them; labels as text, several separated by `|`, None where there is none."""

    ids: Sequence[str]
    labels: Sequence[str | None]
    splits: Sequence[str | None]
    source: Source
    set_aside: Sequence[tuple[str, str]] = ()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Listed:
    """Images that are listed already."""

    number: int
    images: Images

    @property
    def stamp(self) -> str:
        """Changes when other images or labels belong to this piece."""
        return digest([*self.images.ids, *self.images.labels, *self.images.splits])

    def open(self) -> Images:
        return self.images


@dataclass(frozen=True)
class Tar:
    """A WebDataset shard, indexed when it is opened."""

    number: int
    path: str
    prefix: str
    """Before every name, so that names of different shards differ."""

    @property
    def stamp(self) -> str:
        return digest([os.path.basename(self.path), os.path.getsize(self.path)])

    def open(self) -> Images:
        ids: list[str] = []
        places: list[tuple[int, int]] = []
        labels: list[str | None] = []
        aside: list[tuple[str, str]] = []
        for member in index(self.path).values():
            if member.image is None:
                continue
            name, offset, size = member.image
            if size > MAX_BYTES:
                aside.append((printable(self.prefix + name), "larger than is read"))
                continue
            ids.append(printable(self.prefix + name))
            places.append((offset, size))
            labels.append(joined(label_of(member.labels)))
        offsets, sizes = np.array(places, np.int64).reshape(-1, 2).T
        source = Ranges([self.path], np.zeros(len(ids), np.uint8), offsets, sizes)
        return Images(unique(ids), labels, [None] * len(ids), source, aside)


@dataclass(frozen=True)
class Groups:
    """Row groups `first` to `last` (not included) of a Parquet file with images inside; `row` is its first row."""

    number: int
    path: str
    first: int
    last: int
    row: int

    @property
    def stamp(self) -> str:
        return digest([os.path.basename(self.path), os.path.getsize(self.path), self.first, self.last])

    def open(self) -> Images:
        import pyarrow.parquet as pq

        path = Path(self.path)
        file, name = pq.ParquetFile(path), printable(path.name)
        schema, groups = file.schema_arrow, list(range(self.first, self.last))
        wanted = [column for column in ("label", "split") if column in schema.names]
        rest = file.read_row_groups(groups, columns=wanted)
        count = sum(file.metadata.row_group(group).num_rows for group in groups)
        texts = label_texts(rest["label"], class_names(schema, "label"), name) if "label" in wanted else [""] * count
        splits = rest["split"].to_pylist() if "split" in wanted else [None] * count
        source, paths, aside = spill(images_of(file, groups), count, path.parent, name)
        ids = unique([given or f"{name}#{self.row + row:06d}" for row, given in enumerate(paths)])
        kept = np.array([row for row in range(count) if row not in aside], np.int64)
        return Images(
            [ids[row] for row in kept],
            [joined(texts[row]) for row in kept],
            [splits[row] for row in kept],
            SourceRows.of(source, kept),
            [(ids[row], reason) for row, reason in aside.items()],
        )


Piece = Listed | Tar | Groups


@dataclass(frozen=True)
class Pieces:
    """DATA, cut. `images` is None where they are not counted before they are read."""

    name: str
    count: int
    images: int | None
    set_aside: Sequence[tuple[str, str]]
    cut: Iterator[Piece]


def in_pieces(data: str | Path | Dataset, rows: int, *, offline: bool = False) -> Pieces:
    """Cut DATA of any form into pieces of about `rows` images; a tar file is one piece whatever it holds.

    Beside the forms of `open_dataset`: images without labels, in a folder without folders, in tar files or Parquet.

    Raises:
        DataError: as `open_dataset`.
    """
    text = data.name if isinstance(data, Dataset) else os.path.expanduser(os.fspath(data))
    name = printable(os.path.basename(text.rstrip("/"))) or text
    if not isinstance(data, Dataset):
        if text.lower().endswith(".tar") and not os.path.isdir(text):
            return of_tars(name, text)
        if text.lower().endswith((".parquet", ".pq")) and os.path.isfile(text):
            groups = row_groups(text, rows)
            if groups is not None:
                images = groups[-1].row + groups_rows(text, groups[-1]) if groups else 0
                return Pieces(name, len(groups), images, (), iter(groups))
    dataset = open_pool(data, offline=offline)
    return of_listed(dataset.name, labelled(dataset), rows, dataset.set_aside)


def of_listed(name: str, images: Images, rows: int, aside: Sequence[tuple[str, str]]) -> Pieces:
    def cut() -> Iterator[Piece]:
        for number, start in enumerate(range(0, len(images), rows)):
            part = slice(start, start + rows)
            source = narrowed(images.source, np.arange(len(images))[part])
            yield Listed(number, Images(images.ids[part], images.labels[part], images.splits[part], source))

    return Pieces(name, -(-len(images) // rows), len(images), aside, cut())


def of_tars(name: str, pattern: str) -> Pieces:
    paths = [os.path.abspath(path) for path in expand(pattern)]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DataError(f"{printable(missing[0])} does not exist ({len(missing)} of {len(paths)} shards missing)")
    prefixes = [f"{os.path.basename(path)}/" if len(paths) > 1 else "" for path in paths]
    cut = (Tar(number, path, prefix) for number, (path, prefix) in enumerate(zip(paths, prefixes, strict=True)))
    return Pieces(name, len(paths), None, (), cut)


def row_groups(path: str, rows: int) -> list[Groups] | None:
    """Pieces of a Parquet file that holds encoded images; None for one of paths, a selection, or one not readable."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        kind = file.schema_arrow.field("image").type
    except (pa.ArrowException, OSError, KeyError):
        return None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or SELECTION in (file.schema_arrow.metadata or {}):
        return None
    pieces: list[Groups] = []
    first, row, held = 0, 0, 0
    for group in range(file.metadata.num_row_groups):
        held += file.metadata.row_group(group).num_rows
        if held >= rows or group == file.metadata.num_row_groups - 1:
            pieces.append(Groups(len(pieces), os.path.abspath(path), first, group + 1, row))
            first, row, held = group + 1, row + held, 0
    return pieces


def groups_rows(path: str, piece: Groups) -> int:
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path)
    return sum(metadata.row_group(group).num_rows for group in range(piece.first, piece.last))


def images_of(file: Any, groups: list[int]) -> Iterator[tuple[bytes | None, str | None]]:
    """(bytes, path) of the images of some row groups, a few rows in memory at a time."""
    for batch in file.iter_batches(batch_size=64, row_groups=groups, columns=["image"]):
        for value in batch.column(0):
            image = value.as_py()
            yield (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)


def labelled(dataset: Dataset) -> Images:
    """A Dataset's images with its labels as text."""
    if not dataset.classes:
        labels = [None] * len(dataset)
    elif dataset.task == "multi-label":
        labels = ["|".join(dataset.classes[c] for c in np.flatnonzero(row)) for row in dataset.labels]
    else:
        labels = [dataset.classes[label] for label in dataset.labels]
    splits = [None] * len(dataset) if dataset.splits is None else [str(split) for split in dataset.splits]
    return Images(dataset.ids, labels, splits, dataset.source)


def joined(label: Sequence[str] | str | None) -> str | None:
    return (label if isinstance(label, str) else "|".join(label)) or None if label is not None else None


def narrowed(source: Source, rows: np.ndarray) -> Source:
    """Some rows of a source that name nothing beyond them, so that a piece can be sent to another machine."""
    if isinstance(source, SourceRows):
        return narrowed(source.source, source.rows[rows])
    if isinstance(source, Files):
        return Files(source.root, [source.paths[int(row)] for row in rows])
    if isinstance(source, Memory):
        return Memory([source.images[row] for row in rows])
    return SourceRows.of(source, rows)


def digest(parts: Sequence[Any]) -> str:
    return hashlib.blake2b(repr(parts).encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()
