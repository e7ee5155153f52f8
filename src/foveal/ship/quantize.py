"""An exported model in 8 bits: a QDQ graph that ONNX Runtime and OpenVINO run with integer kernels.

Weights are int8 with one scale per output channel; activations are uint8 with one scale and zero point per tensor,
from the ranges met on training images. The part that turns a photo into a square is integers already and stays as it
is; the head and the unknown score stay float32, since a step of the features' grid moves a distance to a threshold.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveal.blocks.codes import Codes, Quantizer, along, given, symmetric
from foveal.core.errors import FovealError, UsageError
from foveal.ship.runtime import session_options, with_onnxruntime, without_front

EXACT = ("/model/head/", "/model/ood/")
"""Scopes in a graph of `Calibrated` whose nodes stay float32."""
LAYERS = ("Conv", "Gemm", "MatMul")
FOLLOW = ("Add", "Mul", "Concat", "MaxPool", "AveragePool", "Relu", "Clip", "Sigmoid")
"""Operators that have integer kernels of their own, when everything they read is on a grid."""
FUSED = ("Relu", "Clip")
"""Operators that the rounding of their result makes part of the layer before them."""
SAME = ("MaxPool",)
"""Operators whose result lies on the grid of what they read."""
CLIPPED = (0.0, 0.5, 1.0)
"""Widths of the activations' ranges that are tried; see `ranges_of`."""

Ranges = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Layer:
    """A layer that becomes int8: the names of its weight and bias, and the weight's axis of output channels."""

    weight: str
    axis: int
    bias: str | None


@dataclass(frozen=True)
class Plan:
    """Which nodes and tensors of a graph become 8 bits.

    Attributes:
        layers: by place of the node in the graph.
        grids: tensors that are rounded to 8 bits, in the order of the graph; the value names the tensor whose grid it
            is (mostly its own).
        closed: those of them that are rounded for all their readers, not for layers alone.
    """

    layers: dict[int, Layer]
    grids: dict[str, str]
    closed: set[str]


def constants(graph: Any) -> dict[str, Any]:
    """Tensors that do not depend on the input, by name."""
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
        elif node.op_type == "Identity" and node.input[0] in found:  # how equal tensors share one
            found[node.output[0]] = found[node.input[0]]
    return found


def plan(graph: Any) -> Plan:
    """What to quantize of an exported graph.

    Layers are convolutions and matrix products with a constant weight. What a layer reads is rounded for it. What a
    convolution gives is rounded for every reader, behind the ReLU or clip that follows it, and so is what operators
    with integer kernels make of such tensors: the residual sums of a convolutional network stay integers, those of a
    transformer stay float32.
    """
    known = constants(graph)
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {output.name for output in graph.output}
    reached, layers, grids, closed = {"squares"}, dict[int, Layer](), dict[str, str](), set[str]()

    def end(name: str) -> str:
        while len(after := readers.get(name, [])) == 1 and after[0].op_type in FUSED and name not in outputs:
            name = after[0].output[0]
        return name

    for place, node in enumerate(graph.node):
        if reached.isdisjoint(node.input):
            continue
        reached.update(node.output)
        if node.name.startswith(EXACT):
            continue
        layer = layer_of(node, known)
        if layer:
            layers[place] = layer
            grids.setdefault(node.input[0], node.input[0])
            if node.op_type == "Conv":
                result = end(node.output[0])
                grids.setdefault(result, result)
                closed.add(result)
        elif node.op_type in FOLLOW and closed.issuperset(name for name in node.input if not bound(node, name, known)):
            result = node.output[0] if node.op_type in SAME else end(node.output[0])
            grids[result] = grids[node.input[0]] if node.op_type in SAME else result
            closed.add(result)
    return Plan(layers, grids, closed)


def bound(node: Any, name: str, known: Mapping[str, Any]) -> bool:
    """Whether an input is a limit of a Clip."""
    return node.op_type == "Clip" and (not name or name in known)


def layer_of(node: Any, known: Mapping[str, Any]) -> Layer | None:
    from onnx import TensorProto

    if node.op_type not in LAYERS or node.input[0] in known or node.input[1] not in known:
        return None
    weight = known[node.input[1]]
    if weight.data_type != TensorProto.FLOAT or len(weight.dims) != (4 if node.op_type == "Conv" else 2):
        return None
    bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
    given = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "Conv":
        return Layer(node.input[1], 0, bias) if bias is None or bias in known else None
    if node.op_type == "MatMul":
        return Layer(node.input[1], 1, None)
    plain = all(given[name].f == 1.0 for name in ("alpha", "beta") if name in given)
    if not plain or ("transA" in given and given["transA"].i) or (bias and bias not in known):
        return None
    return Layer(node.input[1], 0 if "transB" in given and given["transB"].i else 1, bias)


@dataclass(frozen=True, eq=False)
class Observed:
    """What the tensors of a graph were on some images.

    Attributes:
        ends: smallest and largest value of each tensor on a grid, on each image: float32 [images, 2].
        means: mean of each channel of what convolutions and Gemm layers read: float64 [channels].
    """

    ends: dict[str, NDArray[np.float32]]
    means: dict[str, NDArray[np.float64]]


def observe(model: Any, squares: Iterable[NDArray[np.uint8]], threads: int = 1) -> Observed:
    """Run the float32 model on images and watch the tensors that `plan` rounds.

    Args:
        model: ONNX, as `foveal export` writes it.
        squares: uint8 [S, S, 3] each.
    """
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    inner = without_front(model)
    graph, chosen = inner.graph, plan(inner.graph)
    ends = list(dict.fromkeys(chosen.grids.values()))
    read = {graph.node[place].input[0]: graph.node[place].op_type for place in chosen.layers}
    means = {name: [0, 2, 3] if kind == "Conv" else [0] for name, kind in read.items() if kind != "MatMul"}
    wanted: list[str] = []

    def add(operator: str, inputs: list[str], shape: list[None]) -> None:
        wanted.append(f"{inputs[0]}/{operator}")
        graph.node.append(helper.make_node(operator, inputs, wanted[-1:], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(wanted[-1], TensorProto.FLOAT, shape))

    for name in ends:
        add("ReduceMin", [name], [])
        add("ReduceMax", [name], [])
    for name, axes in means.items():
        graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), f"{name}/axes"))
        add("ReduceMean", [name, f"{name}/axes"], [None])
    session = onnxruntime.InferenceSession(
        inner.SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"]
    )
    rows: list[list[float]] = []
    total = [np.float64(0)] * len(means)
    for square in squares:
        found: Any = session.run(wanted, {"squares": square.transpose(2, 0, 1)[None].copy()})
        rows.append(found[: 2 * len(ends)])
        total = [sum_ + mean.astype(np.float64) for sum_, mean in zip(total, found[2 * len(ends) :], strict=True)]
    table = np.array(rows, np.float32).reshape(len(rows), len(ends), 2)
    return Observed(
        {name: table[:, place] for place, name in enumerate(ends)},
        {name: np.asarray(sum_ / len(rows)) for name, sum_ in zip(means, total, strict=True)},
    )


def ranges_of(observed: Observed, clipped: float) -> Ranges:
    """The range of each tensor: between the extremes over all images and the average image's.

    Args:
        clipped: 0 holds every value met; 1 goes from the mean of the images' smallest values to the mean of their
            largest ones, which clips what is rare and makes steps finer.
    """

    def inward(ends: NDArray[np.float32], outermost: np.float32) -> float:
        return float(outermost + clipped * (ends.mean() - outermost))

    return {
        name: (inward(ends[:, 0], ends[:, 0].min()), inward(ends[:, 1], ends[:, 1].max()))
        for name, ends in observed.ends.items()
    }


def quantize(
    source: Path,
    target: Path,
    squares: Sequence[NDArray[np.uint8]],
    threads: int = 1,
    codes: Iterable[tuple[NDArray[np.float32], Codes]] = (),
) -> dict[str, Any]:
    """Write an exported model in 8 bits, with the same inputs, outputs and metadata.

    Of a few widths of the activations' ranges the one is kept whose answers on `squares` are nearest to the float32
    model's.

    Args:
        source: the float32 file, as `foveal export` writes it.
        target: the file to write.
        squares: uint8 [S, S, 3] each, of images the model was trained on.
        codes: weights, output channels first, that are products of integers and a scale; they keep these integers.

    Returns:
        `images` (how many calibrated), `layers` (how many are int8), `clipped` (see `ranges_of`).

    Raises:
        UsageError: no squares.
        FovealError: nothing in the model can be int8.
    """
    import onnx

    if not squares:
        raise UsageError("calibrating for int8 needs at least one image: got none")
    model = onnx.load(source)
    layers = len(plan(model.graph).layers)
    if not layers:
        raise FovealError("the model has no convolution or matrix product with constant weights to make int8")
    observed = observe(model, squares, threads)
    quantizer = given(codes, partial(symmetric, levels=127 if adds_in_32_bits() else 63))
    wanted = answers(model, squares, threads)
    best: Any = None
    clipped, error = 0.0, np.inf
    for share in CLIPPED:
        candidate = write_qdq(model, ranges_of(observed, share), observed.means, quantizer)
        far = distance(answers(candidate, squares, threads), wanted)
        if best is None or far < error:
            best, clipped, error = candidate, share, far
    onnx.save(best, target)
    return {"images": len(squares), "layers": layers, "clipped": clipped}


def answers(model: Any, squares: Sequence[NDArray[np.uint8]], threads: int) -> list[NDArray[np.float32]]:
    """Probabilities [n, C] and unknown scores [n] of an exported model in ONNX Runtime."""
    run, _ = with_onnxruntime(without_front(model).SerializeToString(), threads, "int8")
    found = [run(square.transpose(2, 0, 1)[None].copy()) for square in squares]
    return [np.concatenate(part) for part in zip(*found, strict=True)]


def distance(found: Sequence[NDArray[np.float32]], wanted: Sequence[NDArray[np.float32]]) -> float:
    """Mean total variation of probabilities, and mean change of scores over their spread. NaN counts as infinite."""
    probabilities = np.abs(found[0] - wanted[0]).sum(1).mean() / 2
    scores = np.abs(found[1] - wanted[1]).mean() / max(float(wanted[1].std()), 1e-6)
    return float(np.nan_to_num(probabilities + scores, nan=np.inf))


def adds_in_32_bits() -> bool:
    """Whether this processor sums int8 products in 32 bits at once: all but x86 before VNNI, which saturate in 16."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and "vnni" in flags.read_text(encoding="utf-8", errors="replace")


def write_qdq(
    model: Any,
    ranges: Mapping[str, tuple[float, float]],
    means: Mapping[str, NDArray[np.float64]] | None = None,
    quantizer: Quantizer = symmetric,
) -> Any:
    """The model with QuantizeLinear and DequantizeLinear around everything that `plan` names.

    Args:
        model: ONNX, as `foveal export` writes it; not changed.
        ranges: smallest and largest value of each tensor on a grid of its own (`plan(...).grids.values()`).
        means: of each channel of what a layer reads, to take the mean of its rounding error off its bias (Nagel et al.
            2019, eq. 17, with measured means); layers without are left as they are.
        quantizer: makes the codes of each weight.

    Raises:
        FovealError: codes that int8 cannot hold, or a tensor without a range.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = copy.deepcopy(model)
    graph, chosen = model.graph, plan(model.graph)
    known = constants(graph)
    missing = [name for name in chosen.grids.values() if name not in ranges]
    if missing:
        raise FovealError(f"no range is given for {missing[0]} and {len(missing) - 1} others: observe this very model")
    steps = {name: step_of(*ranges[name]) for name in chosen.grids.values()}
    made: dict[str, Any] = {}

    def constant(name: str, value: NDArray[Any]) -> str:
        made.setdefault(name, numpy_helper.from_array(np.array(value, order="C"), name))
        return name

    def decoded(name: str, codes: NDArray[Any], scale: NDArray[Any], axis: int) -> Any:
        zero = constant(f"{name}/zero", np.zeros(scale.shape, codes.dtype))
        inputs = [constant(f"{name}/codes", codes), constant(f"{name}/scale", scale.astype(np.float32)), zero]
        return helper.make_node("DequantizeLinear", inputs, [f"{name}/decoded"], name=f"{name}/decode", axis=axis)

    def rounded(name: str) -> list[Any]:
        scale, zero = steps[chosen.grids[name]]
        step = [
            constant(f"{name}/scale", np.array(scale, np.float32)),
            constant(f"{name}/zero", np.array(zero, np.uint8)),
        ]
        return [
            helper.make_node("QuantizeLinear", [name, *step], [f"{name}/codes"], name=f"{name}/round"),
            helper.make_node("DequantizeLinear", [f"{name}/codes", *step], [f"{name}/rounded"], name=f"{name}/decode"),
        ]

    nodes: list[Any] = []
    for place, node in enumerate(graph.node):
        layer = chosen.layers.get(place)
        if layer:
            weight = numpy_helper.to_array(known[layer.weight])
            codes = quantizer(weight, layer.axis)
            step = steps[chosen.grids[node.input[0]]][0]
            if layer.bias:
                bias = numpy_helper.to_array(known[layer.bias]).astype(np.float64)
                if means and node.input[0] in means:
                    bias += mean_error(node, weight - codes.decode(), layer.axis, means[node.input[0]])
                codes = with_room(codes, bias / step)
                scale = codes.scale.astype(np.float64) * step
                nodes.append(decoded(f"{node.output[0]}/bias", np.rint(bias / scale).astype(np.int32), scale, 0))
                node.input[2] = nodes[-1].output[0]
            if not codes.fits_int8:
                raise FovealError(
                    f"the codes of {layer.weight} go to {np.abs(codes.values).max()}, int8 holds up to 127: "
                    "round the decoded weights instead"
                )
            nodes.append(decoded(f"{node.output[0]}/weight", codes.values.astype(np.int8), codes.scale, layer.axis))
            node.input[1] = nodes[-1].output[0]
        for index, name in enumerate(node.input):
            if name in chosen.closed or (layer and index == 0):
                node.input[index] = f"{name}/rounded"
        nodes.append(node)
        for name in node.output:
            if name in chosen.grids:
                nodes += rounded(name)
    for kind in ("Identity", "Constant"):
        used = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
        nodes = [node for node in nodes if node.op_type != kind or node.output[0] in used]
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *made.values()])
    onnx.checker.check_model(model)
    return model


def mean_error(node: Any, error: NDArray[Any], axis: int, mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """What rounding its weights takes off a layer's outputs on average, [channels], at places far from a border.

    Args:
        error: weights lost in rounding: [out, in / groups, h, w] of a convolution, or [out, in] ([in, out] with `axis`
            1) of a matrix.
        mean: of each channel that is read.
    """
    if node.op_type != "Conv":
        return (error if axis == 0 else error.T).astype(np.float64) @ mean
    per_input = error.sum(axis=tuple(range(2, error.ndim)), dtype=np.float64)
    groups = len(mean) // per_input.shape[1]
    return np.einsum("goi,gi->go", per_input.reshape(groups, -1, per_input.shape[1]), mean.reshape(groups, -1)).ravel()


def with_room(codes: Codes, bias: NDArray[np.float64]) -> Codes:
    """The same weights with scales at which int32 holds the bias: coarser ones in channels that are all but dead, and
    in channels of zeros, where any scale will do, one that holds it to the last bit.

    Args:
        bias: [channels], in units of the step of what the layer reads.
    """
    least = np.abs(bias) / 2**30
    zeros = ~codes.values.any(axis=tuple(each for each in range(codes.values.ndim) if each != codes.axis))
    free = zeros & (least >= np.finfo(np.float32).tiny)
    if not free.any() and (codes.scale >= least).all():
        return codes
    scale = np.where(free, least, np.maximum(codes.scale, least)).astype(np.float32)
    values = np.rint(codes.decode() / along(scale, codes.values.ndim, codes.axis)).astype(codes.values.dtype)
    return Codes(values, scale, codes.axis)


def step_of(low: float, high: float) -> tuple[np.float32, int]:
    """Scale and zero point of 256 levels from `low` to `high`, 0 being one of them.

    Without negative values the last level is not above `high`, so that a clip there is part of the rounding.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255)
    if not scale > np.finfo(np.float32).tiny:
        return np.float32(1.0), 0
    if np.float32(255) * scale > np.float32(high - low):
        scale = np.nextafter(scale, np.float32(0))
    return scale, round(-low / float(scale))
