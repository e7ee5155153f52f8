"""index.html of a folder of heat maps: each photo, its map, and whether the map is worth more than none."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from foveal.evaluate.page import count, duration, fixed, percent, without_place, write_page

THUMBNAIL = 480
NAMES = {"map": "this map", "random": "cells at random", "centre": "from the centre", "channel-norm": "channel norm"}


def thumbnail(photo: Image.Image) -> str:
    """A small JPEG of a photo, in base64."""
    small = photo.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def better(scores: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether a map finds what the answer rests on sooner than cells at random, by deletion."""
    return scores["map"]["deletion"] < scores["random"]["deletion"]


def write_explained(
    path: str | Path, rows: Sequence[Mapping[str, Any]], thumbnails: Sequence[str], context: Mapping[str, Any]
) -> None:
    """Write index.html.

    Args:
        rows: of `Explanation.to_dict`, each with `map`: the name of its picture.
        thumbnails: a small JPEG of each photo, in base64.
        context: `bundle`, `method`, and whatever else belongs under provenance.
    """
    scored = [row for row in rows if row.get("scores")]
    verdict = None
    if scored:
        good = sum(better(row["scores"]) for row in scored)
        verdict = {
            "tone": "good" if good == len(scored) else "care",
            "text": f"{count(good)} of {count(len(scored))} maps find what the answer rests on sooner than cells at "
            "random do (deletion)." + ("" if good == len(scored) else " Do not trust the others."),
        }
    page = {
        "title": f"{count(len(rows))} image{'' if len(rows) == 1 else 's'} explained",
        "subtitle": f"{context['method']} on {context['bundle']}: where in each image the answer comes from.",
        "verdict": verdict,
        "rows": [shown(row, small) for row, small in zip(rows, thumbnails, strict=True)],
        "provenance": [(key, without_place(str(value))) for key, value in context.items()]
        + [("time", duration(sum(row["seconds"] for row in rows)))],
    }
    write_page(path, "explain.html.j2", page)


def shown(row: Mapping[str, Any], small: str) -> dict[str, Any]:
    if "error" in row:
        return {"name": without_place(row["image"]), "error": row["error"]}
    answer = f"{row['label'] or '(no label)'}, {percent(row['probability'])}"
    if row["unknown"]:
        answer = f"unknown: it resembles no training image (nearest: {answer}); the map explains an answer not given"
    scores = row["scores"] or {}
    return {
        "name": without_place(row["image"]),
        "error": None,
        "answer": answer,
        "target": row["target"],
        "legend": f"probability {fixed(row['target_probability'])}",
        "thumbnail": small,
        "link": quote(row["map"]),
        "notes": row["notes"],
        "scores": [
            {
                "name": NAMES.get(name, name),
                "kind": "chosen" if name == "map" else "reference",
                "deletion": fixed(areas["deletion"]),
                "insertion": fixed(areas["insertion"]),
            }
            for name, areas in scores.items()
        ],
    }
