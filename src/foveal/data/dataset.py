"""One Dataset for every form of DATA: names, labels and a way to read image i. No image is held in memory."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from foveal.core.errors import DataError
from foveal.data.images import decode

if TYPE_CHECKING:
    from PIL import Image

    from foveal.core.method import Task

MAX_BYTES = 512 * 2**20
"""No image file larger than this is read."""

SPLITS = ("train", "val", "test")


class Source(Protocol):
    """Where the bytes of image `index` come from. Safe to call from several threads."""

    def read(self, index: int) -> bytes: ...


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images.

    Attributes:
        ids: unique, stable, printable names, in sorted order when made by `open_dataset`.
        labels: int64 [n] indices into `classes`, or uint8 [n, C] zeros and ones for the multi-label task.
        classes: names, sorted.
        splits: 'train', 'val' or 'test' per image where the data say so, else None.
        set_aside: (id, reason) of images that cannot be used.
        ignored: number of files met that are not images.

    Raises:
        DataError: ids, labels and splits do not fit together.
    """

    name: str
    ids: Sequence[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    task: Task
    splits: np.ndarray | None
    source: Source
    set_aside: tuple[tuple[str, str], ...] = ()
    ignored: int = 0

    def __post_init__(self) -> None:
        n = len(self.ids)
        shape = (n,) if self.task == "single-label" else (n, len(self.classes))
        if self.labels.shape != shape:
            raise DataError(f"{self.name}: labels have shape {self.labels.shape}, expected {shape} ({self.task})")
        if self.splits is not None and len(self.splits) != n:
            raise DataError(f"{self.name}: {len(self.splits)} splits for {n} images: expected one each")

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> bytes:
        """The bytes of the image file.

        Raises:
            DataError: it cannot be read (any more).
        """
        return self.source.read(index)

    def image(self, index: int) -> Image.Image:
        """The decoded image: upright RGB.

        Raises:
            DataError: it cannot be read or decoded.
        """
        return decode(self.read(index))

    def subset(self, indices: Sequence[int] | np.ndarray) -> Dataset:
        """The images at `indices` (integers or a mask), in that order."""
        rows = np.asarray(indices)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        return replace(
            self,
            ids=[self.ids[row] for row in rows.tolist()],
            labels=self.labels[rows],
            splits=None if self.splits is None else self.splits[rows],
            source=Rows.of(self.source, rows),
        )

    def drop(self, reasons: Mapping[int, str]) -> Dataset:
        """Set the images at these indices aside, each for its reason."""
        kept = np.ones(len(self), dtype=bool)
        kept[list(reasons)] = False
        aside = tuple((self.ids[index], reasons[index]) for index in sorted(reasons))
        return replace(self.subset(kept), set_aside=self.set_aside + aside)


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of another source."""

    source: Source
    rows: np.ndarray

    @staticmethod
    def of(source: Source, rows: np.ndarray) -> Rows:
        return Rows(source.source, source.rows[rows]) if isinstance(source, Rows) else Rows(source, rows)

    def read(self, index: int) -> bytes:
        return self.source.read(int(self.rows[index]))


@dataclass(frozen=True, eq=False)
class Files:
    """Image files by path, relative to `root`."""

    root: str
    paths: Sequence[str]

    def read(self, index: int) -> bytes:
        return read_file(os.path.join(self.root, self.paths[index]))


@dataclass(frozen=True, eq=False)
class Memory:
    """Images held as encoded bytes; for small samples only."""

    images: Sequence[bytes]

    def read(self, index: int) -> bytes:
        return self.images[index]


@dataclass(frozen=True, eq=False)
class Ranges:
    """Images as byte ranges of a few big files: image i is `size[i]` bytes at `offset[i]` of `files[file[i]]`."""

    files: Sequence[str]
    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    def read(self, index: int) -> bytes:
        path, size = self.files[int(self.file[index])], int(self.size[index])
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = os.pread(handle, size, int(self.offset[index]))
            finally:
                os.close(handle)
        except OSError as error:
            raise DataError(f"{printable(path)} cannot be read ({error.strerror})") from None
        if len(data) != size:
            raise DataError(f"{printable(path)} is shorter than when it was opened: {len(data)} of {size} bytes")
        return data


def read_file(path: str) -> bytes:
    """The whole of a regular file of at most MAX_BYTES.

    Raises:
        DataError: missing, unreadable, not a regular file, too large.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(handle, "rb", buffering=0) as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise DataError("not a regular file")
            if status.st_size > MAX_BYTES:
                raise DataError(f"{status.st_size >> 20} MiB: files up to {MAX_BYTES >> 20} MiB are read")
            return file.readall()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from None


def inside(path: str, folders: Sequence[str | os.PathLike[str]]) -> bool:
    """Whether a path, links followed, lies in one of these folders."""
    try:
        real = os.path.realpath(path)
        return any(
            os.path.commonpath([real, root]) == root for root in (os.path.realpath(os.fspath(each)) for each in folders)
        )
    except ValueError:  # a path with a zero byte, or on another drive
        return False


UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(name: str) -> str:
    r"""A file name that can be printed and stored: a byte 0xff that is not UTF-8 becomes `\udcff`, a line end `\n`."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), name)


def unique(names: Sequence[str]) -> list[str]:
    """The same names, the second and later of equal ones with `#2`, `#3`."""
    if len(set(names)) == len(names):
        return list(names)
    taken, counts = set(names), dict.fromkeys(names, 0)
    result: list[str] = []
    for name in names:
        counts[name] += 1
        candidate = name
        while counts[name] > 1 and candidate in taken:
            candidate = f"{name}#{counts[name]}"
            counts[name] += candidate in taken
        taken.add(candidate)
        result.append(candidate)
    return result


def encode_labels(labels: Sequence[Sequence[str]], task: Task) -> tuple[np.ndarray, tuple[str, ...]]:
    """Label names of each image -> (labels, sorted class names); see `Dataset`."""
    classes = tuple(sorted({name for names in labels for name in names}))
    index = {name: position for position, name in enumerate(classes)}
    if task == "single-label":
        return np.fromiter((index[names[0]] for names in labels), np.int64, len(labels)), classes
    encoded = np.zeros((len(labels), len(classes)), np.uint8)
    for row, names in enumerate(labels):
        encoded[row, [index[name] for name in names]] = 1
    return encoded, classes
