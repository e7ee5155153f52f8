"""A library of a million vectors: writing, building, size, memory, recall and queries a second. A part of run.py."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

VECTORS, WIDTH, QUERIES, FIND, BATCH = 1_000_000, 384, 1000, 10, 50_000
CLUSTERS, DIMENSIONS, SPREAD, NOISE = 10_000, 96, 0.6, 0.01


class World:
    """Unit vectors in clusters: centres and spread around them in a subspace of falling scales, a little noise."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.scales = (np.arange(1, DIMENSIONS + 1) ** -0.5).astype(np.float32)
        self.basis = np.linalg.qr(self.rng.standard_normal((WIDTH, DIMENSIONS)))[0].T.astype(np.float32)
        self.centres = self.rng.standard_normal((CLUSTERS, DIMENSIONS), dtype=np.float32) * self.scales

    def draw(self, n: int) -> np.ndarray:
        inner = self.centres[self.rng.integers(0, CLUSTERS, n)]
        inner = inner + SPREAD * self.scales * self.rng.standard_normal((n, DIMENSIONS), dtype=np.float32)
        X = inner @ self.basis + NOISE * self.rng.standard_normal((n, WIDTH), dtype=np.float32)
        return X / np.linalg.norm(X, axis=1, keepdims=True)

    def batches(self, n: int) -> Iterator[np.ndarray]:
        for start in range(0, n, BATCH):
            yield self.draw(min(BATCH, n - start))


def merged(best: tuple[np.ndarray, np.ndarray], queries: np.ndarray, part: np.ndarray, first: int) -> Any:
    """Rows and similarities of the FIND nearest so far, after another part."""
    similar = queries @ part.T
    near = np.argpartition(-similar, FIND, axis=1)[:, :FIND]
    rows = np.concatenate([best[0], near + first], 1)
    values = np.concatenate([best[1], np.take_along_axis(similar, near, 1)], 1)
    order = np.argsort(-values, axis=1)[:, :FIND]
    return np.take_along_axis(rows, order, 1), np.take_along_axis(values, order, 1)


def measure(folder: Path) -> dict[str, float]:
    from foveal.ship.library import Rows, create_library, open_library

    world = World(0)
    queries = world.draw(QUERIES)
    library = create_library(folder / "library", {"width": WIDTH, "sources": {}})
    truth: Any = (np.zeros((QUERIES, 0), np.int64), np.zeros((QUERIES, 0), np.float32))
    writing, first = 0.0, 0
    for part in world.batches(VECTORS):
        truth = merged(truth, queries, part, first)
        ids = [f"{row:07d}.jpg" for row in range(first, first + len(part))]
        nothing = [None] * len(part)
        start = time.perf_counter()
        library.add("made up", Rows(ids, nothing, nothing, [b""] * len(part), part))
        writing += time.perf_counter() - start
        first += len(part)
    start = time.perf_counter()
    library.finish()
    building = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    opened = open_library(folder / "library")
    start = time.perf_counter()
    opened.search(queries[:1], FIND)
    loading = time.perf_counter() - start
    start = time.perf_counter()
    found = np.concatenate([opened.search(query[None], FIND)[0] for query in queries])
    alone = QUERIES / (time.perf_counter() - start)
    start = time.perf_counter()
    for at in range(0, QUERIES, 100):
        opened.search(queries[at : at + 100], FIND)
    together = QUERIES / (time.perf_counter() - start)
    start = time.perf_counter()
    for rows in found[:50]:
        opened.rows(rows.tolist())
    return {
        "recall": float(np.mean([len(set(a) & set(b)) / FIND for a, b in zip(found, truth[0], strict=True)])),
        "alone": alone,
        "together": together,
        "names": (time.perf_counter() - start) / 50,
        "writing": writing,
        "building": building,
        "loading": loading,
        "peak": peak,
        "bytes": sum(file.stat().st_size for file in (folder / "library").rglob("*") if file.is_file()),
        "search_bytes": (folder / "library" / "search.faiss").stat().st_size,
    }


def libraries(folder: Path) -> list[str]:
    """Rows of the table."""
    done = subprocess.run([sys.executable, __file__, str(folder)], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return [
        f"| recall@{FIND} of {VECTORS:,} vectors, {QUERIES:,} queries | above 0.95 | **{found['recall']:.3f}** |",
        f"| queries a second, one at a time | above 500 | **{found['alone']:,.0f}** "
        f"({found['together']:,.0f} in batches of 100) |",
        f"| names, labels and sources of {FIND} hits | | {1000 * found['names']:.1f} ms |",
        f"| time to write the rows, and to build the search file | stated | {found['writing']:.0f} s, "
        f"{found['building']:.0f} s |",
        f"| time to open it and answer the first query | | {found['loading']:.2f} s |",
        f"| size on disk, of it the search file | stated | {found['bytes'] / 2**20:,.0f} MiB, "
        f"{found['search_bytes'] / 2**20:,.0f} MiB |",
        f"| peak memory of making it | at most 4 GiB | {found['peak']:,.0f} MiB |",
    ]


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
