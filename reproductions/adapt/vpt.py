"""VPT on a small ViT: taught digits 0 to 4 in four rotations, adapted to digits 5 to 9 with 60 images of each.

Deep and shallow prompts, full fine-tuning and logistic regression on the frozen features start from the same
weights and see the same images for the same number of epochs.
"""

from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full
from foveal.methods.adapt.full import Options as FullOptions
from foveal.methods.adapt.linear import Linear
from foveal.methods.adapt.vpt import Options, Vpt
from foveal.train.small import digits_transfer


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    epochs = 1 if tiny else 40
    teacher = Full(FullOptions(epochs=1 if tiny else 20, lr=2e-3, head_lr_multiplier=1.0, augment="none"))
    task = digits_transfer(open_dataset("sample:digits"), teacher, seed, tiny=tiny)
    shared = {"epochs": epochs, "lr": 1e-2, "batch_size": 32, "augment": "none"}
    methods = {
        "vpt": Vpt(Options(deep=True, **shared)),
        "vpt_shallow": Vpt(Options(deep=False, **shared)),
        "linear": Linear(),
        "full": Full(FullOptions(epochs=epochs, augment="none")),
    }
    values: dict[str, float] = {}
    for name, method in methods.items():
        outcome = task.measure(method, seed)
        values[f"{name}.balanced_accuracy"] = outcome.balanced_accuracy
        values[f"{name}.trained_params"] = outcome.trained_params
    return values
