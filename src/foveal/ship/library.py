"""The library: unit vectors of images on disk, to add to and to search in. LanceDB keeps the rows, faiss searches.

A folder of `library.json` (what made it), `images.lance` (an ordinary LanceDB table: row, id, source, label, split,
sha256, vector), `embedding.safetensors` (weights that cannot be had elsewhere) and, above EXACT rows, `search.faiss`.
Rows are only ever added, a whole batch or nothing; the search file covers the first so many of them, and those added
since are compared one by one. So a run that is killed leaves a library that answers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foveal.core.bundle import read_json, write_json
from foveal.core.errors import BundleError, MissingExtra, UsageError
from foveal.core.folders import atomic_file, unwritable
from foveal.core.threads import cpu_threads

FORMAT = 1
RECORD, TABLE, WEIGHTS, SEARCH = "library.json", "images", "embedding.safetensors", "search.faiss"
EXACT = 100_000
"""Rows up to which every vector is compared."""
STALE = 0.1
"""Share of rows outside the search file from which it is made anew."""
LISTS, PROBES = 1024, 64
"""Cells the vectors of a large library are dealt into, and how many of them a query looks into."""
CODE = 4
"""Numbers of a vector, at least, for one 4-bit code; what codes find is compared again in 16 bits a number."""
FEWEST = 16
"""Codes of a vector below which 16 bits a number are compared at once."""
AGAIN = 64
"""Candidates per answer that are compared again."""
TRAINED = 64
"""Vectors drawn for each cell to place it."""
BATCH = 50_000


def lancedb() -> Any:
    """The module, without its chatter.

    Raises:
        MissingExtra: not installed.
    """
    os.environ.setdefault("LANCEDB_LOG", "error")
    os.environ.setdefault("LANCE_LOG", "error")
    try:
        import lancedb
    except ImportError:
        raise MissingExtra("lancedb", "library", "a library of images") from None
    return lancedb


def faiss() -> Any:
    """
    Raises:
        MissingExtra: not installed.
    """
    try:
        import faiss
    except ImportError:
        raise MissingExtra("faiss-cpu", "library", "searching a library") from None
    faiss.omp_set_num_threads(cpu_threads())
    return faiss


@dataclass(frozen=True)
class Rows:
    """Images to add: as many of each; unit vectors float32 [n, D]."""

    ids: Sequence[str]
    labels: Sequence[str | None]
    splits: Sequence[str | None]
    sha256: Sequence[bytes]
    vectors: np.ndarray


class Library:
    """A folder of vectors. Made by `create_library`, opened by `open_library`."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self._table = lancedb().connect(str(path)).open_table(TABLE)
        self._count = int(self._table.count_rows())
        self._index: Any = None
        self._flat: tuple[int, Any] | None = None

    def __len__(self) -> int:
        """Rows when it was opened, and those added since through this object."""
        return self._count

    @property
    def width(self) -> int:
        """D, numbers of a vector."""
        return int(self.about["width"])

    def names(self, source: str) -> set[str]:
        """Ids of the images that came from a source."""
        quoted = source.replace("'", "''")
        found = self._table.search().where(f"source = '{quoted}'").select(["id"]).to_arrow()
        return set(found["id"].to_pylist())

    def add(self, source: str, rows: Rows) -> None:
        """Add rows, all or none.

        Raises:
            FovealError: the folder cannot be written.
        """
        import pyarrow as pa

        if not len(rows.ids):
            return
        first = len(self)
        columns = [
            pa.array(np.arange(first, first + len(rows.ids))),
            pa.array(rows.ids, pa.string()),
            pa.array([source] * len(rows.ids), pa.string()),
            pa.array(rows.labels, pa.string()),
            pa.array(rows.splits, pa.string()),
            pa.array(rows.sha256, pa.binary()),
            pa.FixedSizeListArray.from_arrays(pa.array(rows.vectors.astype(np.float32).reshape(-1)), self.width),
        ]
        try:
            self._table.add(pa.table(columns, schema=schema_of(self.width)))
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._count += len(rows.ids)

    def vectors(self, first: int = 0) -> Iterator[np.ndarray]:
        """Vectors from a row on, float32 [m, D] at a time, in the order of their rows."""
        query = self._table.search().where(f"row >= {first}") if first else self._table.search()
        for batch in query.select(["vector"]).to_batches(BATCH):
            yield np.asarray(batch.column("vector").flatten()).reshape(-1, self.width)

    def rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """id, source, label and split of rows, in the order asked for."""
        wanted = sorted(set(numbers))
        columns = ["row", "id", "source", "label", "split"]
        found = self._table.take_offsets(wanted).select(columns).to_arrow().to_pylist() if wanted else []
        by_row = {row.pop("row"): row for row in found}
        return [by_row[number] for number in numbers]

    def column(self, name: str) -> list[Any]:
        """A column of all rows, in their order."""
        return self._table.search().select([name]).to_arrow()[name].to_pylist()

    def finish(self) -> None:
        """Make the search file of a large library, where it is missing or covers too little, and write the record."""
        n = len(self)
        indexed = int(self.about["indexed"])
        if n > EXACT and n - indexed > STALE * n:
            index = build_index(self.vectors, n, self.width)
            with atomic_file(self.path / SEARCH) as staging:
                faiss().write_index(index, str(staging))
            self.about["indexed"], self._index, self._flat = n, index, None
        self.about["images"] = n
        self.write()

    def write(self) -> None:
        with atomic_file(self.path / RECORD) as staging:
            write_json(staging, self.about)

    @property
    def engine(self) -> str:
        return "exact" if not self.about["indexed"] else "approximate"

    def search(self, queries: np.ndarray, k: int, *, exact: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors [q, D] -> rows int64 [q, k] and similarities float32 [q, k], most alike first.

        Fewer than k columns when the library has fewer rows; row -1 where the cells that were looked into hold fewer.

        Args:
            exact: compare every vector, whatever the size.

        Raises:
            UsageError: vectors of another width, or an empty library.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        n = len(self)
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise UsageError(f"queries of shape {queries.shape}: this library holds vectors of {self.width} numbers")
        if n == 0 or k < 1:
            raise UsageError(f"{self.path} holds {n} images and {k} are asked for: expected at least one of each")
        k = min(k, n)
        indexed = 0 if exact else int(self.about["indexed"])
        found = [self.compared(queries, k, indexed)] if indexed < n else []
        if indexed:
            index = self.index()
            similar, rows = index.search(queries, min(k, indexed))
            found.append((rows, similar))
        rows = np.concatenate([each[0] for each in found], 1)
        similar = np.concatenate([each[1] for each in found], 1)
        similar[rows < 0] = -np.inf
        order = np.lexsort((rows, -similar), axis=1)[:, :k]
        return np.take_along_axis(rows, order, 1), np.take_along_axis(similar, order, 1)

    def compared(self, queries: np.ndarray, k: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and similarities of the k most alike from row `first` on, by comparing all of them."""
        if self._flat is None or self._flat[0] != first or self._flat[1].ntotal != len(self) - first:
            flat = faiss().IndexFlatIP(self.width)
            for part in self.vectors(first):
                flat.add(part)
            self._flat = first, flat
        similar, rows = self._flat[1].search(queries, min(k, self._flat[1].ntotal))
        return rows + first, similar

    def index(self) -> Any:
        """
        Raises:
            BundleError: the search file is missing or damaged.
        """
        if self._index is None:
            try:
                self._index = faiss().read_index(str(self.path / SEARCH))
                whole = self._index.ntotal == self.about["indexed"] and self._index.d == self.width
            except RuntimeError:
                whole = False
            if not whole:
                self._index = None
                raise BundleError(
                    f'{self.path / SEARCH} is missing or damaged: remove it, set "indexed" in {RECORD} to 0, and run '
                    "`foveal index` again"
                )
            tune(self._index)
        return self._index


def build_index(vectors: Callable[[], Iterator[np.ndarray]], n: int, width: int) -> Any:
    """A faiss index over unit vectors that stream: cells, 4-bit codes in them, and 16 bits a number to compare again.

    Args:
        vectors: gives all n vectors, float32 [m, width] at a time, each time it is called.
    """
    engine = faiss()
    lists = max(1, min(LISTS, n // TRAINED))
    codes = next(count for count in range(max(1, width // CODE), 0, -1) if width % count == 0)
    inside = f"PQ{codes}x4fs,Refine(SQfp16)" if codes >= FEWEST else "SQfp16"
    index = engine.index_factory(width, f"IVF{lists},{inside}", engine.METRIC_INNER_PRODUCT)
    every = max(1, n // (lists * TRAINED))
    index.train(np.concatenate([part[::every] for part in vectors()]))
    for part in vectors():
        index.add(part)
    tune(index)
    return index


def tune(index: Any) -> None:
    """How far a query looks."""
    if hasattr(index, "k_factor"):
        index.k_factor = AGAIN
    faiss().extract_index_ivf(index).nprobe = PROBES


def schema_of(width: int) -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("row", pa.int64(), nullable=False),
            pa.field("id", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("label", pa.string()),
            pa.field("split", pa.string()),
            pa.field("sha256", pa.binary()),
            pa.field("vector", pa.list_(pa.float32(), width), nullable=False),
        ]
    )


def create_library(path: Path, about: Mapping[str, Any]) -> Library:
    """An empty library in a folder that is missing or empty.

    Args:
        about: plain data; `width`, and whatever tells how the vectors were made.

    Raises:
        UsageError: the folder holds something else.
        FovealError: it cannot be written.
    """
    check_free(path)
    record = {"format": FORMAT, "images": 0, "indexed": 0, **about}
    try:
        path.mkdir(parents=True, exist_ok=True)
        lancedb().connect(str(path)).create_table(TABLE, schema=schema_of(int(about["width"])), mode="overwrite")
    except OSError as error:
        raise unwritable(path, error) from error
    with atomic_file(path / RECORD) as staging:
        write_json(staging, record)
    return Library(path, record)


def is_library(path: Path) -> bool:
    return (path / RECORD).is_file()


def check_free(path: Path) -> None:
    """
    Raises:
        UsageError: something that no library leaves lies there.
    """
    if not path.exists():
        return
    ours = {f"{TABLE}.lance", WEIGHTS}
    others = [path.name] if path.is_file() else sorted({entry.name for entry in path.iterdir()} - ours)
    if others:
        raise UsageError(f"--out {path} holds {others[0]} and is no library: choose another --out")


def open_library(path: str | Path) -> Library:
    """
    Raises:
        BundleError: no library, a damaged one, or one of a newer format.
    """
    path = Path(path)
    if not is_library(path):
        raise BundleError(f"{path} is not a library: expected a folder made by `foveal index`")
    try:
        about = read_json(path / RECORD)
        version, width, indexed = about["format"], about["width"], about["indexed"]
        if not all(isinstance(each, int) for each in (version, width, indexed)) or min(width, version) < 1:
            raise ValueError("numbers that no library has")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path / RECORD} is damaged ({error}): restore it or index again") from None
    if version > FORMAT:
        raise BundleError(f"library {path} has format {version}, this foveal reads up to {FORMAT}: upgrade foveal")
    try:
        return Library(path, about)
    except (OSError, ValueError, RuntimeError) as error:
        raise BundleError(
            f"{path / TABLE}.lance cannot be read ({str(error).splitlines()[0]}): restore it or index again"
        ) from None
