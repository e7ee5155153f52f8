"""NiNformer in small on woven fabric of three kinds, at 64 pixels: four blocks against an MLP-Mixer of seven.

Width 96 on 64 tokens, as many parameters (0.44 million), both from nothing, 200 images of each class, the same epochs.
"""

from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full, Options
from foveal.train.small import race, small_net

SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "mlp_ratio": (2.0, 2.0)}


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    nets = {
        "ninformer": small_net("ninformer_cifar", seed, size=64, num_blocks=4, **SMALL),
        "mixer": small_net("ninformer_cifar", seed, size=64, num_blocks=7, gated=False, **SMALL),
    }
    method = Full(Options(epochs=1 if tiny else 20, lr=1e-3, head_lr_multiplier=1.0))
    textile = open_dataset("sample:textile")
    return race(nets, method, textile, seed, train=8 if tiny else 200, test=20 if tiny else 600)
