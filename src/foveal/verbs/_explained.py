"""Explanations -> a folder: pictures, arrays, one page and one JSON document."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from foveal.core.bundle import read_json, write_json
from foveal.core.errors import DataError, UsageError
from foveal.core.folders import atomic_file
from foveal.data.dataset import printable
from foveal.evaluate.explained import thumbnail, write_explained
from foveal.ship.explain import Explanation

RECORD = "explanations.json"
TAKEN = ("index", "explanations")


def write_folder(folder: Path, explanations: Iterable[Explanation], *, bundle: str, method: str) -> dict[str, Any]:
    """Write each map as soon as it is there, then index.html and explanations.json; returns what the latter holds.

    Raises:
        UsageError: the folder holds something else than maps.
        DataError: none of the images can be decoded.
    """
    check_free(folder)
    rows: list[dict[str, Any]] = []
    thumbnails: list[str] = []
    taken: set[str] = set(TAKEN)
    for each in explanations:
        row, small = each.to_dict(), ""
        if each.map is not None and each.photo is not None:
            stem = free_stem(row["image"], taken)
            row |= {"map": f"{stem}.png", "array": f"{stem}.npy"}
            with atomic_file(folder / f"{stem}.png") as staging:
                each.overlay().save(staging, "PNG")
            with atomic_file(folder / f"{stem}.npy") as staging, staging.open("wb") as file:
                np.save(file, each.map, allow_pickle=False)
            small = thumbnail(each.photo)
        rows.append(row)
        thumbnails.append(small)
        with atomic_file(folder / RECORD) as staging:
            write_json(staging, {"folder": str(folder), "bundle": bundle, "method": method, "images": rows})
    if not any("map" in row for row in rows):
        raise DataError(f"none of the {len(rows)} images can be decoded ({rows[0]['image']}: {rows[0]['error']})")
    with atomic_file(folder / "index.html") as staging:
        write_explained(staging, rows, thumbnails, {"bundle": bundle, "method": method})
    return read_json(folder / RECORD)


def check_free(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        read_json(folder / RECORD)["images"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"--out {folder} exists and holds no explanations: choose another --out") from None


def free_stem(image: str, taken: set[str]) -> str:
    """The image's name without its ending; `-2`, `-3` for later ones of the same name."""
    stem = printable(PurePath(image).stem).replace("\\", "_") or "image"
    candidate, number = stem, 1
    while candidate.lower() in taken:
        number += 1
        candidate = f"{stem}-{number}"
    taken.add(candidate.lower())
    return candidate
