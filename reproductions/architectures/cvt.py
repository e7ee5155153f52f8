"""CvT in small on solar cells, whole or defective, at 64 pixels: against a plain ViT with about as many weights.

Both learn from 300 images of each class for the same epochs. Beside the accuracy, how much the features of untrained
nets of both kinds change when the photo is cut 16 pixels further right: the distance over the length.
"""

import numpy as np
import torch

from foveal.backbones.adapter import Backbone, normalise
from foveal.data.images import to_pixels
from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full, Options
from foveal.train.small import race, small_net, small_vit

SMALL = {"dims": (32, 64, 128), "num_heads": (1, 2, 4), "depths": (1, 1, 2)}
SHIFT = 16


def change(net: Backbone, photos: torch.Tensor) -> float:
    """Mean relative change of the features of photos uint8 [B, S, S + SHIFT, 3] from their left cut to their right."""
    left, right = photos[:, :, :-SHIFT], photos[:, :, SHIFT:]
    with torch.inference_mode():
        a, b = (net.eval()(normalise(part, net.preprocessing)) for part in (left, right))
    return float(((a - b).norm(dim=1) / a.norm(dim=1)).mean())


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    nets = {
        "cvt": small_net("cvt_13", seed, size=64, **SMALL),
        "vit": small_vit(seed, size=64, patch=8, width=96, depth=5),
    }
    elpv = open_dataset("sample:elpv")
    rows = np.random.default_rng(seed).choice(len(elpv), 4 if tiny else 64, replace=False)
    wide = small_net("cvt_13", seed, size=64 + SHIFT, **SMALL).preprocessing
    photos = torch.from_numpy(np.stack([to_pixels(elpv.image(int(row)), wide) for row in rows]))[:, :64]
    shifts = {f"{name}.change": change(net, photos) for name, net in nets.items()}
    method = Full(Options(epochs=1 if tiny else 20, lr=1e-3, head_lr_multiplier=1.0))
    values = race(nets, method, elpv, seed, train=8 if tiny else 300, test=20 if tiny else 600)
    return {**values, **shifts}
