"""Full fine-tuning of the default backbone on solar cells (ELPV, defective or not) at 160 pixels, three epochs.

Logistic regression on the frozen features of the same backbone sees the same 1,968 training images; both are
measured on the other 656.
"""

import numpy as np

from foveal.backbones.adapter import load_backbone
from foveal.core.seeds import generator
from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full, Options
from foveal.methods.adapt.linear import Linear
from foveal.train.small import measure


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    cells = open_dataset("sample:elpv")
    backbone = load_backbone("tf_efficientnet_lite0", offline=True, size=64 if tiny else 160)
    order = generator(seed, "split").permutation(len(cells))
    train_rows, test_rows = (order[:32], order[32:64]) if tiny else (order[656:], order[:656])
    values: dict[str, float] = {}
    for name, method in {"full": Full(Options(epochs=1 if tiny else 3)), "linear": Linear()}.items():
        outcome = measure(method, backbone, cells, np.sort(train_rows), np.sort(test_rows), seed)
        values[f"{name}.balanced_accuracy"] = outcome.balanced_accuracy
        values[f"{name}.seconds"] = outcome.seconds
    return values
