"""report.html of a pretraining: what was learnt, by the loss, by the features, and to look at."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveal.evaluate.charts import curves_chart
from foveal.evaluate.page import (
    backbone_text,
    count,
    data_rows,
    duration,
    fixed,
    method_text,
    named,
    percent,
    write_page,
)

PANEL = 224
"""Pixels along the side of a picture on the page."""


def encoded(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] -> a JPEG in base64."""
    picture = Image.fromarray(pixels).resize((PANEL, PANEL), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def verdict(probe: Mapping[str, Mapping[str, float | None]]) -> dict[str, str]:
    """Whether the loss says that it learnt, and what became of the features: one sentence each."""
    before, after = probe["before"], probe["after"]
    loss, blank = after["loss"], after["blank"]
    assert loss is not None
    learnt = loss < (blank if blank is not None else before["loss"] or loss)
    if blank is None:
        text = f"The loss went from {fixed(before['loss'])} to {fixed(loss)}."
    elif learnt:
        share = percent(1 - loss / blank)
        text = f"It learnt: the loss is {fixed(loss)}, {share} below the {fixed(blank)} of a blank answer."
    else:
        text = f"It learnt nothing: the loss is {fixed(loss)}, a blank answer has {fixed(blank)}. Train longer."
    old, new = before["neighbour_accuracy"], after["neighbour_accuracy"]
    if old is not None and new is not None:
        way = "more" if new > old else "less" if new < old else "as much"
        text += f" Its features say {way} of the labels, which it never saw: {percent(old)} before, {percent(new)} now."
        learnt = learnt and new >= old
    return {"tone": "good" if learnt else "care", "text": text}


def write_pretrained(
    path: str | Path,
    record: Mapping[str, Any],
    pictures: Sequence[tuple[str, Sequence[np.ndarray]]],
) -> None:
    """Write report.html.

    Args:
        record: what weights.json holds.
        pictures: a caption, and one uint8 [H, W, 3] for each image shown: the images first, then what the method made
            of them; only the images, when it makes no pictures.
    """
    probe, history = record["probe"], record["history"]
    blank = probe["after"]["blank"]
    rows = [{**row, "blank": blank} for row in history]
    names = {"train_loss": "accent", **({"blank": "muted"} if blank is not None else {})}
    labels = {
        "loss": ("loss on views it has seen", fixed),
        "blank": ("loss of a blank answer", fixed),
        "neighbour_accuracy": ("labels told by ten nearest neighbours", percent),
        "effective_rank": ("directions that the features use", partial(fixed, digits=1)),
    }
    page = {
        "title": f"{record['backbone']['arch']}, pretrained on {record['data']['name']}",
        "subtitle": f"{record['method']['name']} on {count(record['data']['images'])} images without labels, "
        f"{record['epochs']:g} epochs in {duration(record['seconds'])}.",
        "verdict": verdict(probe),
        "chart": curves_chart(rows, names, "loss"),
        "has_blank": blank is not None,
        "probe": [
            {"name": name, "before": write(probe["before"][key]), "after": write(probe["after"][key])}
            for key, (name, write) in labels.items()
            if probe["after"][key] is not None
        ],
        "probed": count(probe["images"]),
        "rows": [
            list(zip([name for name, _ in pictures], map(encoded, row), strict=True))
            for row in zip(*(each for _, each in pictures), strict=True)
        ]
        if len(pictures) > 1
        else [],
        "provenance": [
            ("method", method_text(record["method"])),
            ("backbone", backbone_text(record["backbone"])),
            ("preprocessing", named(record["backbone"]["preprocessing"])),
            ("began as", f"{backbone_text(record['parent'])}, fingerprint {record['parent']['fingerprint']}"),
            *data_rows(record["data"]),
            ("data fingerprint", str(record["data"]["fingerprint"])),
            ("seed", str(record["seed"])),
            ("versions", named(record["foveal"])),
        ],
    }
    write_page(path, "pretrain.html.j2", page)
