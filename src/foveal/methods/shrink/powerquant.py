"""PowerQuant: weights as few-bit integers on a power grid, from the weights alone.

Yvinec, Dapogny, Cord and Bailly, "PowerQuant: Automorphism Search for Non-Uniform Quantization", ICLR 2023, arXiv
2301.09858. The maps x -> x^a are all that keep products (their automorphisms), so rounding after such a map keeps the
algebra of a product while its levels crowd near zero, where the weights are. With L = 2^(b-1) - 1 and one scale per
output channel,

    s_c = max |W_c|^a / L,    q = round(sign(W) |W|^a / s_c),    Q^-1(q) = sign(q) (|q| s_c)^(1/a),

and one a for the network minimises sum_l || W_l - Q^-1(Q(W_l)) ||_2, which is uniform rounding at a = 1. Batch norms
are folded first. It needs no data and no gradients, on any network with convolutions or linear layers. What is stored
is q (int8; two to a byte up to 4 bits), s_c^(1/a) and a; decoding is a table of |q|^(1/a).

Where we depart: activations stay float32 here; `foveal export --int8` rounds them, on ranges met on training images
rather than those of batch norm statistics. Below 8 bits the first and the last layer keep 8 uniform ones. A channel
whose weights vanish beside its bias becomes the constant that it all but is: no int32 could hold the bias in units of
such weights. With an `exponent` of 0.5 and 4 bits q^2 <= 49, so that export holds these very weights in int8, without
further rounding.

When not to use it: to be faster at any other exponent (the file shrinks, float32 kernels run); when the model will
train on (integers do not); at 8 bits for speed alone (`foveal export --int8` is as good); at 4 bits on networks like
EfficientNet-Lite0: 4 bits in its linear projections alone lose every answer, whatever the exponent (see the card).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone
from foveal.backbones.folding import fold, folded
from foveal.blocks.codes import Codes
from foveal.core.errors import BackboneError, MissingExtra, UsageError
from foveal.core.families.shrink import Quantity, Shrink, Shrunk, Target, TaskData
from foveal.core.method import Classifier, Spec, method
from foveal.core.options import option, options

Layer = nn.Conv2d | nn.Linear
GRID = tuple(round(0.1 * step, 1) for step in range(1, 16))
"""Exponents tried before the search is refined; 1 is among them, so that it never ends above uniform rounding."""
DEAD = 2.0**-16
"""Largest weight of a channel over its bias, below which its weights are taken for zeros."""


def power_codes(
    weight: Float[Tensor, "out ..."], exponent: float, bits: int
) -> tuple[Int[Tensor, "out ..."], Float[Tensor, " out"]]:
    """Codes int8 in -L..L, L = 2^(bits-1) - 1, and the unit of each channel, s_c^(1/a): W ~ sign(q) |q|^(1/a) unit.

    A channel of zeros has codes 0 and unit 1.

    Raises:
        UsageError: an exponent below 0.1, bits outside 2..8, or weights that are not finite.
    """
    if not exponent >= GRID[0]:
        raise UsageError(f"exponent {exponent}: expected at least {GRID[0]}, for float32 to hold the levels")
    if not 2 <= bits <= 8:
        raise UsageError(f"{bits} bits: expected 2 to 8")
    if not torch.isfinite(weight).all():
        raise UsageError("a weight is NaN or infinite, which no code can stand for: fit the model again")
    levels = 2 ** (bits - 1) - 1
    largest = weight.abs().flatten(1).amax(1)
    scale = torch.where(largest > 0, largest**exponent / levels, 1.0)
    q = (weight.sign() * weight.abs() ** exponent / per_channel(scale, weight)).round().clamp(-levels, levels)
    return q.to(torch.int8), torch.where(largest > 0, largest / levels ** (1 / exponent), 1.0)


def power_decode(
    codes: Int[Tensor, "out ..."], unit: Float[Tensor, " out"], exponent: float | Tensor
) -> Float[Tensor, "out ..."]:
    """sign(q) |q|^(1/a) unit, by a table of the 128 powers."""
    powers = torch.arange(128, dtype=torch.float32, device=codes.device) ** (1 / exponent)
    return codes.sign() * powers[codes.abs().clamp(0, 127).long()] * per_channel(unit, codes)


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def power_error(weights: Sequence[Tensor], exponent: float, bits: int) -> float:
    """Sum over layers of the 2-norm of what coding changes."""
    return sum(
        float((weight - power_decode(*power_codes(weight, exponent, bits), exponent)).norm()) for weight in weights
    )


def search_exponent(weights: Sequence[Tensor], bits: int) -> float:
    """The exponent in 0.1..1.5 of least error; refined around the best of a grid, for rounding makes it rough."""
    try:
        from scipy.optimize import minimize_scalar
    except ImportError:
        raise MissingExtra("scipy", "shrink", "powerquant") from None

    errors = {exponent: power_error(weights, exponent, bits) for exponent in GRID}
    best = min(GRID, key=errors.__getitem__)
    around = (max(GRID[0], best - 0.1), min(GRID[-1], best + 0.1))
    found = minimize_scalar(
        lambda exponent: power_error(weights, exponent, bits), bounds=around, method="bounded", options={"maxiter": 12}
    )
    return float(found.x) if found.fun < errors[best] else best


def living(layer: Layer) -> Float[Tensor, "out ..."]:
    """A layer's weight, with zeros for channels that are all but constant, as weight decay leaves them."""
    if layer.bias is None:
        return layer.weight
    largest = layer.weight.abs().flatten(1).amax(1)
    return layer.weight * per_channel(largest >= DEAD * layer.bias.abs(), layer.weight)


def pack(codes: Tensor) -> Tensor:
    """Codes in -8..7, any shape -> uint8 [ceil(n / 2)], two to a byte."""
    flat = (codes.flatten() + 8).to(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(len(flat) % 2)])
    return flat[::2] << 4 | flat[1::2]


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """What `pack` was given, int8."""
    both = torch.stack([packed >> 4, packed & 15], 1).flatten()
    return both[: shape.numel()].to(torch.int8).reshape(shape) - 8


def put_codes(layer: Layer, codes: Tensor, unit: Tensor, exponent: float, bits: int) -> None:
    """Codes in place of a layer's weight, which is decoded from them now and whenever a state dict is loaded."""
    weight = power_decode(codes, unit, exponent)
    del layer.weight
    layer.register_buffer("weight", weight, persistent=False)
    layer.register_buffer("codes", pack(codes) if bits <= 4 else codes)
    layer.register_buffer("unit", unit)
    layer.register_buffer("exponent", torch.tensor(float(exponent)))
    layer.register_load_state_dict_post_hook(decode_again)


def blank(layer: Layer) -> tuple[Tensor, Tensor]:
    """Codes and units of the right shapes, to be loaded into."""
    return torch.zeros_like(layer.weight, dtype=torch.int8), torch.ones_like(layer.weight.flatten(1)[:, 0])


@torch.no_grad()
def decode_again(layer: Any, _: Any) -> None:
    layer.weight = power_decode(codes_of(layer), layer.unit, layer.exponent)


def codes_of(layer: Any) -> Tensor:
    return unpack(layer.codes, layer.weight.shape) if layer.codes.dtype == torch.uint8 else layer.codes


def coded_layers(model: nn.Module) -> list[tuple[str, Any]]:
    named = model.named_modules()
    return [(name, each) for name, each in named if isinstance(each, Layer) and hasattr(each, "codes")]


def plain_layers(model: nn.Module) -> list[tuple[str, Layer]]:
    named = model.named_modules()
    return [(name, each) for name, each in named if isinstance(each, Layer) and not hasattr(each, "codes")]


@options
class Options:
    """What `powerquant` can be told."""

    bits: int = option(8, "of a weight", ge=2, le=8)
    exponent: float = option(0.0, "of the power; 0: the one of least error is searched", ge=0, le=4)
    per_layer: bool = option(False, "search an exponent for each layer rather than one for all")
    ends: bool = option(True, "below 8 bits, leave 8 uniform ones to the first and the last layer")


@method(
    Spec(
        family="shrink",
        title="PowerQuant",
        year=2023,
        arxiv="2301.09858",
        needs=frozenset(),
        tasks=("single-label", "multi-label"),
    ),
    Options,
)
class Powerquant(Shrink):
    targets: ClassVar[tuple[Quantity, ...]] = ("size",)

    @torch.no_grad()
    def shrink(self, model: Classifier, data: TaskData | None, target: Target | None) -> Shrunk:
        """
        Raises:
            UsageError: a weight that is not finite, or a size that 4 bits do not reach.
            BackboneError: no layer that is not coded already.
        """
        bits = self.bits_for(model, target)
        model, pairs = self.prepared(model)
        layers = plain_layers(model)
        for _, layer in layers:
            layer.weight.copy_(living(layer))
        at = self.widths([name for name, _ in layers], bits)
        own = [layer.weight for name, layer in layers if at[name] == bits]
        shared = self.options.exponent or (1.0 if self.options.per_layer else search_exponent(own, bits))
        uniform, error = power_error(own, 1.0, bits), 0.0
        for done, (name, layer) in enumerate(layers):
            exponent = 1.0
            if at[name] == bits:
                searched = self.options.per_layer and not self.options.exponent
                exponent = search_exponent([layer.weight], bits) if searched else shared
                error += power_error([layer.weight], exponent, bits)
            put_codes(layer, *power_codes(layer.weight, exponent, at[name]), exponent, at[name])
            if data:
                data.progress(done + 1, len(layers))
        notes = {
            "bits": bits,
            "exponent": "one for each layer" if self.options.per_layer else round(shared, 4),
            "error": round(error, 4),
            "error_of_uniform_rounding": round(uniform, 4),
            "coded_layers": len(layers),
            "folded_batch_norms": len(pairs),
        }
        return Shrunk(model, {"folded": [list(pair) for pair in pairs], "bits": at}, notes)

    def prepared(self, model: Classifier) -> tuple[Classifier, list[tuple[str, str]]]:
        """A copy with its batch norms folded, and which those were."""
        if not plain_layers(model):
            raise BackboneError("every layer of this model is coded already, or it has none: powerquant has no work")
        model = copy.deepcopy(model).eval().requires_grad_(False)
        like = next(model.buffers(), next(model.parameters(), torch.zeros(0)))
        side = cast(Backbone, model.backbone).preprocessing.size
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(like.device)
        return model, folded(model, images)

    def bits_for(self, model: Classifier, target: Target | None) -> int:
        """The bits asked for, or 4 when the target asks for less."""
        if target is None:
            return self.options.bits
        shares: dict[int, float] = {}
        for bits in sorted({self.options.bits, min(4, self.options.bits)}, reverse=True):
            trial, _ = self.prepared(model)
            names = [name for name, _ in plain_layers(trial)]
            at = self.widths(names, bits)
            for name, layer in plain_layers(trial):
                put_codes(layer, *blank(layer), 1.0, at[name])
            shares[bits] = target.measure(trial)
            if shares[bits] <= target.share:
                return bits
        said = ", ".join(f"{bits} bits come to {share:.3f}" for bits, share in shares.items())
        raise UsageError(
            f"target size={target.share:g} is out of reach ({said}): cut channels first, as in singe+powerquant"
        )

    def widths(self, names: Sequence[str], bits: int) -> dict[str, int]:
        """Bits of every layer."""
        ends = (names[0], names[-1]) if self.options.ends and bits < 8 else ()
        return {name: 8 if name in ends else bits for name in names}

    def rebuild(self, model: Classifier, plan: Mapping[str, Any]) -> Classifier:
        fold(model, plan["folded"])
        layers = dict(plain_layers(model))
        for name, bits in plan["bits"].items():
            layer = layers.get(name)
            if layer is None or bits not in range(2, 9):
                raise UsageError(f"the plan codes {name} with {bits} bits: expected 2 to 8 for a layer of this model")
            put_codes(layer, *blank(layer), 1.0, bits)
        return model

    def codes(self, model: Classifier) -> list[tuple[np.ndarray, Codes]]:
        """Layers whose levels are integers that int8 holds: exponent 1, or 1/2 up to 4 bits, or 1/3 up to 3."""
        found: list[tuple[np.ndarray, Codes]] = []
        for _, layer in coded_layers(model):
            codes = codes_of(layer).cpu().int()
            values = codes.sign() * codes.abs() ** round(1 / float(layer.exponent))
            if float(layer.exponent) * round(1 / float(layer.exponent)) == 1.0 and int(values.abs().max()) <= 127:
                found.append(
                    (layer.weight.cpu().numpy(), Codes(values.to(torch.int8).numpy(), layer.unit.cpu().numpy(), 0))
                )
        return found
