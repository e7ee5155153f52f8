"""Isotropic ConvNeXt in small against its pyramid, on woven fabric of three kinds at 96 pixels.

Six blocks of width 96 on 36 patches, and a ConvNeXt of four stages with about as many operations, both from nothing,
200 images of each class, the same epochs.
"""

from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full, Options
from foveal.train.small import race, small_net


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    nets = {
        "isotropic": small_net("convnext_iso_small", seed, size=96, embed_dim=96, depth=6),
        "pyramid": small_net(
            "convnext_tiny", seed, size=96, dims=(16, 32, 64, 128), depths=(1, 1, 3, 1), ls_init_value=None
        ),
    }
    method = Full(Options(epochs=1 if tiny else 20, lr=1e-3, head_lr_multiplier=1.0))
    textile = open_dataset("sample:textile")
    return race(nets, method, textile, seed, train=8 if tiny else 200, test=20 if tiny else 600)
