"""What the operators' present forms gained over the plain ones they took the place of; writes docs/benchmarks.md.

    python benchmarks/operators.py

Both forms of an operator get the same input, in turns in one run. The plain ones are written here, as the equations
say them.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from run import PAGE, between
from torch import Tensor

from foveal.architectures._depthwise import DepthwiseConv2d
from foveal.architectures._spectrum import filter_map, irfft2_pair, rfft2_pair
from foveal.architectures.affnet import ComplexLinear
from foveal.architectures.orchid import filter_sequence, irfft_pair, rfft_pair
from foveal.architectures.transnext import AggregatedAttention
from foveal.architectures.tvconv import convolve_by_place
from foveal.architectures.unireplknet import DilatedReparam

ROUNDS = 3
Form = Callable[..., Tensor]


def parts_of_maps(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    c, d = rfft2_pair(x)
    return irfft2_pair(a * c - b * d, a * d + b * c, (int(x.shape[-2]), int(x.shape[-1])))


def parts_of_sequences(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    c, d = rfft_pair(x)
    return irfft_pair(a * c - b * d, a * d + b * c, int(x.shape[-1]))


def four_products(layer: ComplexLinear) -> Form:
    def run(real: Tensor, imaginary: Tensor) -> Tensor:
        a, b = (part.unflatten(1, (layer.groups, -1)) for part in (real, imaginary))
        c, d = layer.weight.unbind(0)
        shift = layer.bias[:, :, :, None, None]
        ac, bd, ad, bc = (
            torch.einsum("bgihw,gio->bgohw", x, w) for x, w in ((a, c), (b, d), (a, d), (b, c))
        )  # fmt: skip
        return torch.stack([ac - bd + shift[0], ad + bc + shift[1]]).flatten(2, 3)

    return run


def unfolded(size: tuple[int, int]) -> Form:
    def neighbours(x: Tensor) -> Tensor:
        maps = x.transpose(2, 3).flatten(1, 2).unflatten(2, size)
        found = F.unfold(maps, 3, padding=1).unflatten(1, (x.shape[1], x.shape[3], 9))
        return found.permute(0, 1, 4, 3, 2)

    def run(query: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (neighbours(k) @ query.unsqueeze(-1)).squeeze(-1)
        return (scores.unsqueeze(-2) @ neighbours(v)).squeeze(-2).transpose(1, 2).unflatten(1, size)

    return run


def shifted(attention: AggregatedAttention, size: tuple[int, int]) -> Form:
    def run(query: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = query.transpose(1, 2).unflatten(1, size)
        scores = [(each * places).sum(-1, keepdim=True) for each in attention.neighbours(k, size)]
        return reduce(torch.add, (a * each for a, each in zip(scores, attention.neighbours(v, size), strict=True)))

    return run


def sum_of_views(x: Tensor, weight: Tensor) -> Tensor:
    kernel, height, width = math.isqrt(weight.shape[1]), *weight.shape[2:]
    x = F.pad(x, (kernel // 2,) * 4)
    places = [(i, j) for i in range(kernel) for j in range(kernel)]
    views = (x[..., i : i + height, j : j + width] * weight[:, n] for n, (i, j) in enumerate(places))
    return sum(views, start=torch.zeros(()))


def by_torch(layer: DepthwiseConv2d) -> Form:
    return lambda x: F.conv2d(x, layer.weight, layer.bias, 1, layer.padding, layer.dilation, layer.groups)


def branch_by_branch(layer: DilatedReparam) -> Form:
    def run(x: Tensor) -> Tensor:
        return torch.stack([norm(conv(x)) for conv, norm in zip(layer.convs, layer.norms, strict=True)]).sum(0)

    return run


def operators() -> list[tuple[str, str, Form, Form, list[Tensor]]]:
    """What, instead of what, the plain form, ours and their input."""
    near, linear = AggregatedAttention(144, 6, 4, (28, 28)), ComplexLinear(256, 8)
    large, seven = DepthwiseConv2d(160, 13, bias=False), DepthwiseConv2d(448, 7)
    branches = DilatedReparam(160, 13).eval()
    spectrum = [torch.randn(480, 14, 8) for _ in range(2)]

    def complex_linear(real: Tensor, imaginary: Tensor) -> Tensor:
        return torch.stack(linear(real, imaginary))

    return [
        ("transnext: 3x3 neighbourhood, 28x28, 6 heads of 24", "unfolded keys and values", unfolded((28, 28)),
         shifted(near, (28, 28)), [torch.randn(4, 6, 784, 24) for _ in range(3)]),
        ("hornet_gf: global filter, 480 channels, 14x14", "real and imaginary parts", parts_of_maps, filter_map,
         [torch.randn(4, 480, 14, 14), *spectrum]),
        ("orchid: filter, 384 channels, 196 tokens", "real and imaginary parts", parts_of_sequences, filter_sequence,
         [torch.randn(4, 384, 196), torch.randn(4, 384, 99), torch.randn(4, 384, 99)]),
        ("affnet: complex layer, 256 channels, 16x9", "four real products", four_products(linear), complex_linear,
         [torch.randn(4, 256, 16, 9), torch.randn(4, 256, 16, 9)]),
        ("tvconv: 3x3, 96 channels, 48x48", "products, then their sum", sum_of_views, convolve_by_place,
         [torch.randn(4, 96, 48, 48), torch.randn(96, 9, 48, 48)]),
        ("unireplknet: 13x13 and its branches in eval mode, 160 channels, 28x28", "branch by branch",
         branch_by_branch(branches), branches, [torch.randn(4, 160, 28, 28)]),
        ("unireplknet: depthwise 13x13, 160 channels, 28x28", "torch's gradient", by_torch(large), large,
         [torch.randn(4, 160, 28, 28)]),
        ("hornet_7x7: depthwise 7x7, 448 channels, 14x14", "torch's gradient", by_torch(seven), seven,
         [torch.randn(4, 448, 14, 14)]),
    ]  # fmt: skip


def ratio(plain: Callable[[], object], ours: Callable[[], object]) -> float:
    """How many times as fast ours is: the median over the rounds, both having run before."""
    ratios: list[float] = []
    for number in range(ROUNDS + 1):
        start = time.perf_counter()
        plain()
        middle = time.perf_counter()
        ours()
        if number:
            ratios.append((middle - start) / (time.perf_counter() - middle))
    return statistics.median(ratios)


def trained(form: Form, given: list[Tensor]) -> Callable[[], object]:
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    return lambda: form(*leaves).square().sum().backward()


def forward(form: Form, given: list[Tensor]) -> Callable[[], object]:
    @torch.inference_mode()
    def run() -> Tensor:
        return form(*given)

    return run


def main() -> None:
    torch.manual_seed(0)
    rows = [
        "| operator | instead of | forward | forward and backward | largest difference, of the largest value |",
        "|---|---|---|---|---|",
    ]
    for name, instead, plain, ours, given in operators():
        with torch.no_grad():
            expected, found = plain(*given), ours(*given)
        difference = float((found - expected).abs().max() / expected.abs().max())
        rows.append(
            f"| {name} | {instead} | x {ratio(forward(plain, given), forward(ours, given)):.2f} | "
            f"x {ratio(trained(plain, given), trained(ours, given)):.2f} | {difference:.1e} |"
        )
        print(rows[-1], flush=True)
    rows += [
        "",
        f"({os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}, "
        f"float32, images in fours, {time.strftime('%Y-%m-%d')})",
    ]
    PAGE.write_text(between(PAGE.read_text(encoding="utf-8"), "operators", "\n".join(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
