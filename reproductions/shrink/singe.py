"""SInGE on a small ResNet that learnt noisy digits: half of its multiply-accumulates, beside removal by magnitude and
at random with the same schedule of tuning, and beside all removal before all tuning; and what 30 and 50% of the
channels cost without any tuning.

Noise and tuning were chosen on seeds 100 to 102, by the dense network and removal at random and by magnitude alone; no
channel was scored by SInGE there. With noise of 0.35 and 114 steps of tuning, the setting before, any removal was
repaired to within 0.02 of a dense accuracy of 0.96, less than it varied from seed to seed. With noise of 0.6 and 28
steps, two after each layer and ten at the end, removal at random lost 0.131, 0.094 and 0.127 and by magnitude 0.143,
0.177 and 0.113. SInGE's own options are what they were.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foveal.backbones.channels import Group, groups
from foveal.core.families.shrink import Shrunk, Target, TaskData
from foveal.core.method import Classifier
from foveal.core.seeds import derive
from foveal.data.dataset import Dataset
from foveal.data.open import open_dataset
from foveal.evaluate.beside import share_of
from foveal.methods.adapt.full import Full
from foveal.methods.adapt.full import Options as FullOptions
from foveal.methods.shrink.singe import Options, Singe
from foveal.ship.beside import Exporter, timed_beside
from foveal.ship.variants import HeldOut
from foveal.train.classify import predict_logits
from foveal.train.events import balanced_accuracy
from foveal.train.small import balanced_weights, few_and_rest, measure, shrunk, small_net, with_noise
from foveal.train.tuning import TrainingImages

NOISE, SIZE = 0.6, 32


class Magnitude(Singe):
    """The sum of what a channel's weights are, without their signs (Li et al. 2017)."""

    def score(self, model: Classifier, group: Group, data: TaskData) -> Tensor:
        return sum(
            (parameter.detach().abs().flatten(1).sum(1)[index].sum(1) for parameter, index in group.parameters(model)
             if parameter.ndim > 1),
            torch.zeros(group.units),
        )  # fmt: skip


class Random(Singe):
    def score(self, model: Classifier, group: Group, data: TaskData) -> Tensor:
        return torch.rand(group.units, generator=torch.Generator().manual_seed(group.units))


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    digits = open_dataset("sample:digits")
    rows, rest = few_and_rest(digits.labels, 4 if tiny else 60, seed)
    rest = rest[:: 100 if tiny else 2]
    chosen = with_noise(shrunk(digits, np.concatenate([rows, rest]), SIZE), NOISE, seed)
    train, test = np.arange(len(rows)), np.arange(len(rows), len(chosen))
    net = small_net("test_resnet" if tiny else "resnet10t", seed, size=SIZE)
    recipe = FullOptions(epochs=1 if tiny else 12, lr=2e-3, head_lr_multiplier=1.0, augment="none")
    outcome = measure(Full(recipe), net, chosen, train, test, seed)
    dense, layers = outcome.model, len(groups(outcome.model))
    half = Target("macs", 0.5, lambda model: share_of("macs", model, dense, SIZE))
    options = Options(images=32, between=0 if tiny else 2, after=1 if tiny else 10, steps=2 if tiny else 20)
    options = replace(options, rate=Singe(options).rate_for(dense, groups(dense), half))

    def run(method: Singe) -> Shrunk:
        with tempfile.TemporaryDirectory() as work:
            data = TrainingImages(
                chosen, chosen.labels, train, net.preprocessing, balanced_weights(chosen.labels[train], 10),
                derive(seed, "singe"), device=torch.device("cpu"), work=Path(work), augment="none",
            )  # fmt: skip
            return method.shrink(dense, data, None)

    def accuracy(model: Classifier) -> float:
        logits, _ = predict_logits(model, chosen, test, net.preprocessing, device="cpu")
        return balanced_accuracy(logits, torch.from_numpy(chosen.labels[test]))

    values = {"dense.balanced_accuracy": outcome.balanced_accuracy}
    steps = options.between * layers + options.after
    contest = {
        "singe": Singe(options),
        "magnitude": Magnitude(options),
        "random": Random(options),
        "post-hoc": Singe(replace(options, between=0, after=steps)),
    }
    made = {name: run(method).module for name, method in contest.items()}
    values |= {f"{name}.drop": outcome.balanced_accuracy - accuracy(model) for name, model in made.items()}
    for rate in (0.3, 0.5):
        bare = replace(options, between=0, after=0, rate=rate, round_to=1)
        for name, method in (("singe", Singe(bare)), ("magnitude", Magnitude(bare)), ("random", Random(bare))):
            values[f"{name}.untuned_{round(100 * rate)}"] = accuracy(run(method).module)
    values["singe.macs"] = half.measure(made["singe"])
    values["singe.latency"] = latency(chosen, test, dense, made["singe"], 0.1 if tiny else 2.0)
    return values


def latency(dataset: Dataset, rows: np.ndarray, before: Classifier, after: Classifier, seconds: float) -> float:
    """Milliseconds of one image over those of the dense model, in ONNX Runtime on one thread, timed in turns."""
    exporter = Exporter(
        before.backbone.preprocessing, dataset.classes, "single-label", [dataset.image(int(rows[0]))], 1
    )
    squares = np.stack([np.asarray(dataset.image(int(row))) for row in rows[:8]])
    held_out = HeldOut(squares, dataset.labels[rows[:8]], squares[:1])
    timed = timed_beside(exporter, {"before": before, "after": after}, held_out, seconds=seconds)
    return timed.latency["after"][0]["milliseconds"] / timed.latency["before"][0]["milliseconds"]
