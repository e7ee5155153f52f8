"""Full fine-tuning of the default backbone on solar cells (ELPV, defective or not) at 160 pixels, three epochs.

Logistic regression on the frozen features of the same backbone sees the same training images, three quarters of all;
both are measured on the others. Near-duplicates stay on one side.
"""

import numpy as np

from foveal.backbones.adapter import load_backbone
from foveal.data.open import open_dataset
from foveal.data.split import make_split
from foveal.features.small import features_of
from foveal.methods.adapt.full import Full, Options
from foveal.methods.adapt.linear import Linear
from foveal.train.small import measure


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    cells = open_dataset("sample:elpv")
    backbone = load_backbone("tf_efficientnet_lite0", offline=True, size=64 if tiny else 160)
    groups = np.arange(len(cells)) if tiny else features_of(cells).groups
    held = make_split(cells.labels, groups, seed, test=0.25, val=0.0) == "test"
    train_rows, test_rows = (np.flatnonzero(side)[: 32 if tiny else None] for side in (~held, held))
    values: dict[str, float] = {}
    for name, method in {"full": Full(Options(epochs=1 if tiny else 3)), "linear": Linear()}.items():
        outcome = measure(method, backbone, cells, train_rows, test_rows, seed)
        values[f"{name}.balanced_accuracy"] = outcome.balanced_accuracy
        values[f"{name}.seconds"] = outcome.seconds
    return values
