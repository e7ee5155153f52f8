"""comparison.html: methods side by side over seeds, beside the reference rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foveal.evaluate.charts import place
from foveal.evaluate.page import METRICS, REFERENCES, count, duration, fixed, lane, listed, quantity, write_page


def write_comparison(path: str | Path, rows: Sequence[Mapping[str, Any]], context: Mapping[str, Any]) -> None:
    """Write comparison.html.

    Args:
        rows: one per method, best first, reference rows last: `method`, `seeds`, each metric as the mean over seeds and
            `<metric>_std` (None for one seed), `seconds`, `trained_params`, `total_params`, `images_per_second`.
        context: `data`, `backbone`, `images`, `classes`, `reading_seconds`, and `rows`: the same per method and seed.
    """
    each = list(context["rows"])
    seeds = sorted({row["seed"] for row in each})
    methods = [row for row in rows if row["method"] not in REFERENCES]
    names = [name for name in METRICS if any(row.get(name) is not None for row in rows)]
    columns = {
        "seconds": "seconds to fit",
        "trained_params": "trained parameters",
        "total_params": "all parameters",
        "images_per_second": "images/s",
    }
    page = {
        "title": f"{context['data']}: {count(len(methods))} method{'' if len(methods) == 1 else 's'} compared",
        "subtitle": f"{count(context['images'])} images, {count(len(context['classes']))} classes, on frozen or "
        f"fine-tuned {context['backbone']}; measured on test images that training never saw.",
        "verdict": comparison_verdict(methods, rows, len(seeds)),
        "plots": [dot_plot(name, rows, each) for name in ("balanced_accuracy", "auroc") if name in names],
        "seeds": len(seeds),
        "columns": ["method", *(METRICS[name][0] for name in names), *columns.values()],
        "table": [
            {
                "name": REFERENCES.get(row["method"], row["method"]),
                "kind": "reference" if row["method"] in REFERENCES else "chosen" if row is rows[0] else "",
                "cells": [
                    *({"text": fixed(row.get(name)), "spread": deviation(row, name)} for name in names),
                    *({"text": quantity(row.get(name)), "spread": ""} for name in columns),
                ],
            }
            for row in rows
        ],
        "provenance": [
            ("data", f"{context['data']}: {count(context['images'])} images"),
            ("classes", listed(context["classes"])),
            ("backbone", context["backbone"]),
            ("seeds", ", ".join(map(str, seeds))),
            ("reading images and computing features", duration(context.get("reading_seconds"))),
            ("majority class", "always answers the most frequent class of the training split"),
            ("brightness alone", "logistic regression on the mean and standard deviation of each image"),
        ],
    }
    write_page(path, "comparison.html.j2", page)


def comparison_verdict(
    methods: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], seeds: int
) -> dict[str, str]:
    judged = [row for row in methods if row.get("balanced_accuracy") is not None]
    if not judged:
        return {"tone": "care", "text": "No method could be judged on these images."}
    best, *others = sorted(judged, key=lambda row: -row["balanced_accuracy"])
    text = f"Best balanced accuracy: {best['method']}, {spread(best, 'balanced_accuracy')}"
    if others:
        text += f"; then {others[0]['method']}, {spread(others[0], 'balanced_accuracy')}"
    text += f", over {seeds} seed{'' if seeds == 1 else 's'}."
    rivals = [row for row in rows if row["method"] in REFERENCES and row.get("balanced_accuracy") is not None]
    if rivals:
        top = max(rivals, key=lambda row: row["balanced_accuracy"])
        against = f"{REFERENCES[top['method']]} ({fixed(top['balanced_accuracy'])})"
        if best["balanced_accuracy"] <= top["balanced_accuracy"]:
            return {"tone": "care", "text": f"{text} It is not above {against}."}
        below = [row["method"] for row in judged if row["balanced_accuracy"] <= top["balanced_accuracy"]]
        text += f" {'All are' if not below else 'Not all are'} above {against}"
        text += f": {', '.join(below)} {'is' if len(below) == 1 else 'are'} not." if below else "."
    return {"tone": "good", "text": text}


def dot_plot(name: str, rows: Sequence[Mapping[str, Any]], each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A lane per method: a ring per seed, a dot at the mean, a bar of its 95% t-interval over seeds."""
    values = [row[name] for row in each if row.get(name) is not None]
    low = max(0.0, math.floor((min(values) - 0.02) * 20) / 20)
    high = min(1.0, math.ceil((max(values) + 0.02) * 20) / 20)
    at = place(low, high)
    lanes = []
    for row in rows:
        own = [one for one in each if one["method"] == row["method"] and one.get(name) is not None]
        entry = {"value": row.get(name), "low": None, "high": None}
        over_seeds = row.get(f"{name}_std")
        if over_seeds is not None and len(own) > 1:
            half = t_quantile(len(own) - 1) * over_seeds / math.sqrt(len(own))
            entry |= {"low": entry["value"] - half, "high": entry["value"] + half}
        dots = [{"at": at(one[name]), "seed": one["seed"], "text": fixed(one[name])} for one in own if len(own) > 1]
        lanes.append(
            {
                "name": REFERENCES.get(row["method"], row["method"]),
                "reference": row["method"] in REFERENCES,
                "text": spread(row, name),
                "dots": dots,
                **lane(entry, at),
            }
        )
    several = any(len(item["dots"]) > 1 for item in lanes)
    about = METRICS[name][1][0].upper() + METRICS[name][1][1:] + "."
    return {
        "name": METRICS[name][0],
        "about": about + (" A ring per seed, the mean, and its 95% interval over seeds." if several else ""),
        "lanes": lanes,
        "low": f"{low:.2f}",
        "middle": f"{(low + high) / 2:.3g}",
        "high": f"{high:.2f}",
    }


def t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t (a table up to 10 degrees, Cornish-Fisher beyond)."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    z = 1.959964
    if freedom <= len(table):
        return table[freedom - 1]
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def spread(row: Mapping[str, Any], name: str) -> str:
    return f"{fixed(row.get(name))} {deviation(row, name)}".rstrip()


def deviation(row: Mapping[str, Any], name: str) -> str:
    value = row.get(f"{name}_std")
    return "" if value is None else f"± {value:.3f}"
