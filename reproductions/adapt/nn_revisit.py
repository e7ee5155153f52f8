"""The tuned mix of neighbours and logistic regression against each alone, 2 to 64 images a class (128 on solar cells).

Solar cells (defect certain or excluded) on EfficientNet-Lite0 features, and digits on raw pixels. k, T and the mix
are tuned inside the drawn images; a share of 0 is a candidate.
"""

from foveal.features.small import digit_pixels, elpv_extremes, few_shot, mean_over
from foveal.methods.adapt.linear import Linear
from foveal.methods.adapt.nn_revisit import NnRevisit, Options

SHOTS = (2, 4, 8, 16, 32, 64)


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    methods = {
        "nn-revisit": NnRevisit(),
        "linear": Linear(),
        "knn": NnRevisit(Options(k=16, temperature=0.1, mix=1.0)),
        "half-mix": NnRevisit(Options(k=16, temperature=0.1, mix=0.5)),
    }
    values: dict[str, float] = {}
    for world, rows in (("elpv", elpv_extremes(tiny)), ("digits", digit_pixels(tiny))):
        values |= few_shot(methods, rows, world, SHOTS, seed)
        for name in methods:
            values[f"{name}.{world}_small.balanced_accuracy"] = mean_over(values, name, world, SHOTS[:3])
            values[f"{name}.{world}_large.balanced_accuracy"] = mean_over(values, name, world, SHOTS[3:])
            values[f"{name}.{world}.balanced_accuracy"] = mean_over(values, name, world, SHOTS)
    margins = [
        values[f"knn.digits_{shots}.balanced_accuracy"] - values[f"linear.digits_{shots}.balanced_accuracy"]
        for shots in SHOTS
    ]
    values["digits.least_margin_of_knn"] = min(margins)
    return values
