"""InceptionNeXt in small on solar cells, whole or defective, at 64 pixels: Inception, 7x7 and 3x3 depthwise mixers.

Three nets that differ in their mixers alone (widths 16 to 128, no layer scale) start at random and see the same 300
images of each class for the same epochs. Then the fitted net of 7x7 mixers gets Inception ones in their place and is
tuned on a fifth as many: once with what fits of the old kernels, once with random ones. Beside that, the median
milliseconds of each mixer alone on eight maps of 56 x 56 with 96 channels, five times in turns on one thread.
"""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.models.inception_next import InceptionDWConv2d
from torch import nn

from foveal.architectures.inceptionnext import inceptionize
from foveal.core.method import Classifier
from foveal.core.seeds import derive, generator
from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full
from foveal.methods.adapt.full import Options as FullOptions
from foveal.methods.shrink.inceptionnext import Inceptionnext, Options
from foveal.train.classify import predict_logits
from foveal.train.events import balanced_accuracy
from foveal.train.small import balanced_weights, few_and_rest, measure, shrunk, small_net
from foveal.train.tuning import TrainingImages

SIZE = 64
SMALL = {"dims": (16, 32, 64, 128), "depths": (1, 1, 2, 1), "ls_init_value": None}


def depthwise(dim: int, dilation: int, kernel: int, **more: object) -> nn.Module:
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2 * dilation, dilation=dilation, groups=dim, **more)


MIXERS = {
    "inception": InceptionDWConv2d,
    "depthwise_7x7": partial(depthwise, kernel=7),
    "depthwise_3x3": partial(depthwise, kernel=3),
}


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    epochs, train, test = (1, 8, 20) if tiny else (10, 300, 600)
    cells = open_dataset("sample:elpv")
    rows, rest = few_and_rest(cells.labels, train, seed)
    rest = np.sort(generator(seed, "inceptionnext").permutation(rest)[:test])
    chosen = shrunk(cells, np.concatenate([rows, rest]), SIZE)
    learn, judge = np.arange(len(rows)), np.arange(len(rows), len(chosen))
    method = Full(FullOptions(epochs=epochs, lr=2e-3, head_lr_multiplier=1.0))
    values: dict[str, float] = {}
    fitted: dict[str, Classifier] = {}
    for name, mixer in MIXERS.items():
        net = small_net("inception_next_tiny", seed, size=SIZE, token_mixers=mixer, **SMALL)
        outcome = measure(method, net, chosen, learn, judge, seed)
        fitted[name] = outcome.model
        values[f"{name}.balanced_accuracy"] = outcome.balanced_accuracy
        values[f"{name}.params"] = outcome.trained_params
        values[f"{name}.seconds_per_step"] = outcome.seconds_per_step

    dense = fitted["depthwise_7x7"].eval()
    preprocessing = dense.backbone.preprocessing
    options = Options(after=1 if tiny else 40, lr=1e-3)
    with tempfile.TemporaryDirectory() as work:

        def images(folder: str) -> TrainingImages:
            return TrainingImages(
                chosen, chosen.labels, learn, preprocessing, balanced_weights(chosen.labels[learn], 2),
                derive(seed, "inceptionnext"), device=torch.device("cpu"), work=Path(work) / folder,
            )  # fmt: skip

        def accuracy(model: nn.Module) -> float:
            logits, _ = predict_logits(model.eval(), chosen, judge, preprocessing, device="cpu")
            return balanced_accuracy(logits, torch.from_numpy(chosen.labels[judge]))

        untuned, report = inceptionize(dense, input_size=(SIZE, SIZE))
        values["swapped.untuned_balanced_accuracy"] = accuracy(untuned)
        values["swapped.depthwise_bytes"] = report.after.depthwise_bytes / report.before.depthwise_bytes
        made = Inceptionnext(options).shrink(dense, images("swapped"), None).module
        values["swapped.balanced_accuracy"] = accuracy(made)
        fresh, _ = inceptionize(dense, transfer=False, input_size=(SIZE, SIZE))
        fresh = images("random").tune(fresh.requires_grad_(True), options.after, options.lr)
        values["swapped_at_random.balanced_accuracy"] = accuracy(fresh)
    return values | mixer_times(seed, tiny)


def mixer_times(seed: int, tiny: bool) -> dict[str, float]:
    """Median milliseconds of each mixer, forward; the speedup is that over the 7x7 convolution."""
    side, repeats = (8, 1) if tiny else (56, 5)
    x = torch.randn(8, 96, side, side, generator=torch.Generator().manual_seed(seed))
    mixers = {name: make(96, dilation=1).eval() for name, make in MIXERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in mixers}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for turn in range(repeats + 1):
                for name, mixer in mixers.items():
                    start = time.perf_counter()
                    mixer(x)
                    if turn:
                        seconds[name].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    medians = {name: 1000 * statistics.median(each) for name, each in seconds.items()}
    values = {f"{name}_mixer.milliseconds": each for name, each in medians.items()}
    values["inception_mixer.speedup"] = medians["depthwise_7x7"] / medians["inception"]
    return values
