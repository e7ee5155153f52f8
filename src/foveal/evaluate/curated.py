"""The page of a selection: what it kept, the reduction curve, and the fullest and emptiest clusters to look at."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveal.evaluate.charts import curves_chart
from foveal.evaluate.page import count, method_text, percent, sentence, write_page

CLUSTERS, MEMBERS, SIDE = 12, 5, 136
"""Clusters shown at either end, images of each, pixels of each."""
AUDIT = {
    f"false_negatives_in_256_{when}": f"pairs of copies among 256 images at random, {when}"
    for when in ("before", "after")
}


@dataclass(frozen=True)
class Cluster:
    """An image that stays and some it stands for: rows of the data, and distances of the latter."""

    exemplar: int
    size: int
    members: list[int]
    distances: list[float]


def ends(exemplar: np.ndarray, distance: np.ndarray) -> tuple[list[Cluster], list[Cluster]]:
    """The fullest clusters (farthest members first), and the emptiest: small ones, spread evenly over the order."""
    sizes = np.bincount(exemplar, minlength=len(exemplar))
    stays = np.flatnonzero(exemplar == np.arange(len(exemplar)))
    by_size = stays[np.argsort(-sizes[stays], kind="stable")]
    fullest = [row for row in by_size[:CLUSTERS] if sizes[row] > 1]
    least = by_size[sizes[by_size] == sizes[by_size[-1]]]
    emptiest = least[np.linspace(0, len(least) - 1, min(CLUSTERS, len(least))).astype(np.int64)]

    def cluster(row: int) -> Cluster:
        members = np.flatnonzero((exemplar == row) & (np.arange(len(exemplar)) != row))
        members = members[np.argsort(-distance[members], kind="stable")][:MEMBERS]
        return Cluster(row, int(sizes[row]), members.tolist(), distance[members].tolist())

    shown = [cluster(int(row)) for row in fullest]
    return shown, [cluster(int(row)) for row in emptiest if row not in fullest]


def shot(image: Image.Image) -> str:
    """A small JPEG in base64."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def write_curated(
    path: str | Path,
    content: Mapping[str, Any],
    fullest: Sequence[Mapping[str, Any]],
    emptiest: Sequence[Mapping[str, Any]],
) -> None:
    """Write the page.

    Args:
        content: what `foveal curate` answers.
        fullest, emptiest: clusters as `size` and `shots`, a list of (picture in base64, name, what to say of it).
    """
    n, kept = content["images"], content["kept"]
    curve = content["curve"]
    setting = next(iter(curve[0])) if curve else ""
    rows = [{**row, "share": row["kept"] / n} for row in curve]
    page = {
        "title": f"{count(kept)} of {count(n)} images kept",
        "subtitle": f"{content['method']} on {content['data']}: {percent(kept / n)} stay, every other one has one "
        "that stays in its place.",
        "notes": [sentence(note) for note in content["notes"]],
        "tiles": [
            (percent(kept / n), "of the images stay"),
            *((str(value), name.replace("_", " ")) for name, value in content["chosen"].items()),
            *((f"{value:,.0f}", AUDIT.get(name, name.replace("_", " "))) for name, value in content["audit"].items()),
        ],
        "curve": curves_chart(rows, {"share": "accent"}, "share that stays", setting),
        "setting": setting,
        "table": [(f"{row[setting]:g}", count(int(row["kept"])), percent(row["share"])) for row in rows],
        "fullest": fullest,
        "emptiest": emptiest,
        "provenance": [
            ("data", str(content["data"])),
            ("method", method_text({"name": content["method"], "options": content["options"]})),
            ("groups", count(content["groups"])),
            ("manifest", str(content["manifest"])),
        ],
    }
    write_page(path, "curate.html.j2", page)
