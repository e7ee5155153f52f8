"""Time of one sequence layer against attention as the sequence grows; writes the `sequence` section of
docs/benchmarks.md.

    python benchmarks/sequence.py
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from run import PAGE, between
from torch import Tensor, nn

from foveal.architectures.orchid import Orchid
from foveal.architectures.sgconv import SGConv

WIDTH, HEADS = 64, 2
LENGTHS = (1024, 4096, 16_384, 65_536)
LONGEST_ATTENTION = 16_384


class Attention(nn.Module):
    """Self-attention by torch's fused kernel, [B, L, D] -> [B, L, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind()
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "attention": lambda length: Attention(),
    "orchid, type I": lambda length: Orchid(WIDTH, length, "I"),
    "orchid, type II": lambda length: Orchid(WIDTH, length, "II"),
    "sgconv, both ways": lambda length: SGConv(WIDTH, length),
}


def seconds(layer: nn.Module, length: int) -> float:
    """Median of five forward passes on one sequence, after one to warm up."""
    x = torch.randn(1, length, WIDTH)
    times: list[float] = []
    with torch.inference_mode():
        for _ in range(6):
            start = time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    torch.manual_seed(0)
    rows = [
        f"| layer, width {WIDTH} | " + " | ".join(f"L = {length:,}" for length in LENGTHS) + " | growth, 4k to 16k |",
        "|---|" + "---|" * (len(LENGTHS) + 1),
    ]
    for name, make in LAYERS.items():
        found = {
            length: seconds(make(length).eval(), length)
            for length in LENGTHS
            if name != "attention" or length <= LONGEST_ATTENTION
        }
        cells = [f"{1000 * found[length]:.1f} ms" if length in found else "left out" for length in LENGTHS]
        growth = found[16_384] / found[4096]
        rows.append(f"| {name} | " + " | ".join(cells) + f" | x {growth:.1f} |")
        print(rows[-1], flush=True)
    exact = 4 * math.log2(16_384) / math.log2(4096)
    rows += [
        "",
        f"One sequence, forward, float32. L log L grows by {exact:.1f} from 4k to 16k, L^2 by 16. Attention is left "
        f"out above {LONGEST_ATTENTION:,} tokens: it would take 16 times its time there.",
        "",
        f"({os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d')})",
    ]
    PAGE.write_text(between(PAGE.read_text(encoding="utf-8"), "sequence", "\n".join(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
