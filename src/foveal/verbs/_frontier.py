"""What an accelerated model would cost and answer at other budgets."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from foveal.core.families.shrink import Accelerate
from foveal.core.method import Classifier
from foveal.evaluate.beside import share_of
from foveal.evaluate.calibration import to_probabilities
from foveal.evaluate.metrics import measure
from foveal.ship.beside import Exporter
from foveal.ship.variants import time_in_turns
from foveal.train.classify import predict_logits
from foveal.verbs._prepare import Prepared

SECONDS = 2.0


def frontier(
    method: Accelerate, model: Classifier, prepared: Prepared, test: np.ndarray, exporter: Exporter, device: str
) -> list[dict[str, Any]]:
    """`model` as it is and at each budget of the method, from dear to cheap: name, share of its MACs, balanced
    accuracy on the test rows, and milliseconds of one image in ONNX Runtime, all timed in turns in this run. Nothing if
    the method has no budgets."""
    models = {"dense": model, **method.frontier(model)}
    if len(models) == 1:
        return []
    preprocessing, dataset = exporter.preprocessing, prepared.dataset
    size = preprocessing.size
    with tempfile.TemporaryDirectory() as folder:
        runtimes = {
            name: exporter.runtime(each, Path(folder) / f"{place}.onnx")
            for place, (name, each) in enumerate(models.items())
        }
        timed = time_in_turns(runtimes, np.zeros((1, size, size, 3), np.uint8), batches=(1,), seconds=SECONDS)
    rows: list[dict[str, Any]] = []
    for name, each in models.items():
        logits, _ = predict_logits(each, dataset, test, preprocessing, device=device)
        probabilities = to_probabilities(logits.numpy(), dataset.task)
        right = measure(probabilities, dataset.labels[test], dataset.classes, dataset.task, resamples=0)
        rows.append(
            {
                "name": name,
                "macs": round(share_of("macs", each, model, size), 4),
                "milliseconds": timed[name][0]["milliseconds"],
                "balanced_accuracy": right["balanced_accuracy"]["value"],
            }
        )
    return rows
