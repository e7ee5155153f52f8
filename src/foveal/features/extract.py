"""Features of a whole dataset: every file is read and hashed once, and decoded only if a cache lacks it."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from foveal.backbones.adapter import Backbone
from foveal.core.errors import DataError
from foveal.core.threads import cpu_threads
from foveal.data.dataset import Dataset
from foveal.data.images import decode, to_pixels
from foveal.data.scan import SCAN, scan
from foveal.features.cache import KEY, RowStore, cache_root
from foveal.features.session import Session, feature_session

T = TypeVar("T")

T = TypeVar("T")

SCAN_VERSION = 1
CHUNK = 16
"""Images one worker takes at a time."""
FLUSH_ROWS = 512
FLUSH_SECONDS = 3.0


class Rows:
    """Rows of a store in an order of their own, read from disk when asked for: `X[indices]`, `np.asarray(X)`.

    Attributes:
        where: row number in the store per entry [n]; equal for equal images, -1 where there is none.
    """

    def __init__(self, store: RowStore, where: NDArray[np.int64]) -> None:
        self._store = store
        self.where = where
        self.shape = (len(where), *store.shape)
        self.dtype = store.dtype
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Rows by number, slice, index array or mask; a missing row reads as NaN (or zeros, when structured)."""
        where = self.where[index]
        flat = np.atleast_1d(where)
        if (flat >= 0).all():
            rows = self._store.read(flat)
        else:
            rows = np.zeros((len(flat), *self._store.shape), self.dtype)
            if self.dtype.kind == "f":
                rows.fill(np.nan)
            rows[flat >= 0] = self._store.read(flat[flat >= 0])
        return rows if np.ndim(where) else rows[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("rows live on disk: an array of them is always a copy")
        rows = self[:]
        return rows if dtype is None else rows.astype(dtype, copy=False)

    def take(self, indices: NDArray[Any]) -> Rows:
        """The same rows in another order, still on disk."""
        return Rows(self._store, self.where[indices])


@dataclass(frozen=True)
class Extraction:
    """What is known of a dataset's images.

    Attributes:
        X: features [n, D] float32, on disk until indexed. Equal images have equal `X.where`.
        scan: size, brightness and perceptual hash [n], of dtype `foveal.data.scan.SCAN`; `ok` is 0 on errors.
        keys: hash of each file's bytes.
        errors: reason per image that could not be read or decoded; its features are NaN.
        engine, threads: what computed the features of this call ('cache' when nothing was computed).
        computed: how many images went through the backbone in this call.
    """

    X: Rows
    scan: NDArray[np.void]
    keys: list[bytes]
    errors: dict[int, str]
    engine: str
    threads: int
    computed: int

    def take(self, indices: NDArray[Any]) -> Extraction:
        """The same for a subset of the images, in the order of `indices` [m] (integers, or a mask [n])."""
        chosen = np.arange(len(self.keys))[indices]
        errors = {new: self.errors[old] for new, old in enumerate(chosen.tolist()) if old in self.errors}
        keys = [self.keys[i] for i in chosen]
        return Extraction(
            self.X.take(chosen), self.scan[chosen], keys, errors, self.engine, self.threads, self.computed
        )


@dataclass
class Chunk:
    """What one worker found out about its images."""

    indices: list[int]
    keys: list[bytes] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    feature_keys: list[bytes] = field(default_factory=list)
    features: list[NDArray[np.float32]] = field(default_factory=list)
    scan_keys: list[bytes] = field(default_factory=list)
    scans: list[np.void] = field(default_factory=list)


class Worker:
    """Bytes -> hash -> what the stores lack. Shared by all threads of one extraction."""

    def __init__(
        self, dataset: Dataset, backbone: Backbone, device: str, features: RowStore | None, scans: RowStore
    ) -> None:
        self.dataset, self.backbone, self.device = dataset, backbone, device
        self.features, self.scans = features, scans
        self.session: Session | None = None
        self._opening, self._claiming = Lock(), Lock()
        self._claimed: set[bytes] = set()

    def __call__(self, indices: list[int]) -> Chunk:
        chunk = Chunk(indices)
        contents: list[bytes] = []
        for index in indices:
            try:
                content = self.dataset.read(index)
            except (DataError, OSError) as error:
                chunk.errors[index] = one_line(error)
                content = b""
            contents.append(content)
            chunk.keys.append(hashlib.sha256(content).digest()[:KEY])
        lacks_scan = ~self.scans.get(chunk.keys)[0]
        lacks_features = np.zeros_like(lacks_scan) if self.features is None else ~self.features.get(chunk.keys)[0]
        pixels: list[NDArray[np.uint8]] = []
        for place in np.flatnonzero(lacks_features | lacks_scan):
            index, key = indices[place], chunk.keys[place]
            if index in chunk.errors or not self._claim(key):
                continue
            try:
                image = decode(contents[place])
            except DataError as error:
                chunk.errors[index] = str(error)
                self._release(key)
                continue
            contents[place] = b""
            if lacks_scan[place]:
                chunk.scan_keys.append(key)
                chunk.scans.append(scan(image))
            if lacks_features[place]:
                chunk.feature_keys.append(key)
                pixels.append(to_pixels(image, self.backbone.preprocessing))
        if pixels:
            session = self.open_session()
            for at in range(0, len(pixels), session.batch):
                chunk.features.append(session(np.stack(pixels[at : at + session.batch])))
        return chunk

    def open_session(self) -> Session:
        with self._opening:
            if self.session is None:
                self.session = feature_session(self.backbone, device=self.device)
            return self.session

    def _claim(self, key: bytes) -> bool:
        """Whether no thread has taken this content before: copies of one image are decoded once."""
        with self._claiming:
            if key in self._claimed:
                return False
            self._claimed.add(key)
            return True

    def _release(self, key: bytes) -> None:
        with self._claiming:
            self._claimed.discard(key)


def one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def extract(
    dataset: Dataset,
    backbone: Backbone,
    *,
    device: str = "auto",
    featured: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Extraction:
    """Features and scan of every image of a dataset, from the cache or computed now and kept.

    Memory does not grow with the number of images beyond some 100 bytes each. What was computed is kept every few
    seconds and when interrupted, so a second call goes on where the first was stopped.

    Args:
        device: 'auto', 'cpu' or 'cuda'.
        featured: False leaves out the features; they are NaN.
        progress: called with (images done, images).

    Raises:
        FovealError: the cache cannot be written.
    """
    root, n = cache_root(), len(dataset)
    features = RowStore(root / "features" / backbone.fingerprint(), np.float32, (backbone.width,))
    scans = RowStore(root / "scan" / str(SCAN_VERSION), SCAN)
    worker = Worker(dataset, backbone, device, features if featured else None, scans)
    keys = np.zeros((n, KEY), np.uint8)
    errors: dict[int, str] = {}
    pending: list[Chunk] = []
    done, computed, flushed = 0, 0, time.monotonic()
    try:
        with closing(run_ahead(worker, chunks(n), cpu_threads())) as results:
            for chunk in results:
                keys[chunk.indices] = np.frombuffer(b"".join(chunk.keys), np.uint8).reshape(-1, KEY)
                errors.update(chunk.errors)
                if chunk.feature_keys or chunk.scan_keys:
                    pending.append(chunk)
                done += len(chunk.indices)
                computed += len(chunk.feature_keys)
                waiting = sum(max(len(each.scans), len(each.feature_keys)) for each in pending)
                if waiting >= FLUSH_ROWS or (waiting and time.monotonic() - flushed > FLUSH_SECONDS):
                    flush(pending, features, scans)
                    flushed = time.monotonic()
                if progress is not None:
                    progress(done, n)
    finally:
        flush(pending, features, scans)
    features.compact()
    scans.compact()
    ok, where = scans.get(keys)
    found = np.zeros(n, SCAN)
    found[ok] = scans.read(where[ok])
    session = worker.session
    return Extraction(
        X=Rows(features, features.get(keys)[1]),
        scan=found,
        keys=[key.tobytes() for key in keys],
        errors=errors,
        engine=session.engine if session else "cache",
        threads=session.threads if session else cpu_threads(),
        computed=computed,
    )


def chunks(n: int) -> Iterator[list[int]]:
    return (list(range(at, min(at + CHUNK, n))) for at in range(0, n, CHUNK))


def run_ahead(worker: Callable[[list[int]], T], work: Iterable[list[int]], threads: int) -> Generator[T]:
    """Results in order, computed by threads that are at most a few chunks ahead."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="foveal-extract")
    running: deque[Future[T]] = deque()
    try:
        for indices in work:
            running.append(pool.submit(worker, indices))
            if len(running) >= 2 * threads + 1:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def flush(pending: list[Chunk], features: RowStore, scans: RowStore) -> None:
    """Keep what the chunks hold, and forget them."""
    held = list(pending)
    pending.clear()
    rows = [part for chunk in held for part in chunk.features]
    if rows:
        features.append([key for chunk in held for key in chunk.feature_keys], np.concatenate(rows))
    found = [each for chunk in held for each in chunk.scans]
    if found:
        scans.append([key for chunk in held for key in chunk.scan_keys], np.array(found, SCAN))
