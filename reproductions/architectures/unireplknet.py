"""UniRepLKNet in small on solar cells, whole or defective, at 64 pixels: dilated branches against the bare 13x13.

Both nets (widths 24 to 192, kernels of 13 in stages 2 to 4) start at random and see the same 300 images of each class
for the same epochs; after the merge both have the same form and cost. Beside the accuracy, how far a place of the
third stage sees on 224-pixel photos of cells, against the same net with 3x3 kernels only.
"""

import numpy as np
import torch
from torch import nn

from foveal.backbones.adapter import normalise
from foveal.data.images import to_pixels
from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full, Options
from foveal.train.small import race, receptive_field, small_net

SMALL = {"dims": (24, 48, 96, 192), "depths": (1, 1, 2, 1)}
LARGE, THREES = ((3,), (13,), (13, 13), (13,)), ((3,), (3,), (3, 3), (3,))


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    nets = {
        name: small_net("unireplknet_a", seed, size=64, kernel_sizes=LARGE, branches=branches, **SMALL)
        for name, branches in (("reparam", True), ("single", False))
    }
    method = Full(Options(epochs=1 if tiny else 15, lr=2e-3, head_lr_multiplier=1.0))
    elpv = open_dataset("sample:elpv")
    values = race(nets, method, elpv, seed, train=8 if tiny else 300, test=20 if tiny else 600)
    for name, kernels in (("large", LARGE), ("threes", THREES)):
        net = small_net("unireplknet_a", seed, size=224, kernel_sizes=kernels, **SMALL).eval()
        for key, parameter in net.named_parameters():
            if key.endswith(".gamma"):
                nn.init.ones_(parameter)
        rows = np.random.default_rng(seed).choice(len(elpv), 2, replace=False)
        pixels = np.stack([to_pixels(elpv.image(int(row)), net.preprocessing) for row in rows])
        values[f"{name}.receptive_field"] = receptive_field(
            net, normalise(torch.from_numpy(pixels), net.preprocessing), stage=2
        )
    return values
