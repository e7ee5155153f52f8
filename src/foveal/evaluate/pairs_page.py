"""report.html and README.md of two towers: how well images and texts find each other, and what they found."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from foveal.evaluate.card import write_markdown
from foveal.evaluate.charts import curves_chart, drawn
from foveal.evaluate.page import (
    backbone_text,
    count,
    data_rows,
    duration,
    figure,
    lane,
    method_text,
    write_page,
)
from foveal.evaluate.report import cost_rows, provenance

SIDE = 200
WAYS = {
    "image_to_text": ("Texts for an image", "which of all test texts belongs to an image"),
    "text_to_image": ("Images for a text", "which of all test images belongs to a text"),
}


@dataclass(frozen=True)
class Found:
    """An image, its own texts, and the texts that came first, each with its cosine."""

    name: str
    image: Image.Image
    own: Sequence[str]
    texts: Sequence[tuple[str, float]]


def shown(found: Found) -> dict[str, Any]:
    small = found.image.copy()
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    texts = [{"text": text, "cosine": f"{cosine:.2f}", "right": text in found.own} for text, cosine in found.texts]
    return {
        "picture": Markup('<img alt="" src="data:image/jpeg;base64,{}">').format(data),
        "name": found.name,
        "own": " / ".join(found.own),
        "texts": texts,
        "listed": any(text["right"] for text in texts),
    }


def verdict(metrics: Mapping[str, Any]) -> dict[str, str]:
    found = metrics["image_to_text"]
    first = found["r_at_1"]
    better = first["low"] is not None and first["low"] > 2 * found["chance"]
    text = (
        f"Of {count(found['candidates'])} texts, an image's own comes first {100 * first['value']:.1f}% of the time, "
        f"by chance {100 * found['chance']:.1f}%"
    )
    text += "." if better else ": images and texts hardly find each other. Do not trust it."
    return {"tone": "good" if better else "care", "text": text}


def lanes(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = {f"in first {k}" if k > 1 else "first": found[f"r_at_{k}"] for k in (1, 5, 10)}
    chance = {"value": found["chance"], "low": None, "high": None}
    return [
        {
            "name": name,
            "reference": name == "first, by chance",
            "text": figure(row),
            **lane(row, lambda value: f"{100 * min(max(value, 0), 1):.2f}%"),
        }
        for name, row in {**rows, "first, by chance": chance}.items()
    ]


def write_pairs(
    folder: Path,
    manifest: Mapping[str, Any],
    metrics: Mapping[str, Any],
    cost: Mapping[str, Any],
    found: Sequence[Found],
) -> None:
    """Write report.html and README.md into a Bundle's folder.

    Args:
        found: what test images drawn at random found.
    """
    data, history = manifest["data"], metrics["history"]
    title = f"Images and texts of {data['name']}"
    about = {
        "method": method_text(manifest["method"]),
        "image tower": backbone_text(manifest["backbone"]),
        "language tower": f"{manifest['text']['kind']} ({manifest['text_origin']})",
        "scale of cosines": f"{metrics['scale']:.1f}",
        "time": duration(manifest["seconds"]),
    }
    told = [*about.items(), *data_rows(data), *cost_rows(cost), *provenance(manifest)]
    judged = verdict(metrics)
    write_page(
        folder / "report.html",
        "pairs.html.j2",
        {
            "title": title,
            "subtitle": f"{manifest['method']['name']} on {manifest['backbone']['name']}, measured on "
            f"{count(metrics['n'])} {metrics['split']} images.",
            "verdict": judged,
            "ways": [
                {
                    "title": name,
                    "about": text,
                    "lanes": lanes(metrics[key]),
                    "median": f"{metrics[key]['median_rank']['value']:g}",
                    "candidates": count(metrics[key]["candidates"]),
                }
                for key, (name, text) in WAYS.items()
            ],
            "found": [shown(each) for each in found],
            "training": curves_chart(history, {"train_loss": "muted", "val_loss": "accent"}, "loss"),
            "watched": any(drawn(row.get("val_loss")) for row in history),
            "validation": curves_chart(history, {"val_r_at_1": "accent"}, "R@1 on validation images"),
            "provenance": told,
        },
    )
    front = {
        "library_name": "foveal",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["foveal", "timm", "zero-shot-image-classification", manifest["method"]["name"]],
    }
    card = {
        "title": title,
        "verdict": judged["text"],
        "n": metrics["n"],
        "split": metrics["split"],
        "rows": [
            (
                WAYS[key][0],
                *(figure(metrics[key][f"r_at_{k}"]) for k in (1, 5, 10)),
                f"{metrics[key]['median_rank']['value']:g} of {metrics[key]['candidates']}",
                f"{metrics[key]['chance']:.3f}",
            )
            for key in WAYS
        ],
        "provenance": told,
    }
    write_markdown(folder / "README.md", "pairs.md.j2", front, card)
