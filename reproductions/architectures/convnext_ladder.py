"""Three rungs of the way from ResNet to ConvNeXt, a quarter as wide, on woven fabric of three kinds at 64 pixels.

Step 2 (the ResNet with ConvNeXt's stages), step 4 (its 3x3 convolution made depthwise and nothing given in return) and
step 15 (ConvNeXt): 1, 1, 3, 1 blocks, all from nothing, on the same 200 images of each class, for the same epochs, by
the same recipe.
"""

from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full, Options
from foveal.train.small import race, small_net

WIDTHS = {"step_02": (16, 32, 64, 128), "step_04": (16, 32, 64, 128), "step_15": (24, 48, 96, 192)}


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    nets = {
        name: small_net(f"convnext_{name}", seed, size=64, dims=dims, depths=(1, 1, 3, 1))
        for name, dims in WIDTHS.items()
    }
    method = Full(Options(epochs=1 if tiny else 20, lr=1e-3, head_lr_multiplier=1.0))
    textile = open_dataset("sample:textile")
    return race(nets, method, textile, seed, train=8 if tiny else 200, test=20 if tiny else 600)
