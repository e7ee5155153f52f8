"""report.html and README.md of a network of forecasts: numbers, and futures drawn beside what came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from foveal.evaluate.card import write_markdown
from foveal.evaluate.charts import curves_chart, short
from foveal.evaluate.page import (
    count,
    data_rows,
    duration,
    figure,
    fixed,
    lane,
    method_text,
    write_page,
)
from foveal.evaluate.report import provenance

SIDE = 240
METRICS = {
    "ade": ("ADE", "mean distance of the most likely future from what came, over its steps; lower is better"),
    "fde": ("FDE", "that distance at the last step; lower is better"),
    "best_ade": ("Best ADE", "ADE of the closest of all futures; lower is better"),
    "best_fde": ("Best FDE", "FDE of the closest of all futures; lower is better"),
    "dispersion": (
        "Dispersion D",
        "how far apart forecasts of one instant lie that were made at different times: root of their mean squared "
        "distance from their centre; lower is better",
    ),
}


@dataclass(frozen=True)
class Scene:
    """A forecast: past [H + 1, 2], what came [T, 2], futures [K, T, 2] and their probabilities [K]."""

    agent: str
    past: np.ndarray
    future: np.ndarray
    modes: np.ndarray
    weights: np.ndarray

    @property
    def error(self) -> float:
        """FDE of the most likely future."""
        return float(np.linalg.norm(self.modes[0, -1] - self.future[-1]))


def picture(scene: Scene) -> Markup:
    """Past (grey), what came (orange), futures (blue, the likelier the stronger)."""
    everything = np.concatenate([scene.past, scene.future, scene.modes[scene.weights > 0.02].reshape(-1, 2)])
    low, high = everything.min(0), everything.max(0)
    span = float(max((high - low).max(), 1e-9)) * 1.1
    corner = (low + high) / 2 - span / 2

    def line(points: np.ndarray, colour: str, width: float, opacity: float = 1.0) -> str:
        at = (points - corner) / span * SIDE
        joined = "L".join(f"{x:.1f} {SIDE - y:.1f}" for x, y in at)
        return (
            f'<path d="M{joined}" fill="none" stroke="{colour}" stroke-width="{width:g}" stroke-linecap="round" '
            f'stroke-opacity="{opacity:.2f}"/>'
        )

    now = scene.past[-1:]
    parts = [line(scene.past, "#8a8f98", 3), line(np.concatenate([now, scene.future]), "#ff8a1f", 4)]
    for mode, sure in reversed(list(zip(scene.modes, scene.weights, strict=True))):
        if sure > 0.02:
            parts.append(line(np.concatenate([now, mode]), "#1f8fff", 2, 0.25 + 0.75 * float(sure)))
    return Markup(
        f'<svg viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="forecast and true trajectory">'
        + "".join(parts)
        + "</svg>"
    )


def verdict(metrics: Mapping[str, Any]) -> dict[str, str]:
    straight = metrics["references"]["straight on"]["fde"]
    found = metrics["fde"]
    better = found["high"] is not None and found["high"] < straight["low"]
    text = (
        f"After {metrics['steps']} steps of {metrics['dt']:g} s, the most likely future is {found['value']:.3g} away "
        f"from what came; going straight on comes to {straight['value']:.3g}"
    )
    text += "." if better else ": this network is not surely better than that. Do not trust it."
    return {"tone": "good" if better else "care", "text": text}


def lanes(metrics: Mapping[str, Any], name: str) -> dict[str, Any]:
    rows = {"this network": metrics[name], "straight on": metrics["references"]["straight on"][name]}
    top = 1.1 * max(row["high"] or row["value"] or 1e-9 for row in rows.values())
    return {
        "title": METRICS[name][0],
        "about": METRICS[name][1],
        "top": short(top),
        "lanes": [
            {
                "name": each,
                "reference": place > 0,
                "text": figure(row),
                **lane(row, lambda value: f"{100 * min(max(value / top, 0), 1):.2f}%"),
            }
            for place, (each, row) in enumerate(rows.items())
        ],
    }


def write_forecasts(
    folder: Path,
    manifest: Mapping[str, Any],
    metrics: Mapping[str, Any],
    cost: Mapping[str, Any],
    scenes: Sequence[Scene],
    worst: Sequence[Scene],
) -> None:
    """Write report.html and README.md into a Bundle's folder.

    Args:
        scenes, worst: test forecasts drawn at random, and those with the largest errors.
    """
    data, history = manifest["data"], metrics["history"]
    title = f"Forecasts of {data['name']}"
    shown = {
        kind: [{"picture": picture(each), "name": each.agent, "error": fixed(each.error)} for each in group]
        for kind, group in (("scenes", scenes), ("worst", worst))
    }
    straight = metrics["references"]["straight on"]
    shown_metrics = [name for name in METRICS if metrics[name]["value"] is not None]
    ranges = [
        {"within": within, "value": figure(row), "straight": figure(straight["convergence"][within])}
        for within, row in metrics["convergence"].items()
        if row["value"] is not None
    ]
    spent = cost["latency"][0]
    told = [
        ("method", method_text(manifest["method"])),
        ("maps", "read" if manifest["maps"] else "none"),
        *data_rows(data),
        ("parameters", count(cost["parameters"]["total"])),
        ("latency", f"{spent['milliseconds']:.1f} ms for one forecast ({spent['engine']})"),
        ("time", duration(manifest["seconds"])),
        *provenance({"backbone": {}, **manifest}),
    ]
    page = {
        "title": title,
        "subtitle": f"{manifest['method']['name']}, measured on {count(metrics['n'])} forecasts of "
        f"{count(metrics['agents'])} {metrics['split']} agents; distances in the unit of x and y.",
        "verdict": verdict(metrics),
        "plots": [lanes(metrics, name) for name in shown_metrics],
        "ranges": ranges,
        "instants": count(metrics["instants"]),
        "training": curves_chart(history, {"train_loss": "muted"}, "training loss"),
        "validation": curves_chart(history, {"val_fde": "accent"}, "FDE on validation agents"),
        "provenance": told,
        **shown,
    }
    write_page(folder / "report.html", "forecast.html.j2", page)
    front = {"library_name": "foveal", "tags": ["foveal", "trajectory-forecasting", manifest["method"]["name"]]}
    card = {
        "title": title,
        "verdict": verdict(metrics)["text"],
        "n": metrics["n"],
        "agents": metrics["agents"],
        "split": metrics["split"],
        "history": manifest["history"],
        "dt": manifest["dt"],
        "metrics": [(METRICS[name][0], figure(metrics[name]), figure(straight[name])) for name in shown_metrics]
        + [(f"C({row['within']}), seconds", row["value"], row["straight"]) for row in ranges],
        "provenance": told,
    }
    write_markdown(folder / "README.md", "forecast.md.j2", front, card)
