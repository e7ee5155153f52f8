"""PowerQuant on EfficientNet-Lite0's own weights: what coding changes, and how often the answer to a photo of fabric
stays; on a small ResNet that learnt noisy digits: what 4 and 3 bits cost; and the integer export, timed beside float32.

Uniform rounding is the same code with exponent 1. With 4 bits hardly a photo keeps its answer under either grid (4 bits
in the projections after the depthwise layers alone do that), so that agreement tells the grids apart no longer; the
likeness of the logits was added beside it after that was seen.
"""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from foveal.backbones.adapter import imagenet_classifier, normalise
from foveal.core.method import Classifier
from foveal.core.seeds import generator
from foveal.data.dataset import Dataset
from foveal.data.images import to_pixels
from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full
from foveal.methods.adapt.full import Options as FullOptions
from foveal.methods.shrink.powerquant import Options, Powerquant, coded_layers
from foveal.ship.beside import Exporter, timed_beside
from foveal.ship.variants import HeldOut
from foveal.train.classify import predict_logits
from foveal.train.events import balanced_accuracy
from foveal.train.small import few_and_rest, measure, shrunk, small_net, with_noise

PHOTOS, NOISE = 60, 0.35


def network(tiny: bool) -> Classifier:
    """EfficientNet-Lite0; `tiny`: a small one with random weights."""
    if not tiny:
        return imagenet_classifier()
    net = small_net("test_efficientnet", 0, size=32)
    return Classifier(net, nn.Linear(net.width, 1000)).eval()


@cache
def coded(bits: int, exponent: float, tiny: bool) -> tuple[Classifier, float, float]:
    """The network with coded weights, the exponent that was used, and what coding changed."""
    made = Powerquant(Options(bits=bits, exponent=exponent)).shrink(network(tiny), None, None)
    return made.module.eval(), made.notes["exponent"], made.notes["error"]


def squares(model: Classifier, dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    return np.stack([to_pixels(dataset.image(int(row)), model.backbone.preprocessing) for row in rows])


@torch.inference_mode()
def logits(model: nn.Module, pixels: np.ndarray, preprocessing: object) -> torch.Tensor:
    parts = torch.from_numpy(pixels).split(20)
    return torch.cat([model(normalise(part, preprocessing)) for part in parts])


def likeness(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean cosine of logits [n, C], from their means over photos: of what tells one photo from another."""
    return float(torch.cosine_similarity(found - found.mean(0), wanted - wanted.mean(0)).mean())


def on_lite0(seed: int, tiny: bool) -> dict[str, float]:
    """Errors of coding, the share of photos of fabric that keep their answer, and the likeness of the logits."""
    model, fabrics = network(tiny), open_dataset("sample:textile")
    rows = generator(seed, "photos").permutation(len(fabrics))[: 4 if tiny else PHOTOS]
    pixels = squares(model, fabrics, rows)
    before = logits(model, pixels, model.backbone.preprocessing)
    values: dict[str, float] = {}
    for bits in (8, 6, 4):
        for name, exponent in (("power", 0.0), ("uniform", 1.0)):
            other, used, error = coded(bits, exponent, tiny)
            after = logits(other, pixels, model.backbone.preprocessing)
            values |= {
                f"{name}.error_{bits}": error,
                f"{name}.exponent_{bits}": used,
                f"{name}.agreement_{bits}": float((after.argmax(1) == before.argmax(1)).float().mean()),
                f"{name}.likeness_{bits}": likeness(after, before),
            }
    return values


def on_digits(seed: int, tiny: bool) -> dict[str, float]:
    """Balanced accuracy that a small ResNet loses when its weights are coded."""
    digits = open_dataset("sample:digits")
    rows, rest = few_and_rest(digits.labels, 4 if tiny else 60, seed)
    rest = rest[:: 200 if tiny else 2]
    chosen = with_noise(shrunk(digits, np.concatenate([rows, rest]), 32), NOISE, seed)
    train, test = np.arange(len(rows)), np.arange(len(rows), len(chosen))
    net = small_net("test_resnet" if tiny else "resnet10t", seed, size=32)
    recipe = FullOptions(epochs=1 if tiny else 12, lr=2e-3, head_lr_multiplier=1.0, augment="none")
    outcome = measure(Full(recipe), net, chosen, train, test, seed)
    values = {"digits.balanced_accuracy": outcome.balanced_accuracy}
    for bits in (4, 3):
        for name, exponent in (("power", 0.0), ("uniform", 1.0)):
            small = Powerquant(Options(bits=bits, exponent=exponent)).shrink(outcome.model, None, None).module
            logits, _ = predict_logits(small, chosen, test, net.preprocessing, device="cpu")
            found = balanced_accuracy(logits, torch.from_numpy(chosen.labels[test]))
            values[f"digits.{name}.drop_{bits}"] = outcome.balanced_accuracy - found
    return values


def exported(seed: int, tiny: bool) -> dict[str, float]:
    """The integer model that 4 bits and exponent 1/2 make of the network, beside the float32 one it came from."""
    model, (small, _, _) = network(tiny), coded(4, 0.5, tiny)
    fabrics = open_dataset("sample:textile")
    rows = generator(seed, "photos").permutation(len(fabrics))[: 4 if tiny else 24]
    pixels = squares(model, fabrics, rows)
    classes = [str(number) for number in range(1000)]
    photos = [fabrics.image(int(row)) for row in rows[:2]]
    exporter = Exporter(model.backbone.preprocessing, classes, "single-label", photos, 1)
    held_out = HeldOut(pixels, np.zeros(len(pixels), np.int64), pixels[:1])
    codes = Powerquant().codes(small)
    timed = timed_beside(
        exporter, {"before": model, "after": small}, held_out, codes, list(pixels[:8]), seconds=0.2 if tiny else 4.0
    )
    before, int8 = timed.latency["before"], timed.latency["after, int8"]
    return {
        "lite0.int8.speedup": min(
            old["milliseconds"] / new["milliseconds"] for old, new in zip(before, int8, strict=True)
        ),
        "lite0.int8.weights_missing": weights_missing(exporter, small),
    }


def weights_missing(exporter: Exporter, model: Classifier) -> float:
    """How many 4-bit layers of torch are not, bit for bit, what the integers of the exported file stand for."""
    from foveal.ship.quantize import quantize

    wanted = {layer.weight.numpy().tobytes() for name, layer in coded_layers(model) if float(layer.exponent) == 0.5}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        exporter.file(model, source)
        square = np.zeros((model.backbone.preprocessing.size,) * 2 + (3,), np.uint8)
        quantize(source, target, [square], codes=Powerquant().codes(model))
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(target).graph.initializer}
    found = set()
    for name, integers in stored.items():
        if name.endswith("/weight/codes"):
            scale = stored[name.removesuffix("codes") + "scale"].reshape(-1, *[1] * (integers.ndim - 1))
            found.add((integers.astype(np.float32) * scale).tobytes())
    return float(len(wanted - found))


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    return {**on_lite0(seed, tiny), **on_digits(seed, tiny), **exported(seed, tiny)}
