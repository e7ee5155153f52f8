"""index.html of an edit: the picture before, the mask, and the picture after, side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from foveal.evaluate.page import duration, method_text, percent, write_page

SIDE = 512


def inline(picture: Image.Image) -> str:
    """A PNG in base64; small pictures are enlarged pixel by pixel."""
    factor = max(1, SIDE // max(picture.size))
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def write_edited(
    path: Path, record: Mapping[str, Any], before: Image.Image, mask: Image.Image, after: Image.Image
) -> None:
    """Write index.html; `record` is what edit.json holds."""
    from_text = f"from “{record['source']}” " if record["source"] else ""
    outside = record["changed_outside"]
    asked = f"{record['evaluations']} times" if record["evaluations"] else "for the mask alone"
    page = {
        "title": f"{from_text}to “{record['to']}”".strip().capitalize(),
        "subtitle": f"{record['method']['name']} with {record['model']} on {record['image']}.",
        "verdict": {
            "tone": "care" if record["notes"] or outside > 0 else "good",
            "text": " ".join(
                [
                    *record["notes"],
                    f"{percent(record['share'])} of the picture was open to the edit; {percent(record['changed'])} of "
                    f"its pixels changed, {percent(outside)} of those outside of the mask"
                    + (" (a latent model redraws what it decodes)." if outside else "."),
                ]
            ),
        },
        "pictures": [
            {"data": inline(picture), "caption": caption}
            for picture, caption in ((before, "before"), (mask, "the mask: white was open"), (after, "after"))
        ],
        "provenance": [
            ("method", method_text(record["method"])),
            ("mask", record["mask"]),
            ("asked the noise predictor", asked),
            ("seed", str(record["seed"])),
            ("time", duration(record["seconds"])),
        ],
    }
    write_page(path, "edit.html.j2", page)
