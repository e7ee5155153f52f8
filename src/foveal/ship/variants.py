"""Which way of running an exported model is the fastest that still answers as it should: measured, never assumed."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveal.core.errors import FovealError
from foveal.core.task import Task
from foveal.evaluate.metrics import measure
from foveal.ship.runtime import FP32, VARIANTS, Runtime

BATCHES = (1, 8)
"""Batches that are timed; 'faster' means faster at each of them."""
FASTER = 1.05
"""How many times as fast as fp32 a variant must be: less is noise, and not worth a second file."""
AGREEMENT = 0.95
"""Share of images whose unknown decision must be that of fp32, among known ones and among garbage alike."""
ROUNDS = (15, 60)
"""Fewest and most repetitions of each timing."""
SECONDS = 4.0
"""How long the repetitions of one batch go on, once there are enough."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Images on which variants are judged; none of them calibrated.

    Attributes:
        squares: uint8 [n, S, S, 3]. labels: [n] into the Bundle's classes, or [n, C] of 0 and 1.
        garbage: uint8 [g, S, S, 3], pictures that resemble no photo.
    """

    squares: NDArray[np.uint8]
    labels: NDArray[Any]
    garbage: NDArray[np.uint8]


def compare_variants(
    files: Mapping[str, Path],
    held_out: HeldOut,
    *,
    max_drop: float,
    threads: int,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict[str, Any]], str]:
    """Time and judge every variant whose file is there, all in one run.

    Calls of the variants take turns, so that whatever else the machine does meets all of them alike. A variant is
    accepted when it is at least FASTER times as fast as fp32 at every batch, loses at most `max_drop` of balanced
    accuracy and decides on unknown images as fp32 does (AGREEMENT).

    Args:
        files: path of 'model.onnx' and, where there is one, 'model.int8.onnx'.
        max_drop: of balanced accuracy, in 0..1.
        threads: of every call.

    Returns:
        Rows ready for cost.json, fp32 first: name, engine, precision, file, threads, accepted, reason; unless the
        variant cannot run here also bytes, batch, milliseconds (median), images_per_second (these at the first of
        BATCHES), timings (the same at each), speedup (geometric mean over BATCHES), balanced_accuracy, drop, changed
        (share of images with another label), unknown_agreement, garbage_agreement. And the name of the fastest
        accepted variant.
    """
    opened: dict[str, Runtime] = {}
    refused: dict[str, str] = {}
    for name, variant in VARIANTS.items():
        if variant.file not in files:
            refused[name] = f"{variant.file} was not made"
            continue
        if variant.precision == "bf16" and not computes_bf16():
            refused[name] = "this processor does not compute in bf16"
            continue
        try:
            opened[name] = Runtime(files[variant.file], threads, variant)
        except FovealError as error:
            refused[name] = str(error)
    timings = time_in_turns(opened, held_out.squares)
    reference = Judged.by(opened[FP32.name], held_out)
    rows: list[dict[str, Any]] = []
    for name, variant in VARIANTS.items():
        about = {"name": name, "engine": variant.engine, "precision": variant.precision, "file": variant.file}
        if name in refused:
            rows.append({**about, "threads": threads, "accepted": False, "reason": refused[name]})
            continue
        judged = reference if variant is FP32 else Judged.by(opened[name], held_out)
        measured = {
            **about,
            "engine": opened[name].engine,
            "threads": threads,
            "bytes": files[variant.file].stat().st_size,
            **timings[name][0],
            "timings": timings[name],
            "speedup": round(speedup(timings[name], timings[FP32.name]), 3),
            **judged.beside(reference),
        }
        faults = [] if variant is FP32 else faults_of(measured, timings[FP32.name], max_drop)
        reason = "the reference" if variant is FP32 else "faster and within the budget"
        rows.append({**measured, "accepted": not faults, "reason": "; ".join(faults) or reason})
        say(line(rows[-1]))
    accepted = [row for row in rows if row["accepted"]]
    return rows, max(accepted, key=lambda row: row["speedup"])["name"]


@dataclass(frozen=True, eq=False)
class Judged:
    """Answers of one variant to the held-out images and to garbage."""

    labels: NDArray[np.bool_]
    unknown: NDArray[np.bool_]
    garbage: NDArray[np.bool_]
    accuracy: float | None
    balanced_accuracy: float | None

    @staticmethod
    def by(runtime: Runtime, held_out: HeldOut) -> Judged:
        probabilities, scores = in_batches(runtime, held_out.squares)
        _, garbage = in_batches(runtime, held_out.garbage)
        multi = runtime.task == "multi-label"
        best = probabilities.argmax(1)[:, None] == np.arange(len(runtime.classes))
        try:
            task: Task = "multi-label" if multi else "single-label"
            found = measure(probabilities, held_out.labels, runtime.classes, task, resamples=0)
            right = [found[name]["value"] for name in ("accuracy", "balanced_accuracy")]
        except FovealError:  # probabilities that are not finite
            right = [None, None]
        known = [scores <= runtime.threshold, garbage <= runtime.threshold]
        return Judged(probabilities >= 0.5 if multi else best, ~known[0], ~known[1], *right)

    def beside(self, reference: Judged) -> dict[str, Any]:
        mine, other = self.balanced_accuracy, reference.balanced_accuracy
        return {
            "balanced_accuracy": mine,
            "drop": None if mine is None or other is None else other - mine,
            "changed": float((self.labels != reference.labels).any(1).mean()),
            "unknown_agreement": float((self.unknown == reference.unknown).mean()),
            "garbage_agreement": float((self.garbage == reference.garbage).mean()),
        }


def in_batches(runtime: Runtime, squares: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    size = max(BATCHES)
    parts = [runtime(squares[at : at + size]) for at in range(0, len(squares), size)]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def time_in_turns(
    runtimes: Mapping[str, Callable[[NDArray[np.uint8]], object]],
    squares: NDArray[np.uint8],
    *,
    batches: Sequence[int] = BATCHES,
    seconds: float = SECONDS,
) -> dict[str, list[dict[str, Any]]]:
    """Median time of a call for each batch; the runtimes take turns, each round starting with another."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in runtimes}
    names = list(runtimes)
    for batch in batches:
        given = np.resize(squares, (batch, *squares.shape[1:]))
        spent: dict[str, list[float]] = {name: [] for name in names}
        for run in runtimes.values():
            run(given)
        begin = time.perf_counter()
        for turn in itertools.count():
            enough = turn >= ROUNDS[0] and time.perf_counter() - begin > seconds
            if enough or turn >= ROUNDS[1]:
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                start = time.perf_counter()
                runtimes[name](given)
                spent[name].append(time.perf_counter() - start)
        for name in names:
            median = statistics.median(spent[name])
            rows[name].append(
                {
                    "batch": batch,
                    "milliseconds": round(1000 * median, 3),
                    "images_per_second": round(batch / median, 1),
                }
            )
    return rows


def speedup(timings: Sequence[Mapping[str, float]], reference: Sequence[Mapping[str, float]]) -> float:
    """Geometric mean over batches."""
    pairs = zip(timings, reference, strict=True)
    return statistics.geometric_mean(other["milliseconds"] / mine["milliseconds"] for mine, other in pairs)


def faults_of(row: Mapping[str, Any], reference: Sequence[Mapping[str, Any]], max_drop: float) -> list[str]:
    """What a variant fails, in numbers; nothing when it is accepted."""
    faults: list[str] = []
    slow = [
        f"{mine['milliseconds']:.2f} ms against {other['milliseconds']:.2f} ms at batch {mine['batch']}"
        for mine, other in zip(row["timings"], reference, strict=True)
        if other["milliseconds"] < FASTER * mine["milliseconds"]
    ]
    if slow:
        faults.append(f"not {FASTER:.2f} times as fast as fp32 ({', '.join(slow)})")
    if row["drop"] is None:
        faults.append("its balanced accuracy cannot be measured")
    elif row["drop"] > max_drop:
        faults.append(f"loses {row['drop']:.4f} of balanced accuracy, more than {max_drop:g}")
    for key, images in (("unknown_agreement", "held-out"), ("garbage_agreement", "garbage")):
        if row[key] < AGREEMENT:
            faults.append(f"decides alike on unknown for {row[key]:.1%} of {images} images, not {AGREEMENT:.0%}")
    return faults


def line(row: Mapping[str, Any]) -> str:
    verdict = "accepted" if row["accepted"] else f"refused: {row['reason']}"
    return f"{row['name']}: {row['milliseconds']:.2f} ms an image, {row['speedup']:.2f} times fp32, {verdict}"


def computes_bf16() -> bool:
    """Whether OpenVINO says that this processor multiplies in bf16; yes without OpenVINO, whose absence says more."""
    try:
        import openvino
    except ImportError:
        return True
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def why_no_int8(rows: Sequence[Mapping[str, Any]]) -> str:
    """Why no int8 variant was accepted, in one line; '' when one was."""
    int8 = [row for row in rows if row["precision"] == "int8"]
    if any(row["accepted"] for row in int8):
        return ""
    return "; ".join(f"{row['name']}: {row['reason']}" for row in int8)
