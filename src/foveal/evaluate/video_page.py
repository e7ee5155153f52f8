"""report.html and README.md of a classifier of clips: numbers, and strips of frames."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from foveal.evaluate.card import write_markdown
from foveal.evaluate.charts import place
from foveal.evaluate.page import (
    METRICS,
    backbone_text,
    count,
    data_rows,
    duration,
    figure,
    fixed,
    lane,
    method_text,
    write_page,
)
from foveal.evaluate.report import calibration as calibration_part
from foveal.evaluate.report import confused, confusion, cost_rows, curves, per_class, provenance
from foveal.evaluate.report import unknown as unknown_part

HEIGHT = 96
SHOWN_FRAMES = 12
LANES = {"majority": "majority class", "shuffled": "frames in any order"}


@dataclass(frozen=True)
class Strip:
    """A test clip: the frames that were looked at, what it is and what was answered."""

    name: str
    frames: Sequence[Image.Image]
    true: str
    answer: str
    probability: float


def of_clips(text: str) -> str:
    for old, new in (("an image", "a clip"), ("An image", "A clip"), ("image", "clip"), ("Image", "Clip")):
        text = text.replace(old, new)
    return text


def film(frames: Sequence[Image.Image]) -> str:
    """Frames side by side as one small JPEG, in base64; of many, SHOWN_FRAMES evenly chosen."""
    if len(frames) > SHOWN_FRAMES:
        frames = [frames[round(k * (len(frames) - 1) / (SHOWN_FRAMES - 1))] for k in range(SHOWN_FRAMES)]
    small = [image.resize((max(1, round(HEIGHT * image.width / image.height)), HEIGHT)) for image in frames]
    strip = Image.new("RGB", (sum(image.width for image in small) + 2 * (len(small) - 1), HEIGHT), "white")
    left = 0
    for image in small:
        strip.paste(image, (left, 0))
        left += image.width + 2
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=82)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def verdict(metrics: Mapping[str, Any]) -> dict[str, str]:
    ours = metrics["balanced_accuracy"]
    majority, mixed = (metrics["references"][name]["balanced_accuracy"] for name in ("majority", "shuffled"))
    said = f"It is right on {100 * ours['value']:.1f}% of the test clips, each class counting alike."
    if ours["low"] is None or majority["value"] is None or ours["low"] <= majority["value"]:
        return {"tone": "care", "text": said + " That is not surely better than always the same answer: do not use it."}
    lost = ours["value"] - mixed["value"]
    if lost > 0.05:
        said += f" Shown the same frames in any order it loses {100 * lost:.0f} points: it reads the motion."
    else:
        said += " It is as good with the frames in any order: single frames tell these classes apart."
    return {"tone": "good", "text": said}


def forest(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    sources = {"this model": metrics} | {LANES[name]: row for name, row in metrics["references"].items()}
    return [
        {
            "name": title,
            "about": of_clips(about),
            "lanes": [
                {"name": label, "text": figure(source[name]), **lane(source[name], place(0, 1))}
                for label, source in sources.items()
            ],
        }
        for name, (title, about) in METRICS.items()
        if name in metrics
    ]


def write_video(
    folder: Path,
    manifest: Mapping[str, Any],
    calibration: Mapping[str, Any],
    metrics: Mapping[str, Any],
    cost: Mapping[str, Any],
    strips: Sequence[Strip],
) -> None:
    """Write report.html and README.md into a Bundle's folder.

    Args:
        strips: test clips to show, wrong answers first.
    """
    data, method = manifest["data"], manifest["method"]
    title = f"{data['name']}: {method['name']}"
    judged = verdict(metrics)
    subtitle = (
        f"{method['options']['frames']} frames of each clip, on {manifest['backbone']['name']}; measured on "
        f"{count(metrics['n'])} {metrics['split']} clips that had no part in training or calibrating."
    )
    facts = [
        ("method", method_text(method)),
        ("backbone", backbone_text(manifest["backbone"])),
        *data_rows(data),
        ("time", duration(manifest["seconds"])),
        *provenance(manifest),
    ]
    known = calibration_part(calibration["temperature"], metrics["split"])
    strange = unknown_part(calibration["unknown"])
    page = {
        "title": title,
        "subtitle": subtitle,
        "verdict": judged,
        "forest": forest(metrics),
        "references": [(LANES[name], row["about"]) for name, row in metrics["references"].items()],
        "per_class": per_class(metrics["per_class"]),
        "confusion": confusion(metrics, manifest["classes"]),
        "confused": confused(metrics, manifest["classes"]),
        "calibration": known | {"about": of_clips(known["about"])},
        "unknown": strange | {"about": of_clips(strange["about"])},
        "curves": curves(metrics["history"], "clips"),
        "strips": [
            {
                "film": film(strip.frames),
                "name": strip.name,
                "true": strip.true,
                "answer": strip.answer,
                "right": strip.true == strip.answer,
                "probability": fixed(strip.probability, 2),
            }
            for strip in strips
        ],
        "cost": [
            ("frames of a clip" if name == "frames" else of_clips(name), of_clips(value))
            for name, value in cost_rows(cost)
        ],
        "provenance": facts,
    }
    write_page(folder / "report.html", "video.html.j2", page)
    front = {
        "library_name": "foveal",
        "pipeline_tag": "video-classification",
        "tags": ["foveal", "timm", "video-classification", method["name"]],
    }
    rows = {"this model": metrics, **{LANES[name]: row for name, row in metrics["references"].items()}}
    card = {
        "title": title,
        "verdict": judged["text"],
        "classes": list(manifest["classes"]),
        "frames": method["options"]["frames"],
        "n": metrics["n"],
        "split": metrics["split"],
        "names": list(rows),
        "metrics": [
            (METRICS[name][0], *(figure(row[name]) for row in rows.values()))
            for name in ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")
        ],
        "provenance": facts,
    }
    write_markdown(folder / "README.md", "video.md.j2", front, card)
