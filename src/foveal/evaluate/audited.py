"""index.html of an audit: how easily a classifier is fooled, beside changes of the same size that know nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from foveal.evaluate.attack import margin
from foveal.evaluate.charts import Frame, path, ticks
from foveal.evaluate.page import count, duration, percent, write_page

KINDS = {
    "attack": ("the attack", "warm"),
    "noise": ("random signs of its size", "accent"),
    "shuffled": ("its pixels shuffled", "muted"),
}
QUIET = 0.15
"""Where noise fools more images than this, the model breaks under any change of that size, and no attack is needed."""


def telling(sizes: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The largest size at which noise fools fewer than QUIET of the images: where an attack can show what it knows."""
    quiet = [row for row in sizes if row["noise"]["fooled"] < QUIET]
    return quiet[-1] if quiet else None


def verdict(found: Mapping[str, Any]) -> dict[str, str]:
    """What an audit comes to, in words, and whether it is good news."""
    row = telling(found["sizes"])
    if row is None:
        least = found["sizes"][0]
        return {
            "tone": "care",
            "text": f"Noise of {size(least)} already changes {percent(least['noise']['fooled'])} of the answers. The "
            "model breaks under noise of this size; whether the attack knows more cannot be told from it.",
        }
    attack, rival = row["attack"]["fooled"], max(row["noise"]["fooled"], row["shuffled"]["fooled"])
    within = margin(attack, found["n"]) + margin(rival, found["n"])
    told = f"At {size(row)}, one change for all images alters {percent(attack)} of the answers, noise of the same size "
    told += f"{percent(rival)}."
    if attack - rival > within:
        text = f"{told} The model has a weakness that can be found without its labels; {heard(row)}"
        return {"tone": "care", "text": text}
    return {"tone": "good", "text": f"{told} This attack found nothing that noise does not; others may."}


def heard(row: Mapping[str, Any]) -> str:
    changed = row["attack"]["fooled"]
    share = 1 - row["attack"]["silent"] / changed if changed else 0.0
    return f"{percent(share)} of the altered answers are reported as unknown."


def size(row: Mapping[str, Any]) -> str:
    return "a patch" if row["eps"] >= 1 else f"{255 * row['eps']:.3g}/255"


def fooling_chart(sizes: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Share of answers altered against the size of the change; None for a single size."""
    if len(sizes) < 2:
        return None
    top = max(row[kind]["fooled"] for row in sizes for kind in KINDS) * 1.1 or 0.1
    frame = Frame((0, 255 * sizes[-1]["eps"]), (0, min(1.0, top)), width=420, height=220)
    parts = frame.axes(
        "largest change of a pixel, of 255", "answers altered", ticks(*frame.x, about=5), ticks(*frame.y)
    )
    for kind, (name, colour) in KINDS.items():
        points = [(0.0, 0.0), *((255 * row["eps"], row[kind]["fooled"]) for row in sizes)]
        parts.append(path([frame.at(*point) for point in points], f"line {colour}"))
        for eps, share in points[1:]:
            x, y = frame.at(eps, share)
            tip = escape(f"{name}, {eps:.3g}/255: {percent(share)}")
            parts.append(f'<circle class="dot {colour}" cx="{x}" cy="{y}" r="3"><title>{tip}</title></circle>')
    return frame.svg(parts, "Answers altered by the size of the change")


def amplified(delta: np.ndarray) -> np.ndarray:
    """A change [3, S, S] as a picture uint8 [S, S, 3]: grey is nothing, its largest value black or white."""
    largest = float(np.abs(delta).max()) or 1.0
    return np.rint(127.5 + 127.5 * delta.transpose(1, 2, 0) / largest).astype(np.uint8)


def jpeg(pixels: np.ndarray) -> str:
    """uint8 [S, S, 3] -> a JPEG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def write_audit(
    file: str | Path, found: Mapping[str, Any], examples: Sequence[Mapping[str, Any]], context: Mapping[str, Any]
) -> None:
    """Write index.html.

    Args:
        found: `sweep` of the attack, with `corruptions`: kind -> figures by strength.
        examples: each with `name`, `clean`, `change`, `attacked` (uint8 [S, S, 3]) and the answers `said`, `then`.
        context: `bundle`, `method`, `measured` (which images), `learnt` (from which images), `seconds`, and whatever
            else belongs under provenance.
    """
    clean, accurate = found["clean"], "accuracy" in found["clean"]
    rows = [
        {
            "size": size(row),
            "kind": name,
            "chosen": kind == "attack",
            "accuracy": percent(row[kind].get("accuracy")),
            "fooled": f"{percent(row[kind]['fooled'])} ± {percent(margin(row[kind]['fooled'], found['n']))}",
            "unknown": percent(row[kind]["unknown"]),
            "silent": percent(row[kind]["silent"]),
            "rms": f"{255 * row[kind]['rms']:.2f}",
        }
        for row in found["sizes"]
        for kind, (name, _) in KINDS.items()
    ]
    page = {
        "title": f"How easily is {Path(str(context['bundle'])).name} fooled?",
        "subtitle": f"{context['method']} against {context['bundle']}, measured on {context['measured']}.",
        "verdict": verdict(found),
        "clean": {
            "accuracy": percent(clean["accuracy"]) if accurate else None,
            "unknown": percent(clean["unknown"]),
            "n": count(found["n"]),
        },
        "chart": fooling_chart(found["sizes"]),
        "key": list(KINDS.values()),
        "rows": rows,
        "corruptions": [
            {"name": name, "accuracy": [percent(each["accuracy" if accurate else "fooled"]) for each in strengths]}
            for name, strengths in found["corruptions"].items()
        ],
        "accurate": accurate,
        "examples": [
            {
                "name": each["name"],
                "said": each["said"],
                "then": each["then"],
                **{key: jpeg(each[key]) for key in ("clean", "change", "attacked")},
            }
            for each in examples
        ],
        "provenance": [(key, str(value)) for key, value in context.items() if key != "seconds"]
        + [("time", duration(context["seconds"]))],
    }
    write_page(file, "audit.html.j2", page)
