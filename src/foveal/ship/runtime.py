"""An exported model on a CPU: decoded squares in, probabilities and unknown scores out, by the engine chosen."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from foveal.core.bundle import read_json
from foveal.core.errors import BundleError, MissingExtra, UsageError
from foveal.core.preprocessing import Preprocessing
from foveal.core.schema import Finite, Picture, Stored
from foveal.core.task import Task

ENCODED = ("classes", "preprocessing", "unknown_threshold")
"""Metadata of a model file that are JSON."""


class About(Stored):
    """Metadata of a model file."""

    classes: Annotated[list[str], Field(min_length=1)]
    task: Task
    unknown_threshold: Finite
    preprocessing: Picture


Answers = tuple[NDArray[np.float32], NDArray[np.float32]]
Run = Callable[[NDArray[np.uint8]], Answers]


@dataclass(frozen=True)
class Variant:
    """One way to run an exported model."""

    name: str
    engine: Literal["onnxruntime", "openvino"]
    precision: Literal["fp32", "bf16", "int8"]

    @property
    def file(self) -> str:
        """Which file of the Bundle it reads."""
        return "model.int8.onnx" if self.precision == "int8" else "model.onnx"


FP32 = Variant("fp32", "onnxruntime", "fp32")
VARIANTS = {
    variant.name: variant
    for variant in (
        FP32,
        Variant("int8", "onnxruntime", "int8"),
        Variant("openvino-fp32", "openvino", "fp32"),
        Variant("openvino-bf16", "openvino", "bf16"),
        Variant("openvino-int8", "openvino", "int8"),
    )
}


class Runtime:
    """Squares uint8 [B, S, S, 3] -> (probabilities float32 [B, C], unknown scores float32 [B]).

    A square is what `foveal.data.images.to_pixels` makes of a photo with `preprocessing`; the part of the model file
    that does the same to whole photos is left out here, so that photos of all sizes share a batch. May be called from
    several threads at once; each call computes with `threads` threads.

    Attributes:
        classes, task, threshold, preprocessing: as in the Bundle.
        engine: what computes, for reports.
        precision: 'fp32', 'bf16' or 'int8'.
        variant: its name in cost.json.
        note: why it is not the variant that was chosen at export, or ''.
    """

    def __init__(self, path: str | Path, threads: int = 1, variant: Variant = FP32) -> None:
        """Open a file that `foveal export` wrote.

        Raises:
            BundleError: not such a file.
            MissingExtra: the variant's engine is not installed.
        """
        import onnx

        start = {"onnxruntime": with_onnxruntime, "openvino": with_openvino}[variant.engine]
        try:
            model = onnx.load(str(path), load_external_data=False)
            if reads_other_files(model):
                raise ValueError("some of its tensors lie in other files")
            about = {entry.key: entry.value for entry in model.metadata_props}
            said = About.model_validate({**about, **{key: json.loads(about[key]) for key in ENCODED}})
            self.classes, self.task, self.threshold = tuple(said.classes), said.task, said.unknown_threshold
            self.preprocessing = Preprocessing.from_dict(said.preprocessing.model_dump())
            self._run, self.engine = start(without_front(model).SerializeToString(), threads, variant.precision)
            side = self.preprocessing.size
            found = [answer.shape for answer in self(np.zeros((1, side, side, 3), np.uint8))]
            if found != [(1, len(self.classes)), (1,)]:
                raise ValueError(f"it answers {found} for {len(self.classes)} classes")
        except MissingExtra:
            raise
        except Exception as error:  # the engines raise many kinds on a file that is not a model
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BundleError(f"{path} is not a model that `foveal export` wrote ({reason}): export it again") from None
        self.threads, self.precision, self.variant, self.note = threads, variant.precision, variant.name, ""

    def __call__(self, squares: NDArray[np.uint8]) -> Answers:
        return self._run(np.ascontiguousarray(squares.transpose(0, 3, 1, 2)))


def open_runtime(bundle: str | Path, threads: int = 1, variant: str | None = None) -> Runtime:
    """The exported model of a Bundle, as the variant that `foveal export` chose.

    When that one cannot be opened here (OpenVINO is not installed, its file is gone), the fp32 model is, in ONNX
    Runtime, and `note` says why.

    Args:
        threads: of one call.
        variant: a name in VARIANTS to open instead; an error when it cannot be.

    Raises:
        BundleError: no exported model, or it cannot be read.
        UsageError: an unknown variant.
        MissingExtra: the variant asked for needs an engine that is not installed.
    """
    folder = Path(bundle)
    if not (folder / FP32.file).is_file():
        raise BundleError(f"Bundle {folder} has no {FP32.file}: run `foveal export {folder} --to onnx` first")
    if variant is not None:
        return Runtime(folder / named(variant).file, threads, named(variant))
    try:
        chosen = read_json(folder / "cost.json").get("onnx", {}).get("chosen", FP32.name)
    except (OSError, ValueError, AttributeError) as error:
        raise BundleError(f"cost.json of Bundle {folder} cannot be read ({error}): export it again") from None
    try:
        return Runtime(folder / named(chosen).file, threads, named(chosen))
    except (BundleError, MissingExtra, UsageError) as error:
        if chosen == FP32.name:
            raise
        runtime = Runtime(folder / FP32.file, threads)
        runtime.note = f"runs fp32 in ONNX Runtime instead of {chosen}: {error}"
        return runtime


def named(variant: str) -> Variant:
    if variant not in VARIANTS:
        raise UsageError(f"'{variant}' is not a variant of an exported model: expected one of {', '.join(VARIANTS)}")
    return VARIANTS[variant]


def with_onnxruntime(model: bytes, threads: int, precision: str) -> tuple[Run, str]:
    """A session that runs a call in the calling thread and `threads` - 1 others."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, session_options(threads), providers=["CPUExecutionProvider"])

    def run(squares: NDArray[np.uint8]) -> Answers:
        return cast(Answers, tuple(session.run(["probabilities", "unknown_score"], {"squares": squares})))

    return run, f"onnxruntime {onnxruntime.__version__}"


def session_options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return options


def with_openvino(model: bytes, threads: int, precision: str) -> tuple[Run, str]:
    """As many calls side by side as processors allow, each with `threads` threads and a request of its own.

    Raises:
        MissingExtra: OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError:
        raise MissingExtra("openvino", "openvino", "this variant of the model") from None
    streams = max(1, (os.cpu_count() or 1) // threads)
    compiled = openvino.Core().compile_model(
        openvino.Core().read_model(model),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": streams * threads,
            "NUM_STREAMS": streams,
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        },
    )
    places = [compiled.output(name) for name in ("probabilities", "unknown_score")]
    local = threading.local()

    def run(squares: NDArray[np.uint8]) -> Answers:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        found = local.request.infer([squares])
        return cast(Answers, tuple(np.array(found[place]) for place in places))

    return run, f"openvino {openvino.__version__.partition('-')[0]}"


def reads_other_files(message: Any) -> bool:
    """Whether any tensor of an ONNX model, in subgraphs and functions too, says that its numbers lie elsewhere."""
    import onnx

    if isinstance(message, onnx.TensorProto):
        return message.data_location == onnx.TensorProto.EXTERNAL or len(message.external_data) > 0
    inner = [
        value if field.is_repeated else [value]
        for field, value in message.ListFields()
        if field.type == field.TYPE_MESSAGE
    ]
    return any(reads_other_files(each) for values in inner for each in values)


def without_front(model: Any) -> Any:
    """The ONNX model from `squares` on."""
    import onnx

    names = [output.name for output in model.graph.output]
    return onnx.utils.Extractor(model).extract_model(["squares"], names)
