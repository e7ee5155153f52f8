"""Operations do not tell the latency: efficiency of two blocks, and how well two numbers rank ten networks.

A dense 3x3 block as in ResNet against a ConvNeXt block with a 7x7 depthwise convolution, both of about 1.5 GMAC on a
28 x 28 map; then Kendall's tau between the measured latency of ten timm networks (one image of 160 pixels, float32,
one thread or as many as torch has) and their operations, or their least time by the waterline. Peak and bandwidth are
measured in the same run.
"""

import itertools

import timm
import torch
from timm.models.convnext import ConvNeXtBlock
from torch import nn

from foveal.core.seeds import seed_everything
from foveal.evaluate.waterline import Waterline, efficiency, kernels, latency, measure_bandwidth, measure_peak

NETWORKS = (
    "resnet18", "resnet34", "resnet50", "convnext_atto", "convnext_pico", "mobilenetv3_large_100", "efficientnet_b0",
    "tf_efficientnet_lite0", "regnety_004", "vit_tiny_patch16_224",
)  # fmt: skip


def tau(a: list[float], b: list[float]) -> float:
    """Kendall's: pairs in the same order less pairs in the other, over all pairs."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    return sum(1 if (a[i] - a[j]) * (b[i] - b[j]) > 0 else -1 for i, j in pairs) / len(pairs)


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    seed_everything(seed)
    peak = measure_peak(size=256 if tiny else 1024)
    bandwidth = measure_bandwidth(megabytes=8 if tiny else 128)
    repeats = 10 if tiny else 30
    width = 32 if tiny else 320
    blocks = {
        "dense": (
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
        ),
        "depthwise": nn.Sequential(*[ConvNeXtBlock(width) for _ in range(2)]),
    }
    values: dict[str, float] = {"peak_gops": peak / 1e9, "bandwidth_gbs": bandwidth / 1e9}
    for name, block in blocks.items():
        x = torch.randn(1, width, 28, 28)
        found = kernels(block.eval(), x, width=4)
        values[f"{name}.efficiency"] = efficiency(found.ops, latency(lambda b=block, x=x: b(x), repeats), peak)
        values[f"{name}.intensity"] = found.ops / sum(kernel.bytes for kernel in found.kernels)
    times: list[float] = []
    ops: list[float] = []
    least: list[float] = []
    for name in NETWORKS[4:7] if tiny else NETWORKS:
        size = {"img_size": 160} if name.startswith("vit") else {}
        model = timm.create_model(name, **size).eval()
        x = torch.randn(1, 3, 160, 160)
        found = kernels(model, x, width=4)
        ops.append(found.ops)
        least.append(Waterline(found.kernels, peak, bandwidth).seconds)
        times.append(latency(lambda m=model, x=x: m(x), repeats))
    return {**values, "ops.tau": tau(ops, times), "waterline.tau": tau(least, times)}
