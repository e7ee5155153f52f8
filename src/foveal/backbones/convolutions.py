"""What each convolution of a network is and does while it runs: its size, its receptive field, what comes out of it.

A tensor that depends on the image carries a note through the run: how far its places see and how far apart they are,

    r_l = r_(l-1) + (k_l - 1) d_l j_(l-1),    j_l = j_(l-1) s_l,

the larger of both where branches meet. Gates that read the whole image (squeeze and excitation) do not count. Behind an
operation that mixes places in a way that no kernel describes (attention, a Fourier transform, tokens), the field is
unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from dataclasses import field as made_by
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from foveal.core.errors import BackboneError

Run = Callable[[Tensor], Any]
BATCH = 4
ACTIVATIONS = {
    *("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "prelu", "silu", "gelu", "mish"),
    *("hardswish", "elu", "elu_", "celu", "selu", "selu_", "tanh", "tanh_", "sigmoid", "sigmoid_", "hardsigmoid"),
}
GATES = {"mean", "amax", "adaptive_avg_pool2d", "adaptive_max_pool2d"}
MIXES = {"matmul", "__matmul__", "bmm", "einsum", "scaled_dot_product_attention", "roll", "movedim", "cumsum", "flip"}
WINDOWS = {
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "max_pool2d": ("input", "kernel_size", "stride", "padding", "dilation"),
    "avg_pool2d": ("input", "kernel_size", "stride"),
}
"""Operations with a kernel, and their arguments in order."""


@dataclass
class Moments:
    """Running mean and sum of squared differences of each channel [C] (Chan, Golub and LeVeque, 1979)."""

    count: int = 0
    mean: Tensor = made_by(default_factory=lambda: torch.zeros(()))
    squares: Tensor = made_by(default_factory=lambda: torch.zeros(()))

    def add(self, maps: Tensor) -> None:
        """Maps [B, C, h, w]."""
        variance, mean = (each.double().cpu() for each in torch.var_mean(maps.float(), (0, 2, 3), correction=0))
        count = maps.numel() // maps.shape[1]
        total, apart = self.count + count, mean - self.mean
        self.squares = self.squares + count * variance + apart.square() * self.count * count / total
        self.mean, self.count = self.mean + apart * count / total, total

    @property
    def deviation(self) -> Tensor:
        """Of each channel [C]."""
        return (self.squares / max(1, self.count)).sqrt()

    @property
    def variance(self) -> float:
        """Of all values together."""
        return float(self.deviation.square().mean() + self.mean.var(correction=0))


@dataclass
class Ran:
    """One convolution, as it ran.

    Attributes:
        map: rows and columns of its output.
        macs: multiply-accumulates of one image.
        field: receptive field (rows, columns) in pixels of the input, or None where it is unknown or the whole image.
        jump: distance of neighbouring places in pixels, or None.
        activation: of the function that its output goes into, by normalisation at most; '' if none.
        out: of its output; `active` of that activation's.
    """

    name: str
    conv: nn.Conv2d
    map: tuple[int, int]
    macs: int
    field: tuple[int, int] | None
    jump: tuple[int, int] | None
    activation: str = ""
    out: Moments = made_by(default_factory=Moments)
    active: Moments = made_by(default_factory=Moments)

    def dead(self, below: float = 1e-6) -> int:
        """Channels that are the same on all images and at all places, after the activation if there is one."""
        return int(((self.active if self.active.count else self.out).deviation < below).sum())


@dataclass(frozen=True)
class Note:
    """How far a place of a tensor sees; `field` None: unknown. `axes` are those of rows and columns, `conv` the
    convolution whose output it is, and `gate` says that all places are alike."""

    field: tuple[int, int] | None
    jump: tuple[int, int]
    axes: tuple[int, int]
    conv: str = ""
    gate: bool = False


class Watch(TorchFunctionMode):
    """Within the block, every call of torch passes its inputs' notes on to what it returns."""

    def __init__(self, ran: dict[str, Ran]) -> None:
        super().__init__()
        self.ran = ran
        self.notes: Any = WeakTensorKeyDictionary()
        self.inside: nn.Conv2d | None = None
        self.name = ""

    def start(self, images: Tensor) -> None:
        self.notes[images] = Note((1, 1), (1, 1), (2, 3))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        tensors = [each for value in (*args, *given.values()) for each in inner(value)]
        noted = [(each, self.notes[each]) for each in tensors if each in self.notes]
        before = {id(each): tuple(each.shape) for each, _ in noted}
        result = func(*args, **given)
        if noted:
            for made in inner(result):
                self.notes[made] = self.passed(name, noted, before, made, args, given)
        return result

    def passed(self, name: str, noted: list, before: dict, made: Tensor, args: Any, given: dict[str, Any]) -> Note:
        source, note = next(((each, note) for each, note in noted if not note.gate), noted[0])
        shape = before[id(source)]
        if name in WINDOWS:
            return self.window(name, note, made, dict(zip(WINDOWS[name], args, strict=False)) | given)
        if name in ACTIVATIONS:
            self.activated(name.rstrip("_"), note, made)
            return Note(note.field, note.jump, note.axes, "", note.gate)
        if name in GATES and without(made, shape, note.axes):
            return Note(None, note.jump, note.axes if made.ndim == len(shape) else (0, 0), gate=True)
        if name in ("pad", "_pad", "constant_pad_nd"):
            return note
        axes = moved(name, args, note.axes, shape, made)
        real = [other for _, other in noted if not other.gate] or [note]
        mixed = name in MIXES or name.startswith("fft_")
        if axes is None or mixed or (name == "linear" and max(axes) == made.ndim - 1):
            return Note(None, note.jump, (0, 0), gate=note.gate)
        fields = [other.field for other in real]
        known = [each for each in fields if each is not None]
        reach = (max(r for r, _ in known), max(c for _, c in known)) if len(known) == len(fields) else None
        jump = max(other.jump for other in real)
        convs = {other.conv for other in real}
        return Note(reach, jump, axes, convs.pop() if len(convs) == 1 else "", note.gate)

    def window(self, name: str, note: Note, made: Tensor, given: dict[str, Any]) -> Note:
        size = given["weight"].shape[-2:] if name == "conv2d" else pair(given["kernel_size"])
        stride = pair(given.get("stride") or (1 if name == "conv2d" else size))
        dilation = pair(given.get("dilation") or 1)
        reach = None
        if note.field is not None:
            rows, columns = (
                r + (k - 1) * d * j for r, k, d, j in zip(note.field, size, dilation, note.jump, strict=True)
            )
            reach = (rows, columns)
        jump = (note.jump[0] * stride[0], note.jump[1] * stride[1])
        conv = self.inside if name == "conv2d" else None
        if conv is not None:
            self.record(conv, made, given["weight"], reach, jump)
        return Note(reach, jump, (made.ndim - 2, made.ndim - 1), self.name if conv is not None else "", note.gate)

    def record(self, conv: nn.Conv2d, made: Tensor, weight: Tensor, reach: Any, jump: Any) -> None:
        height, width = made.shape[-2:]
        known = self.ran.get(self.name)
        if known is None:
            macs = height * width * weight.numel()
            jump = jump if reach else None
            known = self.ran[self.name] = Ran(self.name, conv, (height, width), macs, reach, jump)
        known.out.add(made.detach())

    def activated(self, name: str, note: Note, made: Tensor) -> None:
        seen = self.ran.get(note.conv)
        if seen is not None and made.ndim == 4 and made.shape[1] == seen.conv.out_channels:
            seen.activation = name
            seen.active.add(made.detach())


def inner(value: Any) -> list[Tensor]:
    """The tensors in a value, one level deep."""
    if isinstance(value, Tensor):
        return [value]
    return [each for each in value if isinstance(each, Tensor)] if isinstance(value, list | tuple) else []


def pair(value: Any) -> tuple[int, int]:
    first, *rest = value if isinstance(value, list | tuple | torch.Size) else (value,)
    return int(first), int(rest[0] if rest else first)


def without(made: Tensor, shape: tuple[int, ...], axes: tuple[int, int]) -> bool:
    """Whether rows and columns of a tensor of `shape` are gone from what was made of it."""
    if made.ndim < len(shape):
        return tuple(made.shape[-2:]) != tuple(shape[axis] for axis in axes)
    return all(made.shape[axis] == 1 for axis in axes)


def moved(name: str, args: Any, axes: tuple[int, int], shape: tuple[int, ...], made: Tensor) -> tuple[int, int] | None:
    """Where rows and columns are in what an operation made of a tensor of `shape`; None: nowhere."""
    ndim = len(shape)
    if name in ("permute", "transpose", "swapaxes"):
        given = args[1] if len(args) == 2 else args[1:]
        order = [int(each) % ndim for each in given]
        if name != "permute":
            first, second = order
            order = [second if axis == first else first if axis == second else axis for axis in range(ndim)]
        return order.index(axes[0]), order.index(axes[1])
    if made.ndim == ndim and all(made.shape[axis] == shape[axis] for axis in axes):
        return axes
    if axes == (ndim - 2, ndim - 1) and tuple(made.shape[-2:]) == shape[-2:]:
        return made.ndim - 2, made.ndim - 1
    return None


def convolutions(module: nn.Module) -> dict[str, nn.Conv2d]:
    """By name, in the order in which they were built.

    Raises:
        BackboneError: there is none.
    """
    found = {name: each for name, each in module.named_modules() if isinstance(each, nn.Conv2d)}
    if not found:
        raise BackboneError(f"{type(module).__name__} has no nn.Conv2d: there is nothing to audit")
    return found


@torch.no_grad()
def watch(module: nn.Module, images: Tensor, run: Run | None = None) -> list[Ran]:
    """Every convolution of a network that ran, in order of its first run.

    Args:
        images: [B, C, H, W] as the network reads them.
        run: what to do with a batch; default: the network itself. The hooks are gone afterwards.

    Raises:
        BackboneError: no convolution.
    """
    ran: dict[str, Ran] = {}
    with ExitStack() as stack:
        mode = Watch(ran)
        for name, conv in convolutions(module).items():

            def enter(each: nn.Module, _: Any, name: str = name) -> None:
                mode.inside, mode.name = each, name  # type: ignore[assignment]

            def leave(_: nn.Module, __: Any, ___: Any) -> None:
                mode.inside, mode.name = None, ""

            stack.callback(conv.register_forward_pre_hook(enter).remove)
            stack.callback(conv.register_forward_hook(leave, always_call=True).remove)
        for part in images.split(BATCH):
            part = part.clone()
            mode.start(part)
            with mode:
                (run or module)(part)
    return list(ran.values())


@contextmanager
def outputs(module: nn.Module, names: Sequence[str]) -> Generator[dict[str, Tensor]]:
    """The outputs of convolutions within the block, part of the graph and safe from what changes them in place."""
    kept: dict[str, Tensor] = {}
    found = convolutions(module)
    with ExitStack() as stack:
        for name in names:

            def keep(_: nn.Module, __: Any, output: Tensor, name: str = name) -> Tensor:
                kept[name] = output
                return output.clone()

            stack.callback(found[name].register_forward_hook(keep).remove)
        yield kept


@dataclass(frozen=True)
class Gradients:
    """By convolution: variance of the gradient at its output, and the radius in pixels within which `SHARE` of the
    gradient of its middle place with respect to the image lies."""

    variance: Mapping[str, float]
    radius: Mapping[str, float]


SHARE = 0.95


def gradients(
    module: nn.Module, images: Tensor, ran: Sequence[Ran], run: Run | None = None, *, seed: int = 0
) -> Gradients:
    """What comes back through the network, for a random sign of every number it answers, and what each convolution
    whose field is known and larger than 1 sees of the image (effective receptive field; Luo et al., 2016).

    Args:
        images: [B, C, H, W] as the network reads them; its parameters should be frozen.
    """
    squares: dict[str, list[float]] = {each.name: [] for each in ran}
    seen = [each for each in ran if each.field is not None and max(each.conv.kernel_size) > 1]
    maps = {each.name: torch.zeros(images.shape[-2:], dtype=torch.float64) for each in seen}
    rng = torch.Generator().manual_seed(seed)
    for part in images.split(BATCH):
        part = part.clone().requires_grad_()
        with torch.enable_grad(), outputs(module, list(squares)) as kept:
            answer = (run or module)(part)
            signs = torch.randint(0, 2, answer.shape, generator=rng).to(answer) * 2 - 1
            names = list(kept)
            found = torch.autograd.grad(
                (answer * signs).sum(), [kept[name] for name in names], retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(names, found, strict=True):
                squares[name].append(0.0 if gradient is None else float(gradient.double().square().mean()))
            for each in seen:
                output = kept[each.name]
                middle = output[..., output.shape[-2] // 2, output.shape[-1] // 2].sum()
                (gradient,) = torch.autograd.grad(middle, part, retain_graph=True)
                maps[each.name] += gradient.detach().double().abs().sum((0, 1)).cpu()
    return Gradients(
        {name: sum(values) / max(1, len(values)) for name, values in squares.items()},
        {each.name: radius(maps[each.name], each.map) for each in seen},
    )


def radius(energy: Tensor, places: tuple[int, int], share: float = SHARE) -> float:
    """Distance [pixels] from the middle place of a map of `places` within which `share` of `energy` [H, W] lies."""
    height, width = energy.shape
    rows = torch.arange(height) + 0.5 - (places[0] // 2 + 0.5) * height / places[0]
    columns = torch.arange(width) + 0.5 - (places[1] // 2 + 0.5) * width / places[1]
    distance, order = torch.hypot(rows[:, None], columns[None]).flatten().sort()
    held = energy.flatten()[order].cumsum(0)
    if float(held[-1]) <= 0:
        return 0.0
    return float(distance[int((held < share * held[-1]).sum())])
