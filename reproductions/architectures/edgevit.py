"""EdgeViT in small on solar cells, whole or defective, at 64 pixels: with and without the two local steps of a block.

Nets of half the xxs variant's widths learn from 300 images of each class, whole, without learned propagation (a
delegate's answer is copied to its window), and without local aggregation. Beside them, the latency of the three
published sizes on one image of 224 pixels.
"""

import statistics
import time

import torch

from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full, Options
from foveal.train.small import race, small_net

SMALL = {"dims": (18, 36, 72, 144), "head_dim": 18, "depths": (1, 1, 2, 1)}


def milliseconds(arch: str, seed: int, runs: int) -> float:
    """Median time of one image."""
    net = small_net(arch, seed, size=224).eval()
    image, times = torch.zeros(1, 3, 224, 224), []
    with torch.inference_mode():
        net(image)
        for _ in range(runs):
            start = time.perf_counter()
            net(image)
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    ablations = {"whole": {}, "copied": {"spread": "nearest"}, "no_aggregation": {"local": False}}
    nets = {name: small_net("edgevit_xxs", seed, size=64, **SMALL, **change) for name, change in ablations.items()}
    method = Full(Options(epochs=1 if tiny else 15, lr=1e-3, head_lr_multiplier=1.0))
    elpv = open_dataset("sample:elpv")
    values = race(nets, method, elpv, seed, train=8 if tiny else 300, test=20 if tiny else 600)
    for size in ("xxs", "xs", "s"):
        values[f"{size}.milliseconds"] = milliseconds(f"edgevit_{size}", seed, 2 if tiny else 50)
    return values
