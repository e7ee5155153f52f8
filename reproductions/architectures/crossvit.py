"""CrossViT's fusion in small on woven fabric of three kinds, at 64 pixels: two ViTs, patches of 4 and of 8 pixels.

As in the paper the branch of small patches is narrow and shallow (width 32, one block a stage) and the other wide and
deep (64, two a stage), in two stages. Fused through class tokens, by attention among all tokens, or not at all, the
nets start at random and see the same 120 images of each class for the same epochs. Beside the accuracy, the time of a
training step, and how the time of one fusion grows from 512 to 2,048 patches in each branch.
"""

import time

import torch

from foveal.architectures.crossvit import CrossTokenFusion
from foveal.core.seeds import derive, seed_everything
from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full, Options
from foveal.train.small import race, small_net

SMALL = {
    "img_size": 64,
    "patch_size": (4, 8),
    "embed_dim": (32, 64),
    "depth": (2, 4),
    "num_heads": (2, 2),
    "mlp_ratio": (2.0, 2.0),
    "every": (1, 2),
}
SCHEMES = {"cross": "cross", "all_attention": "all", "none": "none"}


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    nets = {
        name: small_net("crossvit_pair_tiny_224", seed, size=64, scheme=scheme, **SMALL)
        for name, scheme in SCHEMES.items()
    }
    method = Full(Options(epochs=1 if tiny else 10, lr=1e-3, batch_size=16, head_lr_multiplier=1.0))
    textile = open_dataset("sample:textile")
    values = race(nets, method, textile, seed, train=8 if tiny else 120, test=20 if tiny else 300)
    for name, scheme in SCHEMES.items():
        if scheme != "none":
            values[f"{name}.growth"] = growth(scheme, seed, 128 if tiny else 512)
    return values


def growth(scheme: str, seed: int, patches: int) -> float:
    """How many times longer a fusion of width 64 takes on four times as many patches; best of four runs each."""
    seed_everything(derive(seed, "growth"))
    fusion = CrossTokenFusion(64, 64, 2, scheme).eval()  # pyright: ignore[reportArgumentType]
    best: list[float] = []
    for count in (patches, 4 * patches):
        tokens = torch.randn(2, 1, 1 + count, 64)
        times: list[float] = []
        with torch.no_grad():
            for _ in range(5):
                start = time.perf_counter()
                fusion(tokens[0], tokens[1])
                times.append(time.perf_counter() - start)
        best.append(min(times[1:]))
    return best[1] / best[0]
