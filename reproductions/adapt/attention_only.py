"""Attention-only fine-tuning of a small ViT (96 wide, 6 blocks): taught digits, adapted to defects of solar cells.

Training only attention, only MLPs, or everything starts from the same weights, for the same epochs, on the same 400
cell images at 32 pixels. Step times are medians within the run.
"""

from typing import Any

import numpy as np

from foveal.blocks.tuning import SteadyClassifier, zero_linear
from foveal.core.method import Classifier
from foveal.data.open import open_dataset
from foveal.methods.adapt.attention_only import AttentionOnly, Options, ffn_only
from foveal.methods.adapt.full import Full
from foveal.methods.adapt.full import Options as FullOptions
from foveal.train.small import few_and_rest, measure, shrunk, small_vit


class FfnOnly(AttentionOnly):
    """The mirror image."""

    def attach(self, backbone: Any, classes: int) -> Classifier:
        ffn_only(backbone)
        return SteadyClassifier(backbone, zero_linear(backbone.width, classes))


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    digits, cells = open_dataset("sample:digits"), open_dataset("sample:elpv")
    backbone = small_vit(seed, patch=8, width=32 if tiny else 96, depth=2 if tiny else 6)
    teacher = Full(FullOptions(epochs=1 if tiny else 20, lr=1e-3, head_lr_multiplier=1.0, augment="none"))
    taught = measure(teacher, backbone, digits, *few_and_rest(digits.labels, 4 if tiny else 120, seed), seed)

    chosen, _ = few_and_rest(cells.labels, 12 if tiny else 500, seed)
    small = shrunk(cells, chosen, 36)
    train_rows, test_rows = few_and_rest(small.labels, 6 if tiny else 200, seed + 1)
    shared = {"epochs": 1 if tiny else 20, "lr": 5e-4, "batch_size": 32}
    methods = {
        "attention_only": AttentionOnly(Options(head_lr_multiplier=4.0, **shared)),
        "ffn_only": FfnOnly(Options(head_lr_multiplier=4.0, **shared)),
        "full": Full(FullOptions(head_lr_multiplier=4.0, weight_decay=0.01, **shared)),
    }
    values = {"digits.balanced_accuracy": taught.balanced_accuracy}
    for name, method in methods.items():
        outcome = measure(method, taught.model.backbone, small, train_rows, np.sort(test_rows), seed)  # type: ignore[arg-type]
        values[f"{name}.balanced_accuracy"] = outcome.balanced_accuracy
        values[f"{name}.step_seconds"] = outcome.seconds_per_step
        values[f"{name}.trained_params"] = outcome.trained_params
    return values
