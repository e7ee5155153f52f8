"""TransNeXt in small on solar cells, whole or defective, at 64 pixels: both parts of its attention, and its gated MLP.

The net (widths 24 to 192) learns from 300 images of each class with local and pooled keys, with pooled keys and the
query's own place alone, and with plain MLPs of as many weights in place of the gated ones. All see the test images
once more with noise of a tenth of the brightness range.
"""

from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full, Options
from foveal.train.small import race, small_net

SMALL = {"img_size": 64, "dims": (24, 48, 96, 192), "num_heads": (1, 2, 4, 8), "depths": (1, 1, 2, 1)}


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    nets = {
        "aggregated": small_net("transnext_micro", seed, size=64, **SMALL),
        "pooled": small_net("transnext_micro", seed, size=64, window_size=1, **SMALL),
        "plain_mlp": small_net("transnext_micro", seed, size=64, conv_glu=False, **SMALL),
    }
    method = Full(Options(epochs=1 if tiny else 12, lr=1e-3, head_lr_multiplier=1.0))
    elpv = open_dataset("sample:elpv")
    return race(nets, method, elpv, seed, train=8 if tiny else 300, test=20 if tiny else 600, noise=0.1)
