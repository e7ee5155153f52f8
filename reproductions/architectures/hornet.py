"""HorNet in small on solar cells, whole or defective, at 64 pixels: orders 2, 3, 4, 5 against order 1 everywhere.

Both nets (widths 24 to 192) start at random and see the same 300 images of each class for the same epochs. Beside the
accuracy, how far a place of the third stage sees at 224 pixels, with the spectral filter and with 7x7 convolutions,
all residual branches at full weight.
"""

import torch
from torch import nn

from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full, Options
from foveal.train.small import race, receptive_field, small_net

SMALL = {"dims": (24, 48, 96, 192), "depths": (1, 1, 2, 1)}


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    nets = {
        "high_order": small_net("hornet_tiny_7x7", seed, size=64, **SMALL),
        "order_one": small_net("hornet_tiny_7x7", seed, size=64, orders=(1, 1, 1, 1), **SMALL),
    }
    method = Full(Options(epochs=1 if tiny else 15, lr=2e-3, head_lr_multiplier=1.0))
    elpv = open_dataset("sample:elpv")
    values = race(nets, method, elpv, seed, train=8 if tiny else 300, test=20 if tiny else 600)
    for name, arch in (("spectral", "hornet_tiny_gf"), ("local", "hornet_tiny_7x7")):
        net = small_net(arch, seed, size=224, **SMALL).eval()
        for parameter_name, parameter in net.named_parameters():
            if parameter_name.endswith("gamma"):
                nn.init.ones_(parameter)
        images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
        values[f"{name}.receptive_field"] = receptive_field(net, images, stage=2)
    return values
