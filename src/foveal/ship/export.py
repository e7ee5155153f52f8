"""One ONNX file that answers as the trained model, preprocessing included: uint8 photos in, probabilities out."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone, normalise
from foveal.core.errors import FovealError, UsageError
from foveal.core.preprocessing import Preprocessing
from foveal.data.images import to_pixels
from foveal.evaluate.calibration import Calibrated
from foveal.features.graph import OPSET, to_onnx
from foveal.ship.front import front

TOLERANCE = 1e-4
"""The largest difference of probabilities between ONNX Runtime and torch that is shipped."""


class Answer(nn.Module):
    """A calibrated model with its normalisation: squares uint8 [N, 3, S, S] -> (probabilities, unknown score)."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing

    def forward(self, squares: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(normalise(squares.permute(0, 2, 3, 1), self.preprocessing))


def export_onnx(
    model: Calibrated,
    preprocessing: Preprocessing,
    path: str | Path,
    *,
    images: Sequence[Image.Image],
    classes: Sequence[str],
    threshold: float,
) -> dict[str, Any]:
    """Write `model` to `path` and check it on real images.

    The graph takes `image`, uint8 RGB [N, H, W, 3] with any N, H and W, and gives `probabilities` [N, C] and
    `unknown_score` [N]. It resizes, cuts and normalises as `foveal` does. Its metadata hold the class names in
    order, the task, the threshold above which a score means unknown, and the preprocessing.

    Args:
        images: upright RGB photos to compare with torch on; several sizes are better.
        threshold: of the unknown score.

    Returns:
        opset, bytes, engine, images (how many were compared), max_abs_difference (of probabilities) and
        unknown_max_difference (of scores, relative above 1).

    Raises:
        UsageError: no images to compare on.
        FovealError: the model cannot be expressed in ONNX, or its answers differ by more than 1e-4; nothing is kept.
    """
    if not images:
        raise UsageError("export needs at least one image to check the exported model on: got none")
    path = Path(path)
    model = copy.deepcopy(model).cpu().eval()
    write_graph(model, preprocessing, path, classes, threshold)
    try:
        record = compare(model, preprocessing, path, images)
        if not record["max_abs_difference"] <= TOLERANCE:
            raise FovealError(
                f"the exported model differs from torch by {record['max_abs_difference']:.1e} in probability, more "
                f"than {TOLERANCE:.0e}: it was not kept"
            )
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return {"opset": OPSET, "bytes": path.stat().st_size, **record}


def write_graph(
    model: Calibrated, preprocessing: Preprocessing, path: Path, classes: Sequence[str], threshold: float
) -> None:
    about = {
        "classes": json.dumps(list(classes), ensure_ascii=False),
        "task": model.task,
        "unknown_threshold": repr(float(threshold)),
    }
    write_behind_front(Answer(model, preprocessing), preprocessing, path, ["probabilities", "unknown_score"], about)


def write_behind_front(
    module: nn.Module,
    preprocessing: Preprocessing,
    path: Path,
    names: Sequence[str],
    about: Mapping[str, str],
    *,
    frames: int | None = None,
) -> None:
    """Write a graph that resizes and cuts photos as `foveal` does and gives the squares to a module.

    It takes `image`, uint8 RGB [N, H, W, 3]; with `frames` T, `clips`, uint8 RGB [N, T, H, W, 3].

    Args:
        module: squares uint8 [N, 3, S, S] (with frames [N T, 3, S, S]) -> tensors [N, ...].
        names: of what the module gives.
        about: metadata; the preprocessing is added.

    Raises:
        FovealError: the module cannot be expressed in ONNX.
    """
    import onnx

    size, each = preprocessing.size, frames or 1
    example = torch.arange(2 * each * 3 * size * size).remainder(251).to(torch.uint8).reshape(-1, 3, size, size)
    dynamic = {"squares": {0: "N" if frames is None else "M"}, **{name: {0: "N"} for name in names}}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".onnx.") as folder:
        inner = Path(folder) / "model.onnx"
        traced(module, (example,), inner, ["squares"], names, dynamic)
        body = onnx.load(inner)
        pad_inside(body, example.numpy(), each)
        photos = front(preprocessing, body.ir_version, OPSET)
        graph = onnx.compose.merge_models(photos, body, [("squares", "squares")])
    if frames is not None:
        take_clips(graph.graph, frames)
    onnx.helper.set_model_props(graph, {**about, "preprocessing": json.dumps(preprocessing.to_dict())})
    graph.producer_name = "foveal"
    onnx.checker.check_model(graph)
    onnx.save(graph, path)


def traced(
    module: nn.Module,
    example: Sequence[Tensor],
    path: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
) -> None:
    """`to_onnx`, in eval mode.

    Raises:
        FovealError: the module cannot be expressed in ONNX.
    """
    for each in module.modules():
        if isinstance(each, Backbone):
            _ = each.model  # a tracer wants the layers built
    try:
        to_onnx(module.eval(), example, path, inputs, outputs, dynamic)
    except Exception as error:  # the exporter raises many kinds, most of them from inside a model's own code
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FovealError(f"this model cannot be expressed in ONNX ({reason}): use the Bundle itself") from error


def take_clips(graph: Any, frames: int) -> None:
    """Make a graph of `image` [M, H, W, 3] one of `clips` [N, frames, H, W, 3], in place."""
    from onnx import TensorProto, helper, numpy_helper

    (image,) = (each for each in graph.input if each.name == "image")
    graph.input.remove(image)
    shape = ["N", frames, "H", "W", 3]
    graph.input.append(helper.make_tensor_value_info("clips", TensorProto.UINT8, shape))
    numbers = {"from": [2], "to": [5], "all": [-1]}
    graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), f"clips/{k}") for k, v in numbers.items())
    made = [
        helper.make_node("Shape", ["clips"], ["clips/shape"]),
        helper.make_node("Slice", ["clips/shape", "clips/from", "clips/to"], ["clips/frame"]),
        helper.make_node("Concat", ["clips/all", "clips/frame"], ["clips/frames"], axis=0),
        helper.make_node("Reshape", ["clips", "clips/frames"], ["image"]),
    ]
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*made, *rest])


def pad_inside(model: Any, squares: np.ndarray, each: int = 1) -> None:
    """Move padding by zeros into the convolutions that read it, in place.

    Backbones that pad to the size of the image leave nodes that compute by how much on every call, and a padding that
    keeps an engine from joining the layers around it. The size of a square is known, so that much is measured here.

    Args:
        squares: of two answers, uint8 [2 each, 3, S, S]; what differs between one and both is left in the graph.
        each: squares that one answer is made of.
    """
    import onnxruntime
    from onnx import helper

    graph = model.graph
    readers = {node.output[0]: [] for node in graph.node if node.op_type == "Pad"}
    for node in graph.node:
        for name in set(node.input) & readers.keys():
            readers[name].append(node)
    pads = [node for node in graph.node if node.op_type == "Pad" and convolutions(node, readers[node.output[0]])]
    if not pads:
        return
    names = list(dict.fromkeys(name for node in pads for name in node.input[1:3] if name))
    asked = copy.deepcopy(model)
    asked.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(asked.SerializeToString(), providers=["CPUExecutionProvider"])
    one, both = (cast("list[np.ndarray]", session.run(names, {"squares": squares[: count * each]})) for count in (1, 2))
    known = {name: a.ravel() for name, a, b in zip(names, one, both, strict=True) if np.array_equal(a, b)}
    for pad in pads:
        by, fill = known.get(pad.input[1]), known.get(pad.input[2]) if pad.input[2:] and pad.input[2] else np.zeros(1)
        if by is None or fill is None or fill.any() or len(by) != 8 or by.min() < 0 or by[[0, 1, 4, 5]].any():
            continue
        for node in readers[pad.output[0]]:
            own = next((attribute for attribute in node.attribute if attribute.name == "pads"), None)
            before = list(own.ints) if own else [0, 0, 0, 0]
            if own:
                node.attribute.remove(own)
            wanted = [int(a + b) for a, b in zip(before, by[[2, 3, 6, 7]], strict=True)]
            node.attribute.append(helper.make_attribute("pads", wanted))
            node.input[0] = pad.input[0]
    needed = {output.name for output in graph.output}
    kept: list[Any] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def convolutions(pad: Any, readers: Sequence[Any]) -> bool:
    """Whether a padding is constant and all who read it are convolutions that say how they pad."""
    mode = next((attribute.s for attribute in pad.attribute if attribute.name == "mode"), b"constant")
    plain = mode == b"constant" and not pad.input[3:]
    automatic = any(a.name == "auto_pad" and a.s != b"NOTSET" for node in readers for a in node.attribute)
    return plain and not automatic and all(n.op_type == "Conv" and n.input[0] == pad.output[0] for n in readers)


def reader(path: Path) -> Any:
    """ONNX Runtime's session of a file, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def compare(
    model: Calibrated, preprocessing: Preprocessing, path: Path, images: Sequence[Image.Image]
) -> dict[str, Any]:
    """How far ONNX Runtime's answers are from torch's on real images."""
    import onnxruntime

    session = reader(path)
    gaps, score_gaps = np.zeros(len(images)), np.zeros(len(images))
    for place, image in enumerate(images):
        pixels = torch.from_numpy(to_pixels(image, preprocessing).copy())[None]
        with torch.inference_mode():
            expected, score = (each.numpy() for each in model(normalise(pixels, preprocessing)))
        answers = cast("list[np.ndarray]", session.run(None, {"image": np.asarray(image.convert("RGB"))[None]}))
        gaps[place] = np.abs(answers[0] - expected).max()
        score_gaps[place] = (np.abs(answers[1] - score) / np.maximum(1, np.abs(score))).max()
    return {
        "engine": f"onnxruntime {onnxruntime.__version__}",
        "images": len(images),
        "max_abs_difference": float(gaps.max()),
        "unknown_max_difference": float(score_gaps.max()),
    }
