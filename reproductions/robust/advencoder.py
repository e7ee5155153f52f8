"""AdvEncoder on EfficientNet-Lite0 at 128 pixels: learnt from woven fabric without labels, tested on two other tasks.

The size of the change is chosen on fabric alone: the largest of 1, 2 and 4 of 255 at which random signs alter fewer
than 15% of a linear probe's answers to held-out fabric, or the smallest. Then the attack learns at that size from
other fabric, and its fooling rate is measured on linear probes for solar cells and digits, beside random signs and the
attack's own pixels shuffled, and on the probe for held-out fabric ('surrogate'). How long it learns was chosen on
held-out fabric too: 30 steps are not enough.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foveal.backbones.adapter import load_backbone
from foveal.backbones.pair import state_hash
from foveal.backbones.wrapper import Encoder
from foveal.core.families.robust import Perturbation
from foveal.core.preprocessing import Preprocessing
from foveal.core.seeds import derive, generator, seed_everything
from foveal.data.images import to_pixels
from foveal.data.open import open_dataset
from foveal.evaluate.attack import Ask, rivals, sweep
from foveal.methods.adapt.linear import Linear
from foveal.methods.robust.advencoder import Advencoder, Options
from foveal.train.loop import train
from foveal.train.unlabelled import UnitImages

SIZE, TEACH, TEST, SURROGATE, EPOCHS, BATCH = 128, 240, 120, 160, 10, 16
SIZES = (4 / 255, 2 / 255, 1 / 255)
QUIET = 0.15


def drawn(name: str, count: int, size: int, preprocessing: Preprocessing, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [n, S, S, 3] and labels of some images of a sample, the same number of each class."""
    dataset = open_dataset(f"sample:{name}")
    rng = generator(seed, "drawn", name)
    per_class = -(-count // len(dataset.classes))
    rows = [rng.permutation(np.flatnonzero(dataset.labels == c))[:per_class] for c in range(len(dataset.classes))]
    order = rng.permutation(np.concatenate(rows))
    return np.stack([to_pixels(dataset.image(int(row)), preprocessing) for row in order]), dataset.labels[order]


@torch.inference_mode()
def probe(encoder: Encoder, pixels: np.ndarray, labels: np.ndarray, seed: int) -> Ask:
    """A linear classifier on the encoder's features, fitted to images, as `foveal.evaluate.attack` asks it."""
    X = torch.cat([encoder(unit(part)) for part in np.array_split(pixels, max(1, len(pixels) // 32))]).clone()
    head = Linear().fit_features(X, torch.from_numpy(labels), torch.ones(len(X)), seed)

    def ask(images: Tensor) -> tuple[Tensor, Tensor]:
        return head(encoder(images)).argmax(1), torch.zeros(len(images), dtype=torch.bool)

    return ask


def unit(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def noise_at(eps: float, size: int, seed: int) -> Perturbation:
    """Random signs of one size."""
    flat = Perturbation(torch.full((3, size, size), eps), torch.zeros(1, size, size), eps)
    return rivals(flat, 1, seed)["noise"][0]


def fooled(ask: Ask, pixels: np.ndarray, change: Perturbation) -> float:
    """Share of answers that a change alters."""
    return sweep(ask, pixels, None, change, shares=(1.0,), draws=1)["sizes"][0]["attack"]["fooled"]


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    size, teach, test = (64, 12, 8) if tiny else (SIZE, TEACH, TEST)
    name = "test_efficientnet" if tiny else "tf_efficientnet_lite0"
    backbone = load_backbone(name, pretrained=not tiny, size=size)
    p = backbone.preprocessing
    encoder = Encoder(backbone.eval(), p)
    before = state_hash(encoder)
    fabric = open_dataset("sample:textile")
    order = generator(seed, "surrogate").permutation(len(fabric))
    pixels = np.stack([to_pixels(fabric.image(int(row)), p) for row in order[: teach + test]])
    labels = fabric.labels[order[: teach + test]]
    surrogate = order[teach + test :][: 16 if tiny else SURROGATE]

    ask = probe(encoder, pixels[:teach], labels[:teach], seed)
    eps, quiet = SIZES[-1], 1.0
    for candidate in SIZES:
        quiet = fooled(ask, pixels[teach:], noise_at(candidate, size, seed))
        if quiet < QUIET:
            eps = candidate
            break

    method = Advencoder(Options(eps=eps, epochs=1 if tiny else EPOCHS, batch_size=8 if tiny else BATCH))
    seed_everything(derive(seed, "attack"))
    with tempfile.TemporaryDirectory() as work:
        attack = train(
            method, method.attack(encoder, size), UnitImages(fabric, surrogate, p), seed,
            recipe=method.recipe(), device="cpu", work=Path(work),
        ).model  # fmt: skip

    values = {
        "eps_of_255": 255 * eps,
        "surrogate.noise.fooled": quiet,
        "surrogate.attack.fooled": fooled(ask, pixels[teach:], attack),
        "budget_used": float(attack.delta.abs().max()) / eps,
    }
    values["encoder.changed"] = float(state_hash(encoder) != before)
    for name in ("elpv", "digits"):
        given, answers = drawn(name, teach + test, size, p, seed)
        told = probe(encoder, given[:teach], answers[:teach], seed)
        found = sweep(told, given[teach:], answers[teach:], attack, shares=(1.0,), draws=2, seed=seed)
        row = found["sizes"][0]
        values[f"{name}.clean.accuracy"] = found["clean"]["accuracy"]
        for kind in ("attack", "noise", "shuffled"):
            values[f"{name}.{kind}.fooled"] = row[kind]["fooled"]
    for kind in ("attack", "noise", "shuffled"):
        values[f"{kind}.fooled"] = (values[f"elpv.{kind}.fooled"] + values[f"digits.{kind}.fooled"]) / 2
    return values
