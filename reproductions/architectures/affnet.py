"""AFFNet in small on solar cells, whole or defective, at 64 pixels: the adaptive filter against a fixed one and none.

Nets of the same frame (widths 16 to 72) learn from 300 images of each class. Beside them, the time of one mixer on 32
channels of 64x64 places over that of 32x32 places, and the same for attention.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from foveal.architectures.affnet import AdaptiveFilter
from foveal.core.seeds import derive, seed_everything
from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full, Options
from foveal.train.small import race, small_net

SMALL = {"dims": (16, 24, 32, 56, 72), "depths": (1, 1, 1, 2, 1)}


def seconds(mixer: Callable[[Tensor], Tensor], x: Tensor, runs: int) -> float:
    """Median time of one pass."""
    times: list[float] = []
    with torch.inference_mode():
        mixer(x)
        for _ in range(runs):
            start = time.perf_counter()
            mixer(x)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    nets = {
        mixer: small_net("affnet_et", seed, size=64, mixer=mixer, **SMALL)
        for mixer in ("adaptive", "fixed", "identity")
    }
    method = Full(Options(epochs=1 if tiny else 15, lr=2e-3, head_lr_multiplier=1.0))
    elpv = open_dataset("sample:elpv")
    values = race(nets, method, elpv, seed, train=8 if tiny else 300, test=20 if tiny else 600)

    seed_everything(derive(seed, "affnet-mixers"))
    runs = 1 if tiny else 20
    adaptive, attention = AdaptiveFilter(32), nn.MultiheadAttention(32, 2, batch_first=True)
    small, large = torch.randn(1, 32, 32, 32), torch.randn(1, 32, 64, 64)
    values["adaptive.growth"] = seconds(adaptive, large, runs) / seconds(adaptive, small, runs)

    def attend(x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return attention(tokens, tokens, tokens, need_weights=False)[0]

    values["attention.growth"] = seconds(attend, large, runs) / seconds(attend, small, runs)
    return values
