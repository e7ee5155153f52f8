"""What is told of a library: how often a neighbour shares a label, and a page with some neighbours to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from foveal.core.errors import DataError
from foveal.core.folders import atomic_file
from foveal.core.seeds import generator
from foveal.data.open import open_pool
from foveal.evaluate.curated import shot
from foveal.evaluate.embedding import cluster_nmi, retrieval
from foveal.evaluate.indexed import write_indexed
from foveal.ship.library import Library

MEASURED = 5000
"""Images that are measured on, of more: so many drawn ones."""
SHOWN, NEIGHBOURS = 6, 5


def measured(library: Library, seed: int) -> dict[str, Any] | None:
    """Recall@K, mAP@R and NMI of the library's own labels, among MEASURED of its images; None without labels."""
    labels = library.column("label")
    told = np.array([row for row, label in enumerate(labels) if label is not None], np.int64)
    if len(told) < 2:
        return None
    rows = np.sort(generator(seed, "measured").permutation(told)[:MEASURED])
    names, kinds = np.unique([labels[row] for row in rows], return_inverse=True)
    X = gathered(library, rows)
    try:
        found = retrieval(X, kinds, (1, 5, 10))
    except DataError:
        return None
    return {
        "images": len(rows),
        "labels": len(names),
        "queries": found.queries,
        **{f"recall_at_{k}": round(value, 4) for k, value in found.recall.items()},
        "map_at_r": round(found.map_at_r, 4),
        "nmi": round(cluster_nmi(X, kinds, seed), 4) if 1 < len(names) <= len(rows) // 2 else None,
    }


def gathered(library: Library, rows: np.ndarray) -> np.ndarray:
    """Vectors of some rows, which rise."""
    found: list[np.ndarray] = []
    first = 0
    for part in library.vectors():
        found.append(part[rows[(rows >= first) & (rows < first + len(part))] - first])
        first += len(part)
    return np.concatenate(found)


def report(out: Path, library: Library, content: dict[str, Any]) -> None:
    """Write index.html into the library."""
    n = len(library)
    rows = np.unique(np.linspace(0, n - 1, min(SHOWN, n)).astype(np.int64))
    found, similar = library.search(gathered(library, rows), min(NEIGHBOURS + 1, n))
    pictures = Pictures()
    sheets = []
    for row, near, scores in zip(rows.tolist(), found.tolist(), similar.tolist(), strict=True):
        beside = [(number, score) for number, score in zip(near, scores, strict=True) if number not in (row, -1)][
            :NEIGHBOURS
        ]
        told = library.rows([row, *(number for number, _ in beside)])
        said = ["the query", *(f"{score:.3f}" for _, score in beside)]
        sheets.append(
            [(pictures.of(each), each["id"], each["label"], text) for each, text in zip(told, said, strict=True)]
        )
    with atomic_file(out / "index.html") as staging:
        write_indexed(staging, content, list(library.about["sources"]), sheets)


class Pictures:
    """Small pictures of a library's images, from where they came; '' where they cannot be had (any more)."""

    def __init__(self) -> None:
        self.opened: dict[str, tuple[Any, dict[str, int]]] = {}

    def of(self, row: dict[str, Any]) -> str:
        source = row["source"]
        try:
            if source not in self.opened:
                dataset = open_pool(source, offline=True)
                self.opened[source] = dataset, {name: place for place, name in enumerate(dataset.ids)}
            dataset, place = self.opened[source]
            return shot(dataset.image(place[row["id"]]))
        except (DataError, KeyError):
            return ""
