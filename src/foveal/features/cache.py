"""Rows of numbers by key, on disk: what a frozen backbone said of an image, kept for every later run.

A store is a folder of shards, each written whole under a temporary name and then renamed; nothing is ever changed
in place. So any number of processes may write at once, and one killed at any moment leaves only whole shards (and
at most one stray temporary file, removed later). Rows are read by position (pread) instead of through a memory
map: mapped pages count as resident memory, and a file cut short under a map kills the process.
"""

from __future__ import annotations

import os
import struct
import time
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from foveal.core.folders import atomic_file, cache_root

__all__ = ["KEY", "RowStore", "cache_root"]

KEY = 16
"""Bytes in a key."""
HEADER = struct.Struct("<8sQQI4x")
"""Magic and version, rows, bytes per row, CRC-32 of all that follows."""
MAGIC = b"foveal\x00\x01"
MERGE_ABOVE = 16
"""Shards a folder may have before `compact` merges them."""
STALE = 3600.0
"""Age in seconds after which a temporary file is taken for a killed writer's."""
CHUNK = 1 << 20


@dataclass(frozen=True)
class Shard:
    """An open, verified shard: `count` keys, then `count` rows."""

    path: Path
    handle: int
    count: int
    first: int
    """Number of its first row within the store."""

    @property
    def rows_at(self) -> int:
        return HEADER.size + self.count * KEY


class RowStore:
    """An append-only table on disk: key of 16 bytes -> row of one dtype and shape.

    Args:
        folder: made when missing. Give every backbone its own.
        dtype, shape: of one row. Shards of another row size are ignored.
    """

    def __init__(self, folder: str | Path, dtype: DTypeLike, shape: tuple[int, ...] = ()) -> None:
        self.folder = Path(folder)
        self.dtype = np.dtype(dtype)
        self.shape = shape
        self.row_bytes = self.dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        self._shards: list[Shard] = []
        self._known: set[str] = set()
        self._keys = np.empty((0, 2), np.uint64)
        self._order = np.empty(0, np.int64)
        self._sorted = np.empty(0, np.uint64)
        self._clean()
        self.refresh()

    def __len__(self) -> int:
        """Rows on disk that this process knows of, repeated keys included."""
        return len(self._keys)

    def __del__(self) -> None:
        for shard in getattr(self, "_shards", ()):
            os.close(shard.handle)

    def refresh(self) -> None:
        """Take in the shards that other processes have written since."""
        try:
            names = sorted(entry.name for entry in os.scandir(self.folder) if entry.name.endswith(".rows"))
        except FileNotFoundError:
            return
        found = [keys for name in names if name not in self._known for keys in self._open(self.folder / name)]
        if found:
            self._index(np.concatenate([self._keys, *found]))

    def get(self, keys: Sequence[bytes] | NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Keys [n] -> (found [n], where [n]); `where` goes to `read`, -1 where nothing is stored."""
        wanted = as_numbers(keys)
        where = np.full(len(wanted), -1, np.int64)
        if len(self._sorted) and len(wanted):
            place = np.searchsorted(self._sorted, wanted[:, 0])
            place[place == len(self._sorted)] = 0
            row = self._order[place]
            hit = (self._keys[row] == wanted).all(1)
            where[hit] = row[hit]
        return where >= 0, where

    def read(self, where: NDArray[np.int64]) -> NDArray[Any]:
        """Row numbers [m] from `get` -> rows [m, *shape].

        Raises:
            IndexError: a number that `get` did not give.
        """
        where = np.asarray(where, np.int64)
        if len(where) and (where.min() < 0 or where.max() >= len(self._keys)):
            raise IndexError(f"rows are 0 to {len(self._keys) - 1}, got {where.min()} to {where.max()}")
        out = np.empty((len(where), self.row_bytes), np.uint8)
        shard_of = np.searchsorted([shard.first for shard in self._shards], where, side="right") - 1
        breaks = np.flatnonzero((np.diff(where) != 1) | (np.diff(shard_of) != 0)) + 1
        for start, stop in zip([0, *breaks], [*breaks, len(where)], strict=True):
            if start == stop:
                continue
            shard = self._shards[shard_of[start]]
            offset = shard.rows_at + (int(where[start]) - shard.first) * self.row_bytes
            read_into(shard.handle, out[start:stop].data.cast("B"), offset)
        return out.view(self.dtype).reshape(len(where), *self.shape)

    def append(self, keys: Sequence[bytes] | NDArray[np.uint8], rows: NDArray[Any]) -> None:
        """Write rows [n, *shape] under their keys as one shard; they are on disk when this returns.

        Raises:
            FovealError: the device is full or the folder cannot be written.
            ValueError: rows of another shape.
        """
        numbers = as_numbers(keys)
        rows = np.ascontiguousarray(rows, self.dtype)
        if rows.shape != (len(numbers), *self.shape):
            raise ValueError(f"rows have shape {rows.shape}, expected {(len(numbers), *self.shape)}")
        if not len(numbers):
            return
        path = self.folder / f"{uuid.uuid4().hex}.rows"
        body = (numbers.data.cast("B"), rows.view(np.uint8).reshape(-1).data)
        checksum = zlib.crc32(body[1], zlib.crc32(body[0]))
        with atomic_file(path) as staging, staging.open("wb") as file:
            file.write(HEADER.pack(MAGIC, len(numbers), self.row_bytes, checksum))
            file.writelines(body)
        for found in self._open(path, checked=True):
            self._index(np.concatenate([self._keys, found]))

    def compact(self) -> None:
        """Merge shards when there are many; rows stay readable under their numbers in this and other processes."""
        if len(self._shards) <= MERGE_ABOVE:
            return
        old = list(self._shards)
        keep = np.sort(np.unique(self._keys.view([("a", "<u8"), ("b", "<u8")]).reshape(-1), return_index=True)[1])
        numbers = np.ascontiguousarray(self._keys[keep])
        batches = [keep[at : at + 1024] for at in range(0, len(keep), 1024)]
        path = self.folder / f"{uuid.uuid4().hex}.rows"
        with atomic_file(path) as staging, staging.open("wb") as file:
            file.write(b"\x00" * HEADER.size)
            file.write(numbers.data.cast("B"))
            checksum = zlib.crc32(numbers.data.cast("B"))
            for batch in batches:
                rows = self.read(batch).view(np.uint8).reshape(-1).data
                checksum = zlib.crc32(rows, checksum)
                file.write(rows)
            file.seek(0)
            file.write(HEADER.pack(MAGIC, len(numbers), self.row_bytes, checksum))
        self._known.add(path.name)  # this process goes on reading the old shards, which it holds open
        for shard in old:
            shard.path.unlink(missing_ok=True)

    def _clean(self) -> None:
        try:
            entries = list(os.scandir(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            if not entry.name.endswith(".tmp"):
                continue
            try:
                if time.time() - entry.stat().st_mtime > STALE:
                    os.unlink(entry.path)
            except FileNotFoundError:
                continue

    def _open(self, path: Path, checked: bool = False) -> list[NDArray[np.uint64]]:
        """Register a shard and give its keys; a damaged one is removed, so that its rows are computed again."""
        self._known.add(path.name)
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # another process has merged it
            return []
        opened = False
        try:
            header = os.pread(handle, HEADER.size, 0)
            size = os.fstat(handle).st_size
            if len(header) == HEADER.size and header[:8] != MAGIC and header[:6] == MAGIC[:6]:
                return []  # another version's
            count, row_bytes, checksum = HEADER.unpack(header)[1:] if len(header) == HEADER.size else (0, 0, 0)
            whole = header[:8] == MAGIC and count > 0 and size == HEADER.size + count * (KEY + row_bytes)
            if not whole or not (checked or checksum == file_checksum(handle, size)):
                path.unlink(missing_ok=True)
                return []
            if row_bytes != self.row_bytes:
                return []
            first = self._shards[-1].first + self._shards[-1].count if self._shards else 0
            self._shards.append(Shard(path, handle, count, first))
            opened = True
            return [np.frombuffer(os.pread(handle, count * KEY, HEADER.size), np.uint64).reshape(count, 2)]
        finally:
            if not opened:
                os.close(handle)

    def _index(self, keys: NDArray[np.uint64]) -> None:
        self._keys = keys
        self._order = np.argsort(keys[:, 0], kind="stable")
        self._sorted = keys[self._order, 0]


def as_numbers(keys: Sequence[bytes] | NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Keys, as bytes or as uint8 [n, 16], -> uint64 [n, 2]."""
    if isinstance(keys, np.ndarray):
        return np.ascontiguousarray(keys).reshape(len(keys), KEY).view(np.uint64)
    joined = b"".join(keys)
    if len(joined) != len(keys) * KEY:
        raise ValueError(f"keys are {KEY} bytes each")
    return np.frombuffer(joined, np.uint64).reshape(len(keys), 2)


def read_into(handle: int, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(handle, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError("a shard of the feature cache was cut short while in use: run the command again")
        done += count


def file_checksum(handle: int, size: int) -> int:
    checksum, at = 0, HEADER.size
    while at < size:
        block = os.pread(handle, CHUNK, at)
        if not block:
            break
        checksum = zlib.crc32(block, checksum)
        at += len(block)
    return checksum
