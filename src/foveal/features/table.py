"""A feature table: a folder of Parquet shards, each written whole or not at all, and `table.json`.

Columns: id, label (several separated by `|`; null where there is none), split (or null), sha256 (32 bytes, of the
image file), features (a list of fixed length). Each shard's metadata hold what made it, so that a shard stands alone.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from foveal.core.errors import DataError, UsageError
from foveal.core.folders import atomic_file
from foveal.core.preprocessing import Preprocessing
from foveal.data.images import decode, to_pixels
from foveal.data.pieces import Images, Piece
from foveal.features.cache import KEY, RowStore
from foveal.features.extract import chunks, one_line, run_ahead
from foveal.features.session import Session, cpu_threads

FORMAT = 1
ROW_GROUP = 1024
KEPT = b"foveal"
STORAGE = {
    "compression": {"id": "zstd", "label": "zstd", "split": "zstd", "sha256": "none", "features.list.element": "none"},
    "use_dictionary": ["label", "split"],
    "write_statistics": ["id", "label", "split"],
}
"""How columns are written: names are compressed, hashes and features are not worth it."""


@dataclass(frozen=True)
class About:
    """What made a table."""

    data: str
    backbone: dict[str, Any]
    """As `Backbone.describe` tells."""
    fingerprint: str
    width: int
    dtype: str
    shard_rows: int

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **vars(self)}


@dataclass(frozen=True)
class Shard:
    """What a finished shard holds."""

    rows: int
    set_aside: list[list[str]]
    classes: list[str]
    bytes: int
    kept: bool
    """Whether it was there already."""


@dataclass(frozen=True)
class Part:
    """What one thread made of some images."""

    rows: list[int]
    sha256: list[bytes]
    features: np.ndarray
    failed: dict[int, str]


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.parquet"


def open_table(folder: Path, about: About) -> None:
    """Make the folder of a table, or take up what a stopped run left in it.

    Raises:
        UsageError: it holds something else.
        FovealError: it cannot be written.
    """
    file = folder / "table.json"
    if not file.exists():
        others = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        if others or folder.is_file():
            what = f"holds {others[0]}" if others else "is a file"
            raise UsageError(f"--out {folder} {what} and is not overwritten: choose another --out")
        write_about(folder, about, {})
        return
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} is damaged ({error}): choose another --out") from None
    expected = json.loads(json.dumps(about.to_dict()))
    differs = [name for name in expected if stored.get(name) != expected[name]]
    if differs:
        raise UsageError(
            f"--out {folder} holds the table of another command (other {', '.join(differs)}): choose another --out"
        )


def write_about(folder: Path, about: About, totals: dict[str, Any]) -> None:
    with atomic_file(folder / "table.json") as staging:
        staging.write_text(json.dumps({**about.to_dict(), **totals}, indent=2) + "\n", encoding="utf-8")


def read_shard(path: Path, stamp: str, about: About) -> Shard | None:
    """What a shard holds; None when it is missing, damaged, or of other images or another backbone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
        kept = json.loads(metadata.metadata[KEPT])
        if kept["stamp"] != stamp or kept["about"] != json.loads(json.dumps(about.to_dict())):
            return None
        return Shard(metadata.num_rows, kept["set_aside"], kept["classes"], path.stat().st_size, True)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None


def write_shard(
    folder: Path,
    piece: Piece,
    about: About,
    session: Session,
    *,
    threads: int | None = None,
    cache: RowStore | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Shard:
    """Features of a piece, as one shard. Memory does not grow with its size.

    Args:
        cache: features that were computed before; read, not filled.
        progress: called with (images done, images).

    Raises:
        FovealError: the folder cannot be written.
        DataError: the piece cannot be opened.
    """
    import pyarrow.parquet as pq

    images = piece.open()
    preprocessing = Preprocessing.from_dict(about.backbone["preprocessing"])
    read = reader(images, preprocessing, session, about.width, cache)
    schema = schema_of(about)
    set_aside = [list(item) for item in images.set_aside]
    classes: set[str] = set()
    path = shard_path(folder, piece.number)
    written = 0
    with atomic_file(path) as staging:
        with pq.ParquetWriter(
            staging,
            schema,
            **cast(Any, STORAGE),
        ) as writer:
            waiting: list[Part] = []

            def flush() -> None:
                nonlocal written
                if waiting:
                    table = as_table(images, waiting, schema)
                    writer.write_table(table, row_group_size=ROW_GROUP)
                    written += table.num_rows
                    waiting.clear()

            done = 0
            with closing(run_ahead(read, chunks(len(images)), threads or cpu_threads())) as parts:
                for part in parts:
                    waiting.append(part)
                    set_aside += [[images.ids[row], reason] for row, reason in part.failed.items()]
                    for label in (images.labels[row] for row in part.rows):
                        classes.update((label or "").split("|"))
                    done += len(part.rows) + len(part.failed)
                    if sum(len(each.rows) for each in waiting) >= ROW_GROUP:
                        flush()
                    if progress is not None:
                        progress(done, len(images))
            flush()
            kept = {
                "stamp": piece.stamp,
                "about": about.to_dict(),
                "set_aside": set_aside,
                "classes": sorted(classes - {""}),
            }
            writer.add_key_value_metadata({KEPT.decode(): json.dumps(kept)})
        size = staging.stat().st_size
    return Shard(written, set_aside, kept["classes"], size, False)


def schema_of(about: About) -> Any:
    import pyarrow as pa

    number = pa.float16() if about.dtype == "float16" else pa.float32()
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("label", pa.string()),
            pa.field("split", pa.string()),
            pa.field("sha256", pa.binary(32), nullable=False),
            pa.field("features", pa.list_(number, about.width), nullable=False),
        ]
    )


def as_table(images: Images, parts: list[Part], schema: Any) -> Any:
    import pyarrow as pa

    rows = [row for part in parts for row in part.rows]
    dtype = np.float16 if pa.types.is_float16(schema.field("features").type.value_type) else np.float32
    flat = np.concatenate([part.features for part in parts]).astype(dtype, copy=False).reshape(-1)
    columns = [
        pa.array([images.ids[row] for row in rows], pa.string()),
        pa.array([images.labels[row] for row in rows], pa.string()),
        pa.array([images.splits[row] for row in rows], pa.string()),
        pa.array([sha for part in parts for sha in part.sha256], pa.binary(32)),
        pa.FixedSizeListArray.from_arrays(pa.array(flat), type=schema.field("features").type),
    ]
    return pa.table(columns, schema=schema)


def reader(
    images: Images, preprocessing: Preprocessing, session: Session, width: int, cache: RowStore | None
) -> Callable[[list[int]], Part]:
    """Rows of images -> hashes and features; several threads may call it at once."""

    def read(rows: list[int]) -> Part:
        failed: dict[int, str] = {}
        good: list[int] = []
        hashes: list[bytes] = []
        pixels: dict[int, np.ndarray] = {}
        known: dict[int, np.ndarray] = {}
        for row in rows:
            try:
                content = images.source.read(row)
                sha = hashlib.sha256(content).digest()
                found = cached(cache, sha)
                if found is None:
                    pixels[row] = to_pixels(decode(content), preprocessing)
                else:
                    known[row] = found
            except (DataError, OSError) as error:
                failed[row] = one_line(error)
                continue
            good.append(row)
            hashes.append(sha)
        fresh = list(pixels)
        for at in range(0, len(fresh), session.batch):
            some = fresh[at : at + session.batch]
            known |= dict(zip(some, session(np.stack([pixels[row] for row in some])), strict=True))
        features = np.stack([known[row] for row in good]) if good else np.zeros((0, width), np.float32)
        return Part(good, hashes, features, failed)

    return read


def cached(cache: RowStore | None, sha: bytes) -> np.ndarray | None:
    if cache is None:
        return None
    found, where = cache.get([sha[:KEY]])
    return cache.read(where)[0] if found[0] else None


def finish_table(
    folder: Path, about: About, shards: list[Shard], aside: list[list[str]], begun: float
) -> dict[str, Any]:
    """Remove what no longer belongs, write the totals to `table.json`, and give them."""
    for path in folder.glob("part-*.parquet"):
        if int(path.stem.removeprefix("part-")) >= len(shards):
            path.unlink()
    for left_over in folder.glob(".part-*.tmp"):  # of a run that was killed
        left_over.unlink(missing_ok=True)
    totals = {
        "images": sum(shard.rows for shard in shards),
        "set_aside": len(aside) + sum(len(shard.set_aside) for shard in shards),
        "shards": len(shards),
        "bytes": sum(shard.bytes for shard in shards),
        "classes": sorted({name for shard in shards for name in shard.classes}),
    }
    write_about(folder, about, totals)
    fresh = sum(shard.rows for shard in shards if not shard.kept)
    seconds = time.perf_counter() - begun
    return {**totals, "computed": fresh, "seconds": round(seconds, 3), "images_per_second": round(fresh / seconds, 1)}
