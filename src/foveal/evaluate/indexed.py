"""index.html of a library: what it holds, how often neighbours share a label, and some neighbours to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foveal.evaluate.page import count, duration, fixed, percent, without_place, write_page

Shot = tuple[str, str, str | None, str]
"""Picture in base64, name, label, what to say of it."""


MEASURED = {
    "queries": ("images searched for", count),
    "labels": ("labels", count),
    "map_at_r": ("MAP@R, precision among as many neighbours as the label has images", fixed),
    "nmi": ("NMI, what k-means clusters tell of the labels", fixed),
}


def write_indexed(
    path: str | Path, content: Mapping[str, Any], sources: Sequence[str], sheets: Sequence[Sequence[Shot]]
) -> None:
    """Write the page.

    Args:
        content: what `foveal index` answers.
        sheets: a query and its nearest, each.
    """
    found = content["neighbours"]
    tiles = [
        (count(content["images"]), "images"),
        (count(content["width"]), "numbers each"),
        (f"{content['bytes'] / 2**20:,.0f} MiB", "on disk"),
    ]
    if found:
        tiles += [
            (percent(found[f"recall_at_{k}"]), f"have one of their label among the nearest {k}" if k > 1 else
             "have a nearest neighbour of their label")
            for k in (1, 5, 10)
        ]  # fmt: skip
    page = {
        "title": f"A library of {count(content['images'])} images",
        "subtitle": f"{content['backbone']}"
        + (f", {content['method']['name']}" if content["method"] else "")
        + f"; searched by image{' and by words' if content['words'] else ''}, "
        + ("by comparing all." if content["engine"] == "exact" else "in cells, approximately."),
        "tiles": tiles,
        "sheets": sheets,
        "measured": [(name, write(found[key])) for key, (name, write) in MEASURED.items()] if found else [],
        "provenance": [
            ("sources", ", ".join(map(without_place, sources))),
            ("set aside", count(len(content["set_aside"]))),
            ("added now", count(content["added"])),
            ("time", duration(content["seconds"])),
        ],
    }
    write_page(path, "library.html.j2", page)
