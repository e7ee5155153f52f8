"""The rows of a comparison: kept as they come, so that a kill loses at most one; summed up; written."""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from foveal.core.bundle import atomic_folder, read_json, write_json
from foveal.core.errors import UsageError
from foveal.core.folders import LOCK
from foveal.data.worlds import garbage
from foveal.evaluate.comparison import write_comparison
from foveal.evaluate.cost import runner, timed
from foveal.features.session import feature_session
from foveal.verbs._adapt import Adapted
from foveal.verbs._prepare import Prepared
from foveal.verbs._reference import REFERENCES

TIMED = 64
TABLES = {"comparison.json", "comparison.csv", "comparison.html"}


def check_out(out: Path) -> None:
    """Refuse to put a comparison in the place of anything but an older one.

    Raises:
        UsageError: naming what is there.
    """
    if out.is_dir():
        others = sorted({entry.name for entry in out.iterdir()} - TABLES)
        there = f"holds {others[0]}" if others else ""
    else:
        there = "is a file" if out.exists() else ""
    if there:
        raise UsageError(f"--out {out} {there} and is not overwritten: choose another --out")


class Ledger:
    """Finished rows in a folder that is this process's own, one line each; rows of another request are dropped."""

    def __init__(self, folder: Path, request: dict[str, Any]) -> None:
        self.folder = folder
        asked = folder / "request.json"
        try:
            same = read_json(asked) == request
        except (OSError, ValueError):
            same = False
        if not same:
            for entry in folder.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                elif entry.name != LOCK:
                    entry.unlink()
            write_json(asked, request)
        self.file = folder / "rows.jsonl"
        self.found: dict[tuple[str, int], dict[str, Any]] = {}
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []:
            try:
                row = json.loads(line)
                self.found[row["method"], row["seed"]] = row
            except (ValueError, TypeError, KeyError):  # the last line of a run that was killed
                continue

    def has(self, method: str, seed: int) -> bool:
        return (method, seed) in self.found

    def add(self, row: dict[str, Any]) -> None:
        self.found[row["method"], row["seed"]] = row
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self, methods: Iterable[str], seeds: range) -> list[dict[str, Any]]:
        return [self.found[method, seed] for method in methods for seed in seeds]


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method: means over seeds, and the standard deviation of each as `<metric>_std`."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    made: list[dict[str, Any]] = []
    for name in names:
        own = [row for row in rows if row["method"] == name]
        summary: dict[str, Any] = {"method": name, "seeds": len(own)}
        for key in own[0].keys() - {"method", "seed", "split"}:
            values = [row[key] for row in own if row[key] is not None]
            whole = key.endswith("_params")
            summary[key] = (
                None if not values else round(statistics.fmean(values)) if whole else statistics.fmean(values)
            )
            if key in ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece"):
                summary[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
        made.append(summary)
    return sorted(made, key=lambda row: (row["method"] in REFERENCES, -(row["balanced_accuracy"] or -math.inf)))


def images_per_second(adapted: Adapted, prepared: Prepared, device: str) -> float:
    """Measured now: decoded images through the model, as `foveal predict` runs it.

    Methods that read features share one measurement of the backbone; what differs is the time of their heads.
    """
    if adapted.method.reads_features():
        if device not in prepared.timed:
            session = feature_session(prepared.backbone, device=device)
            pixels = garbage(TIMED, prepared.backbone.preprocessing.size, 0)
            prepared.timed[device] = timed(lambda: session(pixels))
        head, features = adapted.classifier.head, adapted.test.features[:TIMED]
        with torch.inference_mode():
            spent = timed(lambda: head(features)) * TIMED / len(features)
        return round(TIMED / (prepared.timed[device] + spent), 1)
    run, _, _ = runner(adapted.classifier, prepared.backbone.preprocessing, device, None)
    pixels = garbage(TIMED, prepared.backbone.preprocessing.size, 0)
    return round(TIMED / timed(lambda: run(pixels)), 1)


def write_tables(out: Path, content: dict[str, Any]) -> None:
    """comparison.json, comparison.csv and comparison.html, all or none."""
    with atomic_folder(out) as folder:
        write_json(folder / "comparison.json", content)
        with (folder / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(content["rows"][0]))
            writer.writeheader()
            writer.writerows(content["rows"])
        write_comparison(folder / "comparison.html", summarise(content["rows"]), content)
