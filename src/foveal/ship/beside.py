"""Models exported and timed in turns, all in one run: whatever else the machine does meets all of them alike."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foveal.blocks.codes import Codes
from foveal.core.errors import FovealError
from foveal.core.method import Classifier
from foveal.core.preprocessing import Preprocessing
from foveal.core.task import Task
from foveal.evaluate.calibration import Calibrated
from foveal.evaluate.ood import Energy
from foveal.ship.export import export_onnx
from foveal.ship.quantize import quantize
from foveal.ship.runtime import VARIANTS, Runtime
from foveal.ship.variants import SECONDS, HeldOut, Judged, time_in_turns


@dataclass(frozen=True)
class Exporter:
    """Writes classifiers as ONNX files and opens them in ONNX Runtime.

    Attributes:
        images: photos to check each export on, against torch.
    """

    preprocessing: Preprocessing
    classes: Sequence[str]
    task: Task
    images: Sequence[Image.Image]
    threads: int

    def file(self, classifier: Classifier, path: Path) -> Path:
        """
        Raises:
            FovealError: the model cannot be expressed in ONNX, or answers otherwise there.
        """
        model = Calibrated(classifier, 1.0, Energy(), self.task).eval()
        export_onnx(model, self.preprocessing, path, images=self.images, classes=self.classes, threshold=0.0)
        return path

    def runtime(self, classifier: Classifier, path: Path) -> Runtime:
        return Runtime(self.file(classifier, path), self.threads)


def latency_share(exporter: Exporter, model: Classifier, reference: Classifier, seconds: float = 1.0) -> float:
    """Milliseconds of one image over the reference's, both timed in turns in ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        runtimes = {
            name: exporter.runtime(each, Path(folder) / f"{name}.onnx")
            for name, each in (("reference", reference), ("model", model))
        }
        size = exporter.preprocessing.size
        timed = time_in_turns(runtimes, np.zeros((1, size, size, 3), np.uint8), batches=(1,), seconds=seconds)
    return timed["model"][0]["milliseconds"] / timed["reference"][0]["milliseconds"]


@dataclass(frozen=True, eq=False)
class Beside:
    """What timing gave.

    Attributes:
        latency: rows of batch, milliseconds, images_per_second by model; nothing for one that cannot be exported.
        int8: bytes, balanced_accuracy and accuracy of the integer model; None without codes.
        about: engine, threads, and why something is missing.
    """

    latency: dict[str, list[dict[str, Any]]]
    int8: dict[str, Any] | None
    about: dict[str, Any]


def timed_beside(
    exporter: Exporter,
    models: Mapping[str, Classifier],
    held_out: HeldOut,
    codes: Sequence[tuple[NDArray[np.float32], Codes]] = (),
    calibrating: Sequence[NDArray[np.uint8]] = (),
    seconds: float = SECONDS,
) -> Beside:
    """Time 'before' and 'after' in turns; with codes of the latter's weights also 'after, int8', which is made of them.

    Args:
        calibrating: squares uint8 [S, S, 3] of training images, for the ranges of activations.
        seconds: of timing each batch.
    """
    with tempfile.TemporaryDirectory() as folder:
        runtimes: dict[str, Runtime] = {}
        reasons: list[str] = []
        int8: dict[str, Any] | None = None
        for name, model in models.items():
            try:
                runtimes[name] = exporter.runtime(model, Path(folder) / f"{name}.onnx")
            except FovealError as error:
                reasons.append(f"{name}: {error}")
        if codes and "after" in runtimes:
            target = Path(folder) / "int8.onnx"
            quantize(Path(folder) / "after.onnx", target, calibrating, exporter.threads, codes)
            runtimes["after, int8"] = Runtime(target, exporter.threads, VARIANTS["int8"])
            answered = Judged.by(runtimes["after, int8"], held_out)
            int8 = {
                "bytes": target.stat().st_size,
                "balanced_accuracy": answered.balanced_accuracy,
                "accuracy": answered.accuracy,
            }
        latency = time_in_turns(runtimes, held_out.squares, seconds=seconds) if runtimes else {}
        engine = next(iter(runtimes.values())).engine if runtimes else None
    about = {"engine": engine, "threads": exporter.threads, **({"reason": "; ".join(reasons)} if reasons else {})}
    return Beside({name: latency.get(name, []) for name in [*models, *runtimes]}, int8, about)
