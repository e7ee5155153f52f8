"""PIL's resize and the centre crop as ONNX nodes, to the last bit: any uint8 photo -> the backbone's square.

ONNX has a Resize of its own, but ONNX Runtime computes its weights in float32 where PIL uses doubles, so one value
in ten thousand differs by one, and that can move a probability by 1e-4. Here the weights are computed in doubles and
rounded to 22 bits as PIL does, and the sums are of integers, as PIL's are, so nothing is left to differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from foveal.core.preprocessing import Preprocessing

BITS = 22
"""Fraction bits of PIL's weights for 8-bit images."""
STRIP = 8
"""Of images longer than this many times their shorter side, `to_pixels` resizes a box, given to PIL in float32."""


class Nodes:
    """Collects ONNX nodes; every method takes and gives names of tensors."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def name(self) -> str:
        return f"front/{len(self.nodes) + len(self.constants)}"

    def constant(self, value: Any, dtype: Any) -> str:
        from onnx import numpy_helper

        name = self.name()
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        from onnx import helper

        output = output or self.name()
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def integer(self, value: Any) -> str:
        return self.constant(value, np.int64)

    def double(self, value: Any) -> str:
        return self.constant(value, np.float64)

    def cast(self, name: str, dtype: str) -> str:
        from onnx import TensorProto

        return self.add("Cast", name, to=getattr(TensorProto, dtype))


def front(preprocessing: Preprocessing, ir_version: int, opset: int) -> Any:
    """The ONNX model `image` uint8 [N, H, W, 3] -> `squares` uint8 [N, 3, S, S], equal to `to_pixels`.

    The shorter side becomes `resized` pixels and the longer one int(resized long / short); then the central square
    is cut, halves rounded to even. Only the pixels that this square needs are computed.
    """
    from onnx import TensorProto, helper

    g, S = Nodes(), preprocessing.size
    size, resized = g.integer([S]), g.integer([preprocessing.resized])
    shape = g.add("Shape", "image")
    height, width = (g.add("Gather", shape, g.integer([axis]), axis=0) for axis in (1, 2))
    short, long = g.add("Min", height, width), g.add("Max", height, width)
    scaled = g.add("Div", g.add("Mul", resized, long), short)
    upright = g.add("LessOrEqual", width, height)
    rows, columns = g.add("Where", upright, scaled, resized), g.add("Where", upright, resized, scaled)
    strip = g.add("Greater", long, g.add("Mul", short, g.integer([STRIP])))
    cubic = preprocessing.interpolation == "bicubic"
    down, down_weights = taps(g, height, rows, size, strip, cubic)
    across, across_weights = taps(g, width, columns, size, strip, cubic)

    # of the rows, only those that the vertical pass reads; the axis summed over comes first, so steps are contiguous
    first = g.add("Reshape", g.add("ReduceMin", down, keepdims=0), g.integer([1]))
    last = g.add("Reshape", g.add("ReduceMax", down, keepdims=0), g.integer([1]))
    needed = g.add("Slice", "image", first, g.add("Add", last, g.integer([1])), g.integer([1]))
    narrow = weighted(g, g.add("Transpose", needed, perm=[2, 0, 1, 3]), across, across_weights, "across")
    down = g.add("Sub", down, first)
    square = weighted(g, g.add("Transpose", narrow, perm=[2, 1, 0, 3]), down, down_weights, "down")
    g.add("Transpose", square, output="squares", perm=[1, 3, 0, 2])
    graph = helper.make_graph(
        g.nodes,
        "front",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", "H", "W", 3])],
        [helper.make_tensor_value_info("squares", TensorProto.UINT8, ["N", 3, S, S])],
        g.constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def taps(g: Nodes, given: str, wanted: str, size: str, strip: str, cubic: bool) -> tuple[str, str]:
    """Which pixels of one axis the central ones are made of, and their weights (PIL's precompute_coeffs).

    Args:
        given, wanted: length of the axis before and after resizing, int64 [1].
        size: how many of the central ones, S, int64 [1].
        strip: whether PIL is given a box, bool [1].

    Returns:
        Names of int64 [K, S] (clipped to the axis) and int32 [K, S] (in 2^-22).
    """
    half, one = g.double([0.5]), g.double([1.0])
    rest = g.add("Mul", g.cast(g.add("Sub", wanted, size), "FLOAT"), g.constant([0.5], np.float32))
    start = g.cast(g.cast(g.add("Round", rest), "INT64"), "DOUBLE")
    length, many = g.cast(given, "DOUBLE"), g.cast(size, "DOUBLE")
    whole = g.add("Div", length, g.cast(wanted, "DOUBLE"))
    exact = g.add("Mul", start, whole)
    margin = g.add("Add", g.add("Mul", g.add("Ceil", g.add("Max", whole, one)), g.double([2.0])), one)
    cut = g.add("Max", g.add("Sub", g.add("Floor", exact), margin), g.double([0.0]))
    low = g.add("Sub", exact, cut)
    high = g.cast(g.add("Add", low, g.add("Mul", many, whole)), "FLOAT")
    low = g.cast(low, "FLOAT")
    boxed = g.add("Div", g.cast(g.add("Sub", high, low), "DOUBLE"), many)
    scale = g.add("Where", strip, boxed, whole)
    offset = g.add("Where", strip, g.add("Add", g.cast(low, "DOUBLE"), cut), g.double([0.0]))
    begin = g.add("Where", strip, g.double([0.0]), start)

    widening = g.add("Max", scale, one)
    support = g.add("Mul", widening, g.double([2.0 if cubic else 1.0]))
    scalar = g.integer(np.empty(0))
    S = g.add("Reshape", size, scalar)
    position = g.add("Range", g.integer(0), S, g.integer(1))
    position = g.add("Add", g.add("Add", g.cast(position, "DOUBLE"), begin), half)
    center = g.add("Add", g.add("Mul", position, scale), offset)
    nearest = g.add("Max", g.add("Floor", g.add("Add", g.add("Sub", center, support), half)), g.double([0.0]))
    beyond = g.add("Min", g.add("Floor", g.add("Add", g.add("Add", center, support), half)), length)

    reach = g.add("Mul", g.cast(g.add("Floor", support), "INT64"), g.integer([2]))
    count = g.add("Reshape", g.add("Add", reach, g.integer([3])), scalar)
    step = g.cast(g.add("Range", g.integer(0), count, g.integer(1)), "DOUBLE")
    pixel = g.add("Add", g.add("Unsqueeze", step, g.integer([1])), nearest)
    away = g.add("Add", g.add("Sub", pixel, center), half)
    weight = kernel(g, g.add("Abs", g.add("Mul", away, g.add("Div", one, widening))), cubic)
    weight = g.add("Where", g.add("Less", pixel, beyond), weight, g.double([0.0]))
    weight = g.add("Div", weight, g.add("ReduceSum", weight, g.integer([0]), keepdims=1))
    fixed = g.add("Mul", weight, g.double([float(1 << BITS)]))
    up = g.add("Where", g.add("Less", fixed, g.double([0.0])), g.double([-0.5]), half)
    clipped = g.add("Min", pixel, g.add("Sub", length, one))
    return g.cast(clipped, "INT64"), g.cast(g.add("Add", fixed, up), "INT32")


def kernel(g: Nodes, x: str, cubic: bool) -> str:
    """Weight by distance x >= 0: Keys' cubic with a = -1/2, or the triangle."""
    one, zero = g.double([1.0]), g.double([0.0])
    if not cubic:
        return g.add("Max", g.add("Sub", one, x), zero)
    near = g.add("Sub", g.add("Mul", g.double([1.5]), x), g.double([2.5]))
    near = g.add("Add", g.add("Mul", g.add("Mul", near, x), x), one)
    far = g.add("Add", g.add("Mul", g.add("Sub", x, g.double([5.0])), x), g.double([8.0]))
    far = g.add("Mul", g.add("Sub", g.add("Mul", far, x), g.double([4.0])), g.double([-0.5]))
    beyond_one = g.add("Where", g.add("Less", x, g.double([2.0])), far, zero)
    return g.add("Where", g.add("Less", x, one), near, beyond_one)


def weighted(g: Nodes, image: str, pixels: str, weights: str, name: str) -> str:
    """Weighted sums over the first axis of uint8 [L, A, B, C], rounded and clipped: uint8 [S, A, B, C].

    Args:
        pixels, weights: [K, S]; one row per step of a scan, so that memory does not grow with K.
    """
    from onnx import TensorProto, helper

    body = helper.make_graph(
        [
            helper.make_node("Gather", [image, f"{name}/pixel"], [f"{name}/bytes"], axis=0),
            helper.make_node("Cast", [f"{name}/bytes"], [f"{name}/values"], to=TensorProto.INT32),
            helper.make_node("Reshape", [f"{name}/weight", f"{name}/shape"], [f"{name}/column"]),
            helper.make_node("Mul", [f"{name}/values", f"{name}/column"], [f"{name}/product"]),
            helper.make_node("Add", [f"{name}/sum", f"{name}/product"], [f"{name}/next"]),
        ],
        name,
        [
            helper.make_tensor_value_info(f"{name}/sum", TensorProto.INT32, [None] * 4),
            helper.make_tensor_value_info(f"{name}/pixel", TensorProto.INT64, [None]),
            helper.make_tensor_value_info(f"{name}/weight", TensorProto.INT32, [None]),
        ],
        [helper.make_tensor_value_info(f"{name}/next", TensorProto.INT32, [None] * 4)],
        [helper.make_tensor(f"{name}/shape", TensorProto.INT64, [4], [-1, 1, 1, 1])],
    )
    rounding = helper.make_tensor("value", TensorProto.INT32, [1], [1 << (BITS - 1)])
    wanted = g.add("Gather", g.add("Shape", pixels), g.integer([1]), axis=0)
    rest = g.add("Slice", g.add("Shape", image), g.integer([1]), g.integer([4]))
    start = g.add("ConstantOfShape", g.add("Concat", wanted, rest, axis=0), value=rounding)
    total = g.add("Scan", start, pixels, weights, body=body, num_scan_inputs=2)
    value = g.add("Div", total, g.constant([1 << BITS], np.int32))
    value = g.add("Min", g.add("Max", value, g.constant([0], np.int32)), g.constant([255], np.int32))
    return g.cast(value, "UINT8")
