"""A model before and after it was shrunk, side by side: what was gained, what was lost, and is that too much."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from foveal.core.families.shrink import Quantity
from foveal.core.method import Classifier
from foveal.evaluate.cost import macs
from foveal.evaluate.page import count, fixed, quantity

FASTER = 1.05
"""How many times as fast a model must be at every batch to be called faster: less is noise."""


def numbers(model: nn.Module) -> int:
    """How many weights and biases a model computes with, however they are stored."""
    derived = [value for name, value in hidden(model).items() if name.rpartition(".")[2] == "weight"]
    return sum(each.numel() for each in [*model.parameters(), *derived])


def hidden(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that the state dict leaves out, by name: what is computed from stored codes, among others."""
    stored = model.state_dict().keys()
    return {name: value for name, value in model.named_buffers() if name not in stored}


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's state dict."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def share_of(quantity: Quantity, model: Classifier, reference: Classifier, size: int) -> float:
    """How much of the reference's parameters, MACs (of an image of `size` pixels) or bytes a model has."""
    if quantity == "params":
        return numbers(model) / numbers(reference)
    if quantity == "macs":
        return macs(model, size) / macs(reference, size)
    return stored_bytes(model) / stored_bytes(reference)


def judged(
    sides: Mapping[str, Mapping[str, Any]], *, max_drop: float, test_images: int, timing: Mapping[str, Any]
) -> dict[str, Any]:
    """The record of a comparison, for cost.json and the report.

    Args:
        sides: 'before', 'after' and perhaps 'after, int8'; each with parameters, macs, bytes, balanced_accuracy,
            accuracy, and latency (rows of batch, milliseconds, images_per_second; empty when it was not timed).
        max_drop: balanced accuracy that may be lost.
        timing: engine and threads, and `reason` when something could not be timed.
    """
    before, after = sides["before"], sides["after"]
    old, new = before["balanced_accuracy"], after["balanced_accuracy"]
    drop = None if old is None or new is None else old - new
    speedup = {name: speed(before["latency"], side["latency"]) for name, side in sides.items() if name != "before"}
    record: dict[str, Any] = {
        "sides": {name: dict(side) for name, side in sides.items()},
        "test_images": test_images,
        **timing,
        "speedup": {name: each and round(each["mean"], 3) for name, each in speedup.items()},
        "faster": {name: bool(each and each["least"] >= FASTER) for name, each in speedup.items()},
        "drop": drop,
        "max_drop": max_drop,
        "accepted": drop is not None and drop <= max_drop,
    }
    return {**record, "verdict": verdict(record)}


def speed(before: list[dict[str, float]], after: list[dict[str, float]]) -> dict[str, float] | None:
    """How many times as fast, at least and as the geometric mean over batches; None when one was not timed."""
    if not before or not after:
        return None
    times = [old["milliseconds"] / new["milliseconds"] for old, new in zip(before, after, strict=True)]
    return {"least": min(times), "mean": statistics.geometric_mean(times)}


def verdict(record: Mapping[str, Any]) -> str:
    """Lost, allowed and gained, in one line."""
    drop, allowed = record["drop"], f"--max-drop {record['max_drop']:g}"
    if drop is None:
        lost = "refused: its balanced accuracy cannot be measured"
    elif record["accepted"]:
        change = f"loses {drop:.4f}" if drop > 0 else f"gains {-drop:.4f}" if drop < 0 else "loses nothing"
        lost = f"accepted: {change} of balanced accuracy on {record['test_images']:,} test images ({allowed})"
    else:
        lost = f"refused: loses {drop:.4f} of balanced accuracy, more than {allowed}"
    said = [speed_text(name, times, record["faster"][name]) for name, times in record["speedup"].items()]
    return "; ".join([lost, *filter(None, said)])


def speed_text(name: str, times: float | None, faster: bool) -> str:
    whose = "" if name == "after" else f"{name.partition(', ')[2]} "
    if times is None:
        return f"{whose}not timed"
    return f"{whose}{times:.2f} times as fast" if faster else f"{whose}not faster ({times:.2f} times)"


def sides(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table: one row per quantity, one column per side."""
    given: Mapping[str, Mapping[str, Any]] = record["sides"]
    names = list(given)
    rows = [
        ["parameters", *(count(given[name]["parameters"]) for name in names)],
        ["multiply-accumulates (million)", *(millions(given[name]["macs"]) for name in names)],
        ["file (MB)", *(millions(given[name]["bytes"]) for name in names)],
    ]
    for place, timed in enumerate(given["before"]["latency"]):
        row = [given[name]["latency"][place]["milliseconds"] if given[name]["latency"] else None for name in names]
        images = "one image" if timed["batch"] == 1 else f"{timed['batch']} images"
        rows.append([f"milliseconds, {images}", *(quantity(each) for each in row)])
    for key in ("accuracy", "balanced_accuracy"):
        rows.append([key.replace("_", " "), *(fixed(given[name][key]) for name in names)])
    return ["", *names], rows


def millions(value: int | None) -> str:
    return "–" if value is None else quantity(value / 1e6)
