"""DyTox on handwritten digits in five steps of two classes, from random weights, 20 exemplars of each class.

Every way starts from the same encoder of local attention and sees the same 60 images of each digit: DyTox; the same
with one token for all classes (distillation and memory kept); the same without distillation and memory, which is
fine-tuning; all ten classes at once ('joint'); and foveal's default, whose encoder stays after the first two digits and
whose decoders are separate ('frozen').
"""

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foveal.blocks.gated import GatedEncoder
from foveal.core.method import Classifier
from foveal.core.preprocessing import Preprocessing
from foveal.core.seeds import derive, generator, seed_everything
from foveal.data.dataset import Dataset
from foveal.data.open import open_dataset
from foveal.evaluate.stream import drift, summary
from foveal.methods.continual.dytox import Dytox, Expanded, Options
from foveal.train.classify import predict_logits
from foveal.train.small import shrunk
from foveal.train.stream import learn, remembered

SIZE, WIDTH, TRAIN, TEST, MEMORY, EPOCHS = 16, 96, 60, 60, 20, 20
PLAIN = Preprocessing(SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 1.0)


class OneToken(Dytox):
    """The same network whose heads all read one token, which goes on learning."""

    def grow(self, model: Classifier, classes: int) -> Expanded:
        grown = super().grow(model, classes)
        tokens = grown.decoders[-1].tokens
        tokens[-1] = tokens[0]
        return grown


def run(
    method: Dytox, first: Expanded, steps: list[int], dataset: Dataset, train: np.ndarray, test: np.ndarray,
    memory: int, seed: int,
) -> dict[str, float]:  # fmt: skip
    """One way through the stream: `steps` classes at a time, in the order of their labels."""
    model, kept = first, np.array([], np.int64)
    correct: list[list[np.ndarray]] = []
    begin, end = 0, steps[0]
    moved, still = 0.0, 0
    for step, count in enumerate(steps):
        old = None if step == 0 else model
        seed_everything(derive(seed, "grow", step))
        grown = model if old is None else method.grow(model, count)
        if old is not None:
            begin, end = end, end + count
        fresh = train[(dataset.labels[train] >= begin) & (dataset.labels[train] < end)]
        rows = np.concatenate([fresh, kept]) if memory else fresh
        with tempfile.TemporaryDirectory() as work:
            model, _ = learn(
                method, old, grown, dataset, dataset.labels, rows, PLAIN, derive(seed, step),
                work=Path(work), per_class=memory or None, device="cpu",
            )  # fmt: skip
        if memory:
            _, features = predict_logits(model, dataset, fresh, PLAIN, device="cpu")
            kept = np.concatenate([kept, fresh[remembered(features.numpy(), dataset.labels[fresh], memory)]])
            assert len(kept) <= memory * end
        seen = test[dataset.labels[test] < end]
        logits, _ = predict_logits(model, dataset, seen, PLAIN, device="cpu")
        if old is not None:
            ours = dataset.labels[seen] < begin
            before, _ = predict_logits(old, dataset, seen[ours], PLAIN, device="cpu")
            after, _ = predict_logits(model, dataset, seen[ours], PLAIN, device="cpu")
            told = drift(before, after)
            moved, still = max(moved, told["moved"]), still + told["equal"]
        right = (logits.argmax(1).numpy() == dataset.labels[seen]).astype(float)
        edges = np.cumsum([0, *steps[: step + 1]])
        batch = np.searchsorted(edges, dataset.labels[seen], "right") - 1
        correct.append([right[batch == number] for number in range(step + 1)])
    return {**summary(correct), "moved": moved, "unmoved_steps": float(still)}


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    digits = open_dataset("sample:digits")
    count, shown = (6, 4) if tiny else (TRAIN, TEST)
    rng = generator(seed, "digits")
    order = [rng.permutation(np.flatnonzero(digits.labels == label)) for label in range(10)]
    rows = np.concatenate([each[: count + shown] for each in order])
    dataset = shrunk(digits, rows, SIZE)
    place = np.tile(np.arange(count + shown), 10)
    train, test = np.flatnonzero(place < count), np.flatnonzero(place >= count)

    width, depth, epochs = (32, 1, 1) if tiny else (WIDTH, 2, EPOCHS)
    seed_everything(derive(seed, "encoder"))
    encoder = GatedEncoder(SIZE, 4, width, depth, max(1, width // 32))
    common = {"width": width, "objective": "sigmoid", "epochs": epochs, "augment": "none", "batch_size": 64}
    paper = {**common, "shared": "learn", "balance": max(1, epochs // 4)}
    bare = {**paper, "distil": 0.0, "divergence": 0.0, "balance": 0}
    memory = 2 if tiny else MEMORY
    ways = {
        "dytox": (Dytox(Options(**paper)), [2] * 5, memory),
        "one-token": (OneToken(Options(**paper)), [2] * 5, memory),
        "fine-tuning": (Dytox(Options(**bare)), [2] * 5, 0),
        "joint": (Dytox(Options(**paper)), [10], 0),
    }
    values: dict[str, float] = {}
    for name, (method, steps, kept) in ways.items():
        torch.manual_seed(derive(seed, "first"))
        first = method.first(copy.deepcopy(encoder), steps[0])
        found = run(method, first, steps, dataset, train, test, kept, seed)
        told = ("last",) if name == "joint" else ("last", "average", "forgetting", "moved")
        values |= {f"{name}.{key}": found[key] for key in told}
    later = Options(**{**common, "objective": "softmax"})
    values |= frozen(encoder, Options(**paper), later, dataset, train, test, memory, seed)
    return values


def frozen(
    encoder: GatedEncoder, first: Options, later: Options, dataset: Dataset, train: np.ndarray, test: np.ndarray,
    memory: int, seed: int,
) -> dict[str, float]:  # fmt: skip
    """The first two digits as in the paper, the others with everything old frozen."""

    class Stays(Dytox):
        def update(self, old, grown, stage):
            return (Dytox(first) if old is None else super()).update(old, grown, stage)

        def given(self, grown: Expanded, images: Tensor):
            return None if len(grown.head.tasks) == 1 else super().given(grown, images)

    method = Stays(later)
    torch.manual_seed(derive(seed, "first"))
    start = method.first(copy.deepcopy(encoder), 2)
    found = run(method, start, [2] * 5, dataset, train, test, memory, seed)
    return {f"frozen.{key}": found[key] for key in ("last", "average", "forgetting", "moved", "unmoved_steps")}
