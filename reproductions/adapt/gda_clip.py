"""Text-free GDA-CLIP against logistic regression, naive Bayes and neighbours, 2 to 128 images a class, same rows.

Logistic regression comes twice: with scikit-learn's default strength c=1, and with the strength chosen on folds.

Solar cells (defect certain or excluded) on EfficientNet-Lite0 features, and digits on raw pixels.
"""

from foveal.features.small import digit_pixels, elpv_extremes, few_shot, mean_over
from foveal.methods.adapt.gda_clip import GdaClip
from foveal.methods.adapt.linear import Linear, Options
from foveal.methods.adapt.naive_bayes_probe import NaiveBayesProbe
from foveal.methods.adapt.nn_revisit import NnRevisit
from foveal.methods.adapt.nn_revisit import Options as NnOptions

SHOTS = (2, 4, 8, 16, 32, 64, 128)


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    methods = {
        "gda-clip": GdaClip(),
        "linear": Linear(),
        "logistic-c1": Linear(Options(c=1.0)),
        "naive-bayes-probe": NaiveBayesProbe(),
        "knn": NnRevisit(NnOptions(k=16, temperature=0.1, mix=1.0)),
    }
    values: dict[str, float] = {}
    for world, rows in (("elpv", elpv_extremes(tiny)), ("digits", digit_pixels(tiny))):
        values |= few_shot(methods, rows, world, SHOTS, seed)
    for name in methods:
        values[f"{name}.elpv_8_to_64.balanced_accuracy"] = mean_over(values, name, "elpv", SHOTS[2:6])
    margins = [
        values[f"gda-clip.digits_{shots}.balanced_accuracy"]
        - values[f"naive-bayes-probe.digits_{shots}.balanced_accuracy"]
        for shots in SHOTS
    ]
    values["digits.least_margin_over_naive_bayes"] = min(margins)
    return values
