"""T2T-ViT in small on woven fabric of three kinds, at 96 pixels: soft splits against 16 x 16 patches.

Both nets have four blocks of width 96 over 36 tokens, start at random, and see the same 200 images of each class for
the same epochs.
"""

from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full, Options
from foveal.train.small import race, small_net

SMALL = {"img_size": 96, "embed_dim": 96, "depth": 4, "num_heads": 3, "mlp_ratio": 3.0, "qkv_bias": False}


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    nets = {
        "t2t": small_net("t2t_vit_14", seed, size=96, **SMALL),
        "patches": small_net("vit_tiny_patch16_224", seed, size=96, **SMALL),
    }
    method = Full(Options(epochs=1 if tiny else 20, lr=1e-3, head_lr_multiplier=1.0))
    textile = open_dataset("sample:textile")
    return race(nets, method, textile, seed, train=8 if tiny else 200, test=20 if tiny else 600)
