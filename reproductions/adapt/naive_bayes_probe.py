"""Sample-size curves of naive Bayes and logistic regression: who nears its own best sooner, and where they cross.

A mixture of Gaussians with independent features (100 of them, 5 classes), where naive Bayes' assumption is true, and
solar cells and digits, where it is not. Both methods see the same draws and are measured on the same rows.
"""

import itertools
from collections.abc import Mapping

import numpy as np
import torch

from foveal.core.seeds import generator
from foveal.features.small import Labelled, balanced_accuracy, digit_pixels, elpv_extremes, few_shot, fitted
from foveal.methods.adapt.linear import Linear
from foveal.methods.adapt.naive_bayes_probe import NaiveBayesProbe

SHOTS = (2, 4, 8, 16, 32, 64, 128)
METHODS = {"naive-bayes-probe": NaiveBayesProbe(), "linear": Linear()}


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    values: dict[str, float] = {}
    sizes = (40, 80, 160) if tiny else (20, 40, 80, 160, 320, 640, 1280, 2560, 5120)
    test = gaussians(500 if tiny else 5000, seed, "test")
    for name, method in METHODS.items():
        curve = {m: balanced_accuracy(fitted(method, gaussians(m, seed, "train", m), seed), test) for m in sizes}
        values |= {f"{name}.gaussians_{m}.balanced_accuracy": value for m, value in curve.items()}
        values[f"{name}.gaussians.samples_to_plateau"] = samples_to_plateau(curve)
    values["gaussians.samples_saved"] = (
        values["linear.gaussians.samples_to_plateau"] - values["naive-bayes-probe.gaussians.samples_to_plateau"]
    )
    for world, rows in (("elpv", elpv_extremes(tiny)), ("digits", digit_pixels(tiny))):
        found = few_shot(METHODS, rows, world, SHOTS, seed)
        curves = {name: {m: found[f"{name}.{world}_{m}.balanced_accuracy"] for m in SHOTS} for name in METHODS}
        values |= found
        for name, curve in curves.items():
            values[f"{name}.{world}.samples_to_plateau"] = samples_to_plateau(curve)
        values[f"{world}.crossover"] = crossover(curves["naive-bayes-probe"], curves["linear"])
    return values


def gaussians(m: int, seed: int, *purpose: object, width: int = 100, classes: int = 5) -> Labelled:
    """`m` rows of a mixture with class means of deviation 0.25 and one deviation per feature, shared by the classes."""
    world, rng = generator(seed, "mixture"), generator(seed, "mixture", *purpose)
    deviation = world.uniform(0.5, 2.0, width)
    means = world.normal(0, 0.25, (classes, width)) * deviation
    y = rng.permutation(np.arange(m) % classes)
    X = (means[y] + rng.normal(size=(m, width)) * deviation).astype(np.float32)
    return Labelled(torch.from_numpy(X), torch.from_numpy(y), np.arange(m))


def samples_to_plateau(curve: Mapping[int, float], within: float = 0.02) -> float:
    """The least number of samples from which accuracy stays within `within` of its value at the most samples."""
    best = curve[max(curve)]
    near = itertools.takewhile(lambda m: curve[m] >= best - within, sorted(curve, reverse=True))
    return float(min(near))


def crossover(first: Mapping[int, float], second: Mapping[int, float]) -> float:
    """The least number of samples from which `second` stays ahead of `first`; one more than the most, if never."""
    ahead = list(itertools.takewhile(lambda m: second[m] > first[m], sorted(first, reverse=True)))
    return float(min(ahead)) if ahead else float(max(first) + 1)
