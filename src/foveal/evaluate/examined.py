"""index.html of an examination: what a look inside a network found, in tables, lines and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveal.core.families.robust import Examination, Section
from foveal.evaluate.charts import curves_chart, short
from foveal.evaluate.page import count, duration, write_page

COLOURS = ("accent", "warm", "muted")


def cell(value: Any) -> str:
    """A value in few signs: 1,234, 0.0123, –."""
    if isinstance(value, float):
        return short(value) if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int):
        return count(value) if abs(value) < 1e6 else short(value)
    return "–" if value is None else str(value)


def png(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] -> a PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def part(section: Section) -> dict[str, Any]:
    names = dict(zip(section.lines, COLOURS, strict=False))
    numeric = {key: all(not isinstance(row[key], str) for row in section.rows) for key in section.columns}
    return {
        "title": section.title,
        "about": section.about,
        "head": [(heading, numeric[key]) for key, heading in section.columns.items()],
        "rows": [[(cell(row[key]), numeric[key]) for key in section.columns] for row in section.rows],
        "chart": curves_chart(section.rows, names, section.measure, x="layer") if names else None,
        "key": [(text, names[key]) for key, text in section.lines.items()],
        "pictures": [(caption, png(pixels), pixels.shape[1]) for caption, pixels in section.pictures.items()],
    }


def write_examined(file: str | Path, found: Examination, context: Mapping[str, Any]) -> None:
    """Write index.html.

    Args:
        context: `bundle`, `method`, `examined` (which images), `seconds`, and whatever else belongs under provenance.
    """
    page = {
        "title": f"What is inside of {Path(str(context['bundle'])).name}?",
        "subtitle": f"{context['method']} on {context['bundle']}, with {context['examined']}.",
        "verdict": {"tone": "good" if found.good else "care", "text": found.verdict},
        "findings": list(found.findings),
        "tiles": [(cell(value), name) for name, value in found.tiles.items()],
        "sections": [part(section) for section in found.sections],
        "provenance": [(key, str(value)) for key, value in context.items() if key != "seconds"]
        + [("time", duration(context["seconds"]))],
    }
    write_page(file, "examination.html.j2", page)
