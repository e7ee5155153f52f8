"""Convolutional networks that see only some cells of an image, as if their convolutions were sparse.

Within `masked(network, active)` every layer answers zero on the cells that are not active, whatever its kernel reaches,
and norms take their statistics from active places alone. The network keeps its layers, names and weights; it works by
forward hooks that are gone after the block. The mask belongs to the block, so blocks may nest, and threads may each
have their own on one network.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from foveal.backbones.adapter import Backbone
from foveal.core.errors import BackboneError, UsageError

Treatment = Literal["maps", "rows", "statistics", "gate"]
"""What a layer's answer needs: zeros in maps [B, C, h, w] or in rows [B, h, w, C] ('maps', 'rows'), statistics of
active places alone, or a gate's mean over active places alone."""

INSTEAD = "choose a network of convolutions and batch norms, such as tf_efficientnet_lite0 or resnet18"
MIXING = {
    "convolution": "is a convolution of its own kind",
    "max_pool2d_with_indices": "pools in a way of its own",
    "avg_pool2d": "pools in a way of its own",
    "_adaptive_avg_pool2d": "pools the whole map",
    "adaptive_max_pool2d": "pools the whole map",
    "native_group_norm": "normalises over places (group norm)",
    "native_batch_norm": "normalises over places (instance norm)",
    "_native_batch_norm_legit": "normalises over places (instance norm)",
    "_native_batch_norm_legit_no_training": "normalises over places (instance norm)",
    "_softmax": "is attention",
    "bmm": "is attention",
    "_scaled_dot_product_flash_attention_for_cpu": "is attention",
    "upsample_nearest2d": "resizes its map",
    "upsample_bilinear2d": "resizes its map",
    "grid_sampler_2d": "resizes its map",
    "roll": "shifts its map",
    "_fft_r2c": "is a Fourier transform",
}
WHOLE = 128
"""Sides of which every usual stride is a divisor."""
REDUCING = ("mean", "amax", "sum", "var_mean", "max")


@cache
def kinds() -> tuple[tuple[tuple[type[nn.Module], ...], Treatment], ...]:
    """Types of layers with what each needs; subclasses, such as timm's fused and padded ones, count as their base."""
    from timm.layers.blur_pool import BlurPool2d
    from timm.layers.eca import EcaModule
    from timm.layers.norm import LayerNorm2d
    from timm.layers.squeeze_excite import EffectiveSEModule, SEModule
    from timm.models._efficientnet_blocks import SqueezeExcite

    return (
        ((_BatchNorm,), "statistics"),
        ((SqueezeExcite, SEModule, EffectiveSEModule, EcaModule), "gate"),
        ((nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, BlurPool2d, LayerNorm2d), "maps"),
        ((nn.Linear, nn.LayerNorm), "rows"),
    )


def treatment(module: nn.Module) -> Treatment | None:
    """What this layer needs under a mask; None where a zero stays a zero by itself."""
    if type(module).__name__ == "GlobalResponseNorm":  # its norm over places is a sum, to which zeros add nothing
        return "rows" if module.channel_dim == -1 else "maps"
    for types, found in kinds():
        if isinstance(module, types):
            partly = getattr(module, "add_maxpool", False) or len(getattr(module, "normalized_shape", "1")) > 1
            return None if partly else found
    return "maps" if moves_zero(module) else None


def moves_zero(module: nn.Module) -> bool:
    """Whether this is an activation with f(0) != 0, such as a sigmoid."""
    home = type(module).__module__
    if not home.startswith(("torch.nn.modules.activation", "timm.layers.activations")):
        return False
    if isinstance(module, nn.MultiheadAttention | nn.Softmax) or any(True for _ in module.parameters()):
        return False
    with torch.no_grad():
        return bool(module(torch.zeros(1, 2, 2, 2)).any())


def layers(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, Treatment]]:
    """(name, layer, treatment) of every layer that a mask concerns; what lies inside one is its own affair."""
    found = treatment(network)
    if found is not None:
        yield prefix, network, found
        return
    for name, child in network.named_children():
        yield from layers(child, f"{prefix}.{name}".strip("."))


class Masking:
    """The active cells of one batch, and the hooks that hold a network to them."""

    def __init__(self, active: Bool[Tensor, "B 1 f g"]) -> None:
        self.active = active
        self.thread = threading.get_ident()
        self.asleep = False
        self.masks: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self.places: dict[tuple[int, int], Tensor] = {}
        self.shapes: list[torch.Size] = []
        cells = active[0].numel()
        self.scale = cells / active.flatten(1).sum(1).clamp(min=1).to(torch.float32).reshape(-1, 1, 1, 1)

    def awake(self) -> bool:
        return not self.asleep and threading.get_ident() == self.thread

    def mask(self, height: int, width: int, dtype: torch.dtype = torch.bool) -> Tensor:
        """[B, 1, h, w], of ones and zeros: a product with booleans would convert them again every time."""
        key = height, width, dtype
        if key not in self.masks:
            self.masks[key] = repeated(self.active, height, width).to(dtype)
        return self.masks[key]

    def zeroed_maps(self, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        if self.awake():
            return output * self.mask(output.shape[2], output.shape[3], output.dtype)
        return None

    def zeroed_rows(self, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        if self.awake() and output.ndim == 4:
            return output * self.mask(output.shape[1], output.shape[2], output.dtype)[:, 0, :, :, None]
        return None

    def gathered(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
        """Maps [B, C, h, w] -> their active places [n, C, 1, 1], which a batch norm takes for a batch."""
        if not self.awake():
            return None
        maps, size = inputs[0], (inputs[0].shape[2], inputs[0].shape[3])
        if size not in self.places:
            self.places[size] = self.mask(*size).flatten().nonzero()[:, 0]
        self.shapes.append(maps.shape)
        rows = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
        return rows.index_select(0, self.places[size])[:, :, None, None]

    def scattered(self, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        """Places [n, C, 1, 1] -> maps [B, C, h, w], zero elsewhere."""
        if not self.awake():
            return None
        batch, channels, height, width = self.shapes.pop()
        rows = output.new_zeros(batch * height * width, channels)
        rows = rows.index_copy(0, self.places[height, width], output[:, :, 0, 0])
        return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def enlarged(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
        """Input of a gate x * g(mean x): times cells / active cells, its mean is that of active places."""
        return inputs[0] * self.scale.to(inputs[0].dtype) if self.awake() else None

    def reduced(self, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        return output / self.scale.to(output.dtype) if self.awake() else None

    def hang(self, layer: nn.Module, found: Treatment) -> list[Callable[[], None]]:
        """Put this mask's hooks on a layer; what takes them off again."""
        before = {"statistics": self.gathered, "gate": self.enlarged}.get(found)
        after = {
            "maps": self.zeroed_maps,
            "rows": self.zeroed_rows,
            "statistics": self.scattered,
            "gate": self.reduced,
        }[found]
        handles = [layer.register_forward_hook(after)]
        if before is not None:
            handles.append(layer.register_forward_pre_hook(before))
        return [handle.remove for handle in handles]


def repeated(active: Bool[Tensor, "B 1 f g"], height: int, width: int) -> Bool[Tensor, "B 1 h w"]:
    """The same cells at another resolution.

    Raises:
        BackboneError: a map whose sides are no multiples of the grid's.
    """
    rows, columns = active.shape[2:]
    if height % rows or width % columns:
        raise BackboneError(f"a map of {height} x {width} cannot be cut into {rows} x {columns} cells: {INSTEAD}")
    return active.repeat_interleave(height // rows, 2).repeat_interleave(width // columns, 3)


@contextmanager
def masked(network: nn.Module, active: Bool[Tensor, "B 1 f g"]) -> Generator[None]:
    """Within the block, `network` sees the active cells of its batch of B images alone.

    Its input is the caller's to mask. A block inside of another on the same network takes its place until it ends.

        with masked(backbone, active):
            maps = backbone.feature_map(images * repeated(active, *images.shape[2:]))

    Args:
        active: which cells of a grid over the image may be seen; map sides must be multiples of the grid's.
    """
    masking = Masking(active)
    with ExitStack() as stack:
        for _, layer, found in list(layers(network)):
            for hook in layer._forward_hooks.values():
                outer = getattr(hook, "__self__", None)
                if isinstance(outer, Masking) and outer.awake():
                    outer.asleep = True
                    stack.callback(setattr, outer, "asleep", False)
            for take_off in masking.hang(layer, found):
                stack.callback(take_off)
        yield


@dataclass(frozen=True)
class Pyramid:
    """The maps of a convolutional network: channels and strides from early to late, and what none of them needs."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    norm: Literal["batch", "layer"]
    idle: tuple[str, ...]
    """Names of parameters that no map depends on, such as those of a head."""


def pyramid(backbone: Backbone, size: int, most: int = 4) -> Pyramid:
    """Look at a network's last maps, at most `most`, and prove that it can be masked: by running it on one image.

    Raises:
        BackboneError: not a convolutional network, strides that do not double from map to map, or a layer that would
            see masked cells; the layer is named.
        UsageError: the image side is not a multiple of the last stride.
    """
    if backbone.family != "cnn":
        raise BackboneError(f"{backbone.arch} ({backbone.family}) is not a network of convolutions alone: {INSTEAD}")
    with torch.no_grad(), evaluating(backbone):
        return look(backbone, size, most)


@contextmanager
def evaluating(module: nn.Module) -> Generator[None]:
    """Within the block a module is in eval mode; afterwards each of its parts is in the mode it was in."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode


def look(backbone: Backbone, size: int, most: int) -> Pyramid:
    first = next(backbone.parameters())
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(first)
    even = F.pad(images, (0, -size % WHOLE, 0, -size % WHOLE))
    strides = [stride for _, stride in backbone.feature_map(even)][-most:]
    if any(2 * early != late for early, late in itertools.pairwise(strides)) or strides[-1].bit_count() > 1:
        raise BackboneError(f"the maps of {backbone.arch} have strides {strides}: expected each twice the one before")
    if size % strides[-1]:
        raise UsageError(
            f"images of {size} pixels: {size} is not a multiple of {strides[-1]}, the last stride of {backbone.arch}; "
            f"use {max(1, round(size / strides[-1])) * strides[-1]}"
        )
    side = size // strides[-1]
    active = (torch.arange(side)[:, None] + torch.arange(side)).remainder(2).eq(0)[None, None].to(first.device)
    with masked(backbone.model, active), Watch(backbone) as watch:
        maps = [each for each, _ in backbone.feature_map(images * repeated(active, size, size))][-most:]
    for each, stride in zip(maps, strides, strict=True):
        if (each * ~repeated(active, each.shape[2], each.shape[3])).any():
            raise BackboneError(f"the map of stride {stride} of {backbone.arch} is not zero where masked: {INSTEAD}")
    batch = any(isinstance(module, _BatchNorm) for module in backbone.modules())
    idle = [name for name, module in backbone.named_modules() if module not in watch.ran]
    own = [f"{name}.{key}" for name in idle for key, _ in backbone.get_submodule(name).named_parameters(recurse=False)]
    return Pyramid(tuple(each.shape[1] for each in maps), tuple(strides), "batch" if batch else "layer", tuple(own))


class Watch(TorchDispatchMode):
    """Refuses any operation that mixes places outside of the layers that a mask concerns, and names who asked for it.

    Attributes:
        ran: the modules that took part.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.ran: set[nn.Module] = {backbone, backbone.model}
        self.inside: list[tuple[str, nn.Module]] = []
        self.stack = ExitStack()

    def __enter__(self) -> Watch:
        for name, module in self.backbone.model.named_modules():

            def enter(module: nn.Module, _: Any, name: str = name) -> None:
                self.ran.add(module)
                self.inside.append((name, module))

            def leave(_: nn.Module, __: Any, ___: Any) -> None:
                self.inside.pop()

            self.stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            self.stack.callback(module.register_forward_hook(leave).remove)
        return cast(Watch, super().__enter__())

    def __exit__(self, *raised: Any) -> None:
        self.stack.close()
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        told = mixes(func.overloadpacket.__name__, args)
        if told and not any(treatment(module) for _, module in self.inside):
            name, module = self.inside[-1] if self.inside else ("", self.backbone.model)
            raise BackboneError(
                f"{self.backbone.arch}: layer '{name}' ({type(module).__name__}) {told}, so it would see masked "
                f"cells: {INSTEAD}"
            )
        return func(*args, **(kwargs or {}))


def mixes(operation: str, args: Any) -> str:
    """How an operation mixes the places of a map; '' if it does not."""
    if operation in REDUCING and len(args) > 1 and isinstance(args[1], list | tuple) and args[0].ndim >= 3:
        axes = {axis % args[0].ndim for axis in cast("list[int]", args[1])}
        spatial = ({2, 3}, {1, 2}) if args[0].ndim == 4 else ({1},)
        return "pools the whole map" if any(both <= axes for both in spatial) else ""
    return MIXING.get(operation, "")
