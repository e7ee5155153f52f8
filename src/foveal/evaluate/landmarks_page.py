"""report.html and README.md of a network of landmarks: numbers, curves, and the points drawn over the images."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from foveal.evaluate.card import write_markdown
from foveal.evaluate.charts import Frame, curves_chart, path, short, ticks
from foveal.evaluate.page import (
    backbone_text,
    count,
    data_rows,
    duration,
    figure,
    fixed,
    interval_text,
    lane,
    method_text,
    percent,
    write_page,
)
from foveal.evaluate.report import cost_rows, provenance

SIDE = 260
METRICS = {
    "nme": ("NME", "mean distance of found from true points, as a share of the size of the object; lower is better"),
    "pck_05": ("PCK at 5%", "share of points found within 5% of the size of the object"),
    "pck_10": ("PCK at 10%", "share of points found within 10% of the size of the object"),
    "pixels": ("Pixels", "mean distance in pixels of the image; lower is better"),
}


@dataclass(frozen=True)
class Shot:
    """An image with its true and its found points [K, 2] in its pixels; error is its NME."""

    name: str
    image: Image.Image
    found: np.ndarray
    xy: np.ndarray
    known: np.ndarray
    error: float


def picture(shot: Shot, names: Sequence[str]) -> Markup:
    """The image with true points (hollow, warm), found points (full) and the way between them."""
    small = shot.image.copy()
    small.thumbnail((SIDE, SIDE))
    scale = small.width / shot.image.width
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    shown = base64.b64encode(buffer.getvalue()).decode("ascii")
    parts = [f'<image href="data:image/jpeg;base64,{shown}" width="{small.width}" height="{small.height}"/>']
    radius = max(small.size) / 90
    for k, name in enumerate(names):
        x, y = ((shot.found[k] + 0.5) * scale).round(1)
        if shot.known[k]:
            tx, ty = ((shot.xy[k] + 0.5) * scale).round(1)
            off = float(np.linalg.norm(shot.found[k] - shot.xy[k]))
            parts.append(f'<line x1="{tx}" y1="{ty}" x2="{x}" y2="{y}" stroke="#fff" stroke-width="{radius / 2:.2f}"/>')
            parts.append(
                f'<circle cx="{tx}" cy="{ty}" r="{1.5 * radius:.2f}" fill="none" stroke="#ff8a1f" '
                f'stroke-width="{radius / 2:.2f}"/>'
            )
            tip = Markup("{}: {:.1f} pixels off").format(name, off)
        else:
            tip = Markup("{}: not labelled").format(name)
        parts.append(
            f'<circle cx="{x}" cy="{y}" r="{radius:.2f}" fill="#2fd0ff" stroke="#00324a" stroke-width=".5">'
            f"<title>{tip}</title></circle>"
        )
    return Markup(
        f'<svg viewBox="0 0 {small.width} {small.height}" role="img" aria-label="found and true points">'
        + "".join(parts)
        + "</svg>"
    )


def curve_chart(curve: Mapping[str, Sequence[float]], reference: Mapping[str, Sequence[float]] | None) -> Markup:
    """PCK by threshold with its interval; dashed, what guessing the mean place comes to."""
    at = curve["thresholds"]
    frame = Frame((at[0], at[-1]), (0, 1), width=300, height=200)
    parts = frame.axes("distance, as a share of the size", "share of points within", ticks(at[0], at[-1]), [0, 0.5, 1])
    around = [frame.at(x, y) for x, y in zip(at, curve["low"], strict=True)]
    around += [frame.at(x, y) for x, y in reversed(list(zip(at, curve["high"], strict=True)))]
    parts.append(path(around, "area accent", close=True))
    if reference:
        parts.append(path([frame.at(x, y) for x, y in zip(at, reference["value"], strict=True)], "ideal"))
    parts.append(path([frame.at(x, y) for x, y in zip(at, curve["value"], strict=True)], "line accent"))
    return frame.svg(parts, "Share of points within a distance")


def verdict(metrics: Mapping[str, Any]) -> dict[str, str]:
    guess = metrics["references"]["mean place"]
    better = metrics["nme"]["high"] is not None and metrics["nme"]["high"] < guess["nme"]["low"]
    text = (
        f"Points are found {100 * metrics['nme']['value']:.1f}% of the size of the object from where they are, "
        f"{metrics['pixels']['value']:.1f} pixels on average. Guessing each point's mean place comes to "
        f"{100 * guess['nme']['value']:.1f}%"
    )
    text += "." if better else ": this network is not surely better than that. Do not trust it."
    return {"tone": "good" if better else "care", "text": text}


def lanes(metrics: Mapping[str, Any], name: str) -> dict[str, Any]:
    rows = {"this model": metrics[name], "mean place": metrics["references"]["mean place"][name]}
    top = 1.0 if name.startswith("pck") else 1.1 * max(row["high"] or row["value"] or 1e-9 for row in rows.values())
    title, about = METRICS[name]
    digits = 1 if name == "pixels" else 3
    return {
        "title": title,
        "about": about,
        "top": short(top),
        "lanes": [
            {
                "name": each,
                "reference": place > 0,
                "text": figure(row, digits),
                **lane(row, lambda value: f"{100 * min(max(value / top, 0), 1):.2f}%"),
            }
            for place, (each, row) in enumerate(rows.items())
        ],
    }


def write_landmarks(
    folder: Path,
    manifest: Mapping[str, Any],
    metrics: Mapping[str, Any],
    cost: Mapping[str, Any],
    shots: Sequence[Shot],
    worst: Sequence[Shot],
) -> None:
    """Write report.html and README.md into a Bundle's folder.

    Args:
        shots, worst: test images drawn at random, and those with the largest errors.
    """
    names, data = manifest["classes"], manifest["data"]
    history = metrics["history"]
    title = f"{len(names)} points in {data['name']}"
    shown = {
        kind: [{"picture": picture(shot, names), "name": shot.name, "error": percent(shot.error)} for shot in group]
        for kind, group in (("shots", shots), ("worst", worst))
    }
    rows = [
        {
            "name": name,
            "n": count(row["n"]),
            "nme": fixed(row["value"]),
            "interval": interval_text(row),
            "pck": percent(row["pck_10"]),
        }
        for name, row in metrics["per_point"].items()
    ]
    about = {
        "method": method_text(manifest["method"]),
        "backbone": backbone_text(manifest["backbone"]),
        "error is a share of": metrics["normaliser"],
        "time": duration(manifest["seconds"]),
    }
    told = [*about.items(), *data_rows(data), *cost_rows(cost), *provenance(manifest)]
    page = {
        "title": title,
        "subtitle": f"{manifest['method']['name']} on {manifest['backbone']['name']}, measured on "
        f"{count(metrics['n'])} {metrics['split']} images with {count(metrics['points'])} labelled points.",
        "verdict": verdict(metrics),
        "plots": [lanes(metrics, name) for name in METRICS],
        "curve": curve_chart(metrics["curve"], metrics["references"]["mean place"].get("curve")),
        "training": curves_chart(history, {"train_loss": "muted"}, "training loss"),
        "validation": curves_chart(history, {"val_nme": "accent"}, "NME on validation images"),
        "rows": rows,
        "provenance": told,
        **shown,
    }
    write_page(folder / "report.html", "landmarks.html.j2", page)
    front = {
        "library_name": "foveal",
        "pipeline_tag": "keypoint-detection",
        "tags": ["foveal", "timm", "keypoint-detection", manifest["method"]["name"]],
    }
    card = {
        "title": title,
        "verdict": verdict(metrics)["text"],
        "names": list(names),
        "normaliser": metrics["normaliser"],
        "n": metrics["n"],
        "split": metrics["split"],
        "metrics": [
            (METRICS[name][0], figure(metrics[name]), figure(metrics["references"]["mean place"][name]))
            for name in METRICS
        ],
        "rows": [(row["name"], row["n"], row["nme"], row["interval"], row["pck"]) for row in rows],
        "provenance": page["provenance"],
    }
    write_markdown(folder / "README.md", "landmarks.md.j2", front, card)
