"""Experiments of a minute or two, the ground of the reproductions: a small ViT, digits, and one way to measure.

Where a ViT is asked for, a small one that has seen nothing else is trained on the spot.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from foveal.backbones.adapter import Backbone, Plan, build
from foveal.core.families.distill import Distill
from foveal.core.method import Adapt, Classifier
from foveal.core.preprocessing import Preprocessing
from foveal.core.seeds import derive, generator, seed_everything
from foveal.data.dataset import Dataset, Memory
from foveal.train.classify import predict_logits, train_classifier
from foveal.train.distill import TaughtImages, train_student
from foveal.train.events import Event, balanced_accuracy


@dataclass(frozen=True)
class Outcome:
    """What one method came to on test images it never saw."""

    model: Classifier
    balanced_accuracy: float
    seconds: float
    seconds_per_step: float
    """Median; 0 for heads in closed form."""
    trained_params: int


def small_vit(seed: int, *, size: int = 32, patch: int = 4, width: int = 96, depth: int = 6) -> Backbone:
    """A plain ViT with random weights: class token, heads of 32 numbers, input of `size` pixels."""
    args = {"img_size": size, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": width // 32}
    preprocessing = Preprocessing(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 1.0)
    plan = Plan("small-vit", "vit_tiny_patch16_224", args, preprocessing, width, "random")
    seed_everything(derive(seed, "small-vit"))
    return Backbone(plan, build(plan))


def small_net(arch: str, seed: int, *, size: int, **args: Any) -> Backbone:
    """A timm architecture with random weights, made small by its own arguments, for images of `size` pixels."""
    preprocessing = Preprocessing(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 1.0)
    plan = Plan(arch, arch, args, preprocessing, 0, "random")
    with torch.device("meta"):
        described: Any = build(plan)
    seed_everything(derive(seed, "small-net"))
    return Backbone(replace(plan, width=int(described.head_hidden_size)), build(plan))


def with_noise(dataset: Dataset, amount: float, seed: int) -> Dataset:
    """Every image with Gaussian noise of a standard deviation of `amount` times the brightness range."""
    rng = generator(seed, "noise")
    images: list[bytes] = []
    for index in range(len(dataset)):
        pixels = np.asarray(dataset.image(index), np.float32)
        noised = (pixels + rng.normal(0, 255 * amount, pixels.shape)).clip(0, 255).round().astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noised).save(file, "PNG")
        images.append(file.getvalue())
    return replace(dataset, source=Memory(images))


def race(
    nets: Mapping[str, Backbone], method: Adapt, dataset: Dataset, seed: int, *, train: int, test: int, noise: float = 0
) -> dict[str, float]:
    """Train each net on the same images for the same epochs and test it on the same others.

    Args:
        train: images of each class to learn from.
        test: how many of the rest to test on, at most; drawn once per seed.
        noise: above 0, also test on the same images with that much noise (see `with_noise`).

    Returns:
        `NAME.balanced_accuracy`, `NAME.params` (of the net and its classifier) and `NAME.seconds_per_step` of each,
        and `NAME.noisy_balanced_accuracy` if `noise`.
    """
    size = next(iter(nets.values())).preprocessing.size
    rows, rest = few_and_rest(dataset.labels, train, seed)
    rest = np.sort(generator(seed, "race").permutation(rest)[:test])
    chosen = shrunk(dataset, np.concatenate([rows, rest]), size)
    tested = np.arange(len(rows), len(chosen))
    noised = with_noise(chosen, noise, seed) if noise else chosen
    values: dict[str, float] = {}
    for name, net in nets.items():
        outcome = measure(method, net, chosen, np.arange(len(rows)), tested, seed)
        if noise:
            logits, _ = predict_logits(outcome.model, noised, tested, net.preprocessing, device="cpu")
            score = balanced_accuracy(logits, torch.from_numpy(chosen.labels[tested]))
            values[f"{name}.noisy_balanced_accuracy"] = score
        values[f"{name}.balanced_accuracy"] = outcome.balanced_accuracy
        values[f"{name}.params"] = outcome.trained_params
        values[f"{name}.seconds_per_step"] = outcome.seconds_per_step
    return values


def receptive_field(net: Backbone, images: torch.Tensor, stage: int) -> float:
    """How far a place of a stage's map sees: root mean square distance, in pixels, of input-gradient energy from it.

    Args:
        images: normalised [B, 3, H, W]; energy is summed over them.
    """
    images = images.clone().requires_grad_()
    (features,) = net.model.forward_intermediates(images, indices=[stage], intermediates_only=True)
    height, width = features.shape[-2:]
    (gradient,) = torch.autograd.grad(features[:, :, height // 2, width // 2].sum(), images)
    energy = gradient.square().sum((0, 1)).double()
    down = torch.arange(images.shape[-2]) + 0.5 - (height // 2 + 0.5) * images.shape[-2] / height
    right = torch.arange(images.shape[-1]) + 0.5 - (width // 2 + 0.5) * images.shape[-1] / width
    squared = down[:, None].square() + right[None, :].square()
    return float(((energy * squared).sum() / energy.sum()).sqrt())


def only(dataset: Dataset, classes: Sequence[str]) -> Dataset:
    """The images of some classes of a single-label dataset."""
    chosen = [dataset.classes.index(name) for name in classes]
    some = dataset.subset(np.isin(dataset.labels, chosen))
    labels = np.array([chosen.index(int(label)) for label in some.labels], np.int64)
    return replace(some, labels=labels, classes=tuple(classes))


def with_turns(dataset: Dataset) -> Dataset:
    """Every image in four rotations, each class four classes: a task that asks for more than the class names."""
    images: list[bytes] = []
    for index in range(len(dataset)):
        image = dataset.image(index)
        for turns in range(4):
            file = io.BytesIO()
            image.rotate(90 * turns).save(file, "PNG")
            images.append(file.getvalue())
    labels = (dataset.labels[:, None] * 4 + np.arange(4)).reshape(-1)
    classes = tuple(f"{name} turned {90 * turns}" for name in dataset.classes for turns in range(4))
    ids = [f"{name}/{90 * turns}" for name in dataset.ids for turns in range(4)]
    return replace(dataset, ids=ids, labels=labels, classes=classes, splits=None, source=Memory(images))


def shrunk(dataset: Dataset, rows: np.ndarray, size: int) -> Dataset:
    """Some images of a dataset, resized to `size` x `size` once and kept in memory."""
    images: list[bytes] = []
    for row in rows:
        file = io.BytesIO()
        dataset.image(int(row)).resize((size, size), Image.Resampling.BICUBIC).save(file, "PNG")
        images.append(file.getvalue())
    return replace(dataset.subset(rows), source=Memory(images))


def few_and_rest(labels: np.ndarray, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (train, test): `per_class` random images of each class, and all others."""
    rng = generator(seed, "few")
    train_rows = [rng.permutation(np.flatnonzero(labels == label))[:per_class] for label in np.unique(labels)]
    chosen = np.sort(np.concatenate(train_rows))
    return chosen, np.setdiff1d(np.arange(len(labels)), chosen)


def balanced_weights(labels: np.ndarray, classes: int) -> torch.Tensor:
    """Inverse class frequency [C], mean 1 over images."""
    return torch.from_numpy(len(labels) / (classes * np.bincount(labels, minlength=classes).clip(1))).float()


def measure(
    method: Adapt, backbone: Backbone, dataset: Dataset, train_rows: np.ndarray, test_rows: np.ndarray, seed: int
) -> Outcome:
    """Adapt a copy of a backbone to some rows of a dataset and measure on others. Runs on the CPU."""
    start = time.perf_counter()
    weights = balanced_weights(dataset.labels[train_rows], len(dataset.classes))
    own = Backbone(backbone.plan, build(backbone.plan))
    own.load_state_dict(backbone.state_dict())
    steps: list[float] = []
    seed_everything(derive(seed, "init"))
    if method.reads_features():
        model = Classifier(own.eval(), torch.nn.Identity())
        _, features = predict_logits(model, dataset, train_rows, own.preprocessing, device="cpu")
        labels = torch.from_numpy(dataset.labels[train_rows])
        head = method.fit_features(features, labels, weights[labels], seed)
        trained, model = sum(p.numel() for p in head.parameters()), Classifier(own, head)
    else:
        model = method.attach(own, len(dataset.classes))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        before = [time.perf_counter()]

        def listen(event: Event) -> None:
            now = time.perf_counter()
            if event["event"] == "step":
                steps.append(now - before[0])
            before[0] = now

        with tempfile.TemporaryDirectory() as work:
            model = train_classifier(
                method, model, dataset, own.preprocessing, dataset.labels, train_rows, np.array([], int), weights, seed,
                recipe=method.recipe(), device="cpu", work=Path(work), on_event=listen,
            ).model  # fmt: skip
    seconds = time.perf_counter() - start
    logits, _ = predict_logits(model, dataset, test_rows, own.preprocessing, device="cpu")
    score = balanced_accuracy(logits, torch.from_numpy(dataset.labels[test_rows]))
    return Outcome(model, score, seconds, float(np.median(steps)) if steps else 0.0, trained)


def distilled(
    method: Distill,
    backbone: Backbone,
    teacher: Classifier | None,
    dataset: Dataset,
    train_rows: np.ndarray,
    test_rows: np.ndarray,
    seed: int,
    *,
    unlabelled: Dataset | None = None,
) -> Outcome:
    """Train a copy of a backbone beside a teacher on some rows of a dataset and measure on others. Runs on the CPU.

    Args:
        teacher: reads images as the backbone does, or None for the labels alone.
    """
    start = time.perf_counter()
    own = Backbone(backbone.plan, build(backbone.plan))
    own.load_state_dict(backbone.state_dict())
    seed_everything(derive(seed, "init"))
    student = method.attach(own, len(dataset.classes))
    trained = sum(p.numel() for p in student.parameters())
    weights = balanced_weights(dataset.labels[train_rows], len(dataset.classes))
    feed = TaughtImages(
        dataset, dataset.labels, train_rows, own.preprocessing, weights, method.recipe(),
        teacher=None if teacher is None else own.preprocessing, unlabelled=unlabelled,
    )  # fmt: skip
    steps, before = [], [time.perf_counter()]

    def listen(event: Event) -> None:
        now = time.perf_counter()
        if event["event"] == "step":
            steps.append(now - before[0])
        before[0] = now

    with tempfile.TemporaryDirectory() as work:
        model = train_student(
            method, method.pair(student, teacher), feed, np.array([], int), seed,
            device="cpu", work=Path(work), on_event=listen,
        ).model  # fmt: skip
    seconds = time.perf_counter() - start
    logits, _ = predict_logits(model, dataset, test_rows, own.preprocessing, device="cpu")
    score = balanced_accuracy(logits, torch.from_numpy(dataset.labels[test_rows]))
    return Outcome(model, score, seconds, float(np.median(steps)), trained)


@dataclass(frozen=True)
class Transfer:
    """A small ViT that learnt digits 0 to 4 in four rotations, and digits 5 to 9 to adapt it to."""

    backbone: Backbone
    dataset: Dataset
    train_rows: np.ndarray
    test_rows: np.ndarray

    def measure(self, method: Adapt, seed: int) -> Outcome:
        return measure(method, self.backbone, self.dataset, self.train_rows, self.test_rows, seed)


def digits_transfer(digits: Dataset, teacher: Adapt, seed: int, *, tiny: bool, per_class: int = 60) -> Transfer:
    """Teach a small ViT with `teacher` (a method that trains every weight), and set the second task.

    Args:
        digits: the ten digits, classes '0' to '9'.
        tiny: a few images only; shows that it runs.
        per_class: training images per class of the second task.
    """
    first, second = with_turns(only(digits, "01234")), only(digits, "56789")
    backbone = small_vit(seed, patch=8, width=32 if tiny else 64, depth=2 if tiny else 4)
    taught = measure(teacher, backbone, first, *few_and_rest(first.labels, 4 if tiny else 150, seed), seed)
    train_rows, rest = few_and_rest(second.labels, 4 if tiny else per_class, seed)
    learnt = taught.model.backbone
    assert isinstance(learnt, Backbone)
    return Transfer(learnt, second, train_rows, rest[::20] if tiny else rest)
