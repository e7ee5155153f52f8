"""Why a model with few operations may be slow: its efficiency, and the waterline (Lavin 2024, arXiv 2404.03617).

A kernel that reads and writes m bytes for n operations takes at least max(n / peak, m / bandwidth) seconds. Its
intensity n / m stands above the waterline, peak / bandwidth, when operations bound it, and below when memory does. A
fused block moves its input, its output and its weights only.

    found = kernels(timm.create_model("convnext_tiny").eval(), torch.zeros(1, 3, 224, 224))
    line = Waterline(found.kernels, peak=100e9, bandwidth=10e9)
    print(line.seconds, line.ceiling, [each.name for each in line.bound_by_memory])
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from foveal.core.errors import UsageError

FREE = (
    "add", "sub", "mul", "div", "relu", "gelu", "silu", "sigmoid", "hardswish", "hardtanh", "hardsigmoid", "clamp",
    "tanh", "exp", "pow", "sqrt", "rsqrt", "neg", "sin", "cos", "softmax", "_softmax", "mean", "sum", "amax", "max",
    "native_batch_norm", "_native_batch_norm_legit_no_training", "native_layer_norm", "native_group_norm", "var_mean",
    "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "cat", "stack", "clone", "copy", "_to_copy",
    "constant_pad_nd", "zeros", "zeros_like", "ones", "empty", "full", "arange", "roll", "index", "slice",
    "bernoulli", "dropout", "leaky_relu", "elu", "where", "linalg_vector_norm", "new_zeros", "empty_like", "maximum",
)  # fmt: skip
"""Operations taken as fused into the kernel before them: no operations and no bytes of their own."""


@dataclass(frozen=True)
class Kernel:
    """One kernel: operations (two a multiplication and addition), and bytes of input, output and weights."""

    name: str
    ops: float
    read: float
    written: float
    weights: float

    @property
    def bytes(self) -> float:
        return self.read + self.written + self.weights

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.ops / self.bytes


@dataclass(frozen=True)
class Counted:
    """Kernels of a model in order, and the operations of which nothing is known, with how often each was called."""

    kernels: list[Kernel]
    unknown: dict[str, int] = field(default_factory=dict)
    coverage: float = 1.0
    """Share of all calls that compute something whose cost is known."""

    @property
    def ops(self) -> float:
        return sum(kernel.ops for kernel in self.kernels)


class Listener(TorchDispatchMode):
    """Listens to every operation of torch while it is active, functional ones too."""

    def __init__(self, weights: set[int], width: int) -> None:
        super().__init__()
        self.weights, self.width = weights, width
        self.kernels: list[Kernel] = []
        self.free = 0
        self.unknown: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.overloadpacket in flop_registry:
            tensors = [each for each in args if isinstance(each, Tensor)]
            held = [each for each in tensors if self.is_weight(each)]
            given = [each for each in tensors if not self.is_weight(each)]
            result = out[0] if isinstance(out, tuple) else out
            ops = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            size = lambda group: float(self.width * sum(each.numel() for each in group))  # noqa: E731
            self.kernels.append(Kernel(name, float(ops), size(given), size([result]), size(held)))
        elif name.rstrip("_") in FREE:
            self.free += 1
        elif not func.is_view and name not in (
            "detach",
            "view",
            "_unsafe_view",
            "_reshape_alias",
            "alias",
            "as_strided_",
        ):
            self.unknown[name] += 1
        return out

    def is_weight(self, tensor: Tensor) -> bool:
        base = tensor._base
        return id(tensor) in self.weights or (base is not None and id(base) in self.weights)


@torch.no_grad()
def kernels(model: nn.Module, example: Tensor, width: int = 2) -> Counted:
    """The kernels that a model runs for one input: convolutions, matrix products, attention, by any way of calling.

    Normalisation, activations and other element-wise work count as fused into what stands before them.

    Args:
        example: an input, needed since shapes depend on it; on the meta device nothing is computed.
        width: bytes of a number.
    """
    weights = {id(each) for each in (*model.parameters(), *model.buffers())}
    listener = Listener(weights, width)
    training = model.training
    try:
        with listener:
            model.eval()(example)
    finally:
        model.train(training)
    known = len(listener.kernels) + listener.free
    total = known + sum(listener.unknown.values())
    return Counted(listener.kernels, dict(listener.unknown), known / max(total, 1))


@dataclass(frozen=True)
class Waterline:
    """Kernels on a device of `peak` operations and `bandwidth` bytes a second.

    Raises:
        UsageError: peak or bandwidth is not positive.
    """

    kernels: Sequence[Kernel]
    peak: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not (self.peak > 0 and self.bandwidth > 0):
            raise UsageError(f"peak {self.peak}, bandwidth {self.bandwidth}: expected positive numbers a second")

    @property
    def height(self) -> float:
        """The device's balance, operations a byte."""
        return self.peak / self.bandwidth

    @property
    def bound_by_memory(self) -> list[Kernel]:
        return [kernel for kernel in self.kernels if kernel.intensity < self.height]

    @property
    def seconds(self) -> float:
        """Least time when one kernel runs after another."""
        return sum(max(kernel.ops / self.peak, kernel.bytes / self.bandwidth) for kernel in self.kernels)

    @property
    def overlapped(self) -> float:
        """Least time when memory is busy for one kernel while another computes."""
        ops, moved = sum(kernel.ops for kernel in self.kernels), sum(kernel.bytes for kernel in self.kernels)
        return max(ops / self.peak, moved / self.bandwidth)

    @property
    def ceiling(self) -> float:
        """The highest efficiency that kernels run one after another can have, 0 to 1."""
        return sum(kernel.ops for kernel in self.kernels) / self.peak / self.seconds


def fuse(block: Sequence[Kernel], tile: float = math.inf, kernel_size: int = 3, before: int = 0) -> Kernel:
    """A block as one kernel that writes nothing in between.

    Args:
        tile: side of the patch of output that is computed at once.
        kernel_size: of the block's spatial convolution.
        before: how many of the kernels stand before it; they compute the halo of every tile again,
            ((tile + k - 1) / tile)^2 times as much (0 for ConvFirst).
    """
    halo = 1.0 if math.isinf(tile) else ((tile + kernel_size - 1) / tile) ** 2
    ops = sum(kernel.ops * (halo if index < before else 1.0) for index, kernel in enumerate(block))
    weights = sum(kernel.weights for kernel in block)
    return Kernel("+".join(kernel.name for kernel in block), ops, block[0].read, block[-1].written, weights)


def efficiency(ops: float, seconds: float, peak: float) -> float:
    """Operations done over those that fit into the time, 0 to 1; -log of it is the model's efficiency gap.

    Raises:
        UsageError: a number that is not positive.
    """
    if not (ops > 0 and seconds > 0 and peak > 0):
        raise UsageError(f"{ops} operations in {seconds} seconds at peak {peak}: expected positive numbers")
    found = ops / (seconds * peak)
    if found > 1:
        warnings.warn(f"efficiency {found:.2f} is above 1: the peak was measured too low, or not alone", stacklevel=2)
    return found


def latency(run: Callable[[], object], repeats: int = 20) -> float:
    """Median seconds of a call after three to warm up; the GPU, where there is one, is waited for.

    Raises:
        UsageError: fewer than 10 repeats, too few to trust.
    """
    if repeats < 10:
        raise UsageError(f"{repeats} repeats: expected at least 10, fewer say nothing about a latency")
    times: list[float] = []
    with torch.no_grad():
        for _ in range(repeats + 3):
            wait()
            start = time.perf_counter()
            run()
            wait()
            times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_peak(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """Operations a second of this machine: the fastest of ten products of two size x size matrices."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / fastest(lambda: a @ a)


def measure_bandwidth(device: str = "cpu", megabytes: int = 128) -> float:
    """Bytes a second that this machine reads and writes: the fastest of ten copies."""
    a = torch.zeros(megabytes * 2**18, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / fastest(lambda: b.copy_(a))


def fastest(run: Callable[[], object]) -> float:
    times: list[float] = []
    for _ in range(11):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])
