"""An exported model in ONNX Runtime: decoded squares in, probabilities and unknown scores out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from foveal.core.errors import BundleError
from foveal.core.method import Task
from foveal.core.preprocessing import Preprocessing


class Runtime:
    """Squares uint8 [B, S, S, 3] -> (probabilities float32 [B, C], unknown scores float32 [B]).

    A square is what `foveal.data.images.to_pixels` makes of a photo with `preprocessing`; the part of the model file
    that does the same to whole photos is left out here, so that photos of all sizes share a batch. May be called from
    several threads at once; each call computes with `threads` threads.

    Attributes:
        classes, task, threshold, preprocessing: as in the Bundle.
        engine: what computes, for reports.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        """Open model.onnx, as `foveal export` writes it.

        Raises:
            BundleError: not such a file.
        """
        import onnx
        import onnxruntime

        try:
            model = onnx.load(str(path))
            about = {entry.key: entry.value for entry in model.metadata_props}
            self.classes = tuple(cast("list[str]", json.loads(about["classes"])))
            self.task = cast(Task, about["task"])
            self.threshold = float(about["unknown_threshold"])
            self.preprocessing = Preprocessing.from_dict(json.loads(about["preprocessing"]))
            inner = without_front(model)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3
            self._session = onnxruntime.InferenceSession(
                inner.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnx and ONNX Runtime raise many kinds on a file that is not a model
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BundleError(f"{path} is not a model that `foveal export` wrote ({reason}): export it again") from None
        self.engine, self.threads = f"onnxruntime {onnxruntime.__version__}", threads

    def __call__(self, squares: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        channels_first = np.ascontiguousarray(squares.transpose(0, 3, 1, 2))
        probabilities, score = self._session.run(None, {"squares": channels_first})
        return cast("NDArray[np.float32]", probabilities), cast("NDArray[np.float32]", score)


def without_front(model: Any) -> Any:
    """The ONNX model from `squares` on."""
    import onnx

    names = [output.name for output in model.graph.output]
    return onnx.utils.Extractor(model).extract_model(["squares"], names)
