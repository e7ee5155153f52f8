"""Writing a Bundle, loading one, and predicting with it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone, normalise, rebuild_backbone
from foveal.blocks.codes import Codes
from foveal.core import catalogue
from foveal.core.bundle import open_bundle, sha256
from foveal.core.errors import BundleError, DataError
from foveal.core.families.continual import Continual
from foveal.core.families.shrink import Shrink
from foveal.core.method import Adapt, Classifier, Task
from foveal.core.options import parse_options
from foveal.core.task import OTHER_TASKS
from foveal.data.dataset import Dataset
from foveal.data.memory import NAME as MEMORY
from foveal.data.memory import Exemplars, read_exemplars
from foveal.data.open import open_images
from foveal.evaluate.calibration import Calibrated
from foveal.evaluate.ood import empty_score
from foveal.features.extract import extract
from foveal.features.session import pick_device
from foveal.features.stream import stream_pixels
from foveal.ship.answer import answer, unreadable
from foveal.ship.hub import fetch, on_hub
from foveal.ship.opened import Opened, must_fit

if TYPE_CHECKING:
    from PIL import Image

M = TypeVar("M", bound=nn.Module)
CHUNK = 1024
SMALLEST = 1 / 32
"""How little of an architecture's numbers a shrunk model may hold. The architecture is built before it is shrunk, and
takes memory; whoever made the Bundle shall not choose how much."""
ROOM = 100_000_000
"""Numbers that any shrunk model's architecture may have."""


def save_weights(model: nn.Module, path: Path) -> None:
    """All parameters and buffers, as safetensors.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        save_file({name: value.contiguous().clone() for name, value in model.state_dict().items()}, path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) if code else error from None


def load(path: str | Path, *, offline: bool = False) -> Any:
    """Open a Bundle: a folder made by `foveal fit`, or hub:owner/name[@revision] of the Hugging Face Hub.

    Args:
        offline: of the Hub's, take only what the Hugging Face cache holds.

    Returns:
        A `Bundle`, which classifies images; for another task an object with the same path, manifest, metrics, cost
        and predict, from the module of `foveal.ship` that has the task's name.

    Raises:
        BundleError: not a Bundle, incomplete, edited, or of a newer format.
        HubError: the Hub cannot be reached, refuses, or has nothing of that name.
    """
    files = open_bundle(fetch(path, offline=offline) if on_hub(path) else path, any_task=True)
    if files.manifest["task"] in OTHER_TASKS:
        name = files.manifest["task"].replace("-", "_")
        return getattr(import_module(f"foveal.ship.{name}"), f"open_{name}")(files)
    return Bundle(files)


def load_classifier(path: str | Path, *, offline: bool = False) -> Bundle:
    """`load`, of Bundles that classify images.

    Raises:
        BundleError: as `load`; also for a Bundle for another task.
    """
    return Bundle(open_bundle(fetch(path, offline=offline) if on_hub(path) else path))


@dataclass(frozen=True)
class Bundle(Opened):
    """A trained model with its classes, calibration, metrics and cost. `predict` answers for images."""

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.manifest["classes"])

    @property
    def task(self) -> Task:
        return self.manifest["task"]

    @property
    def threshold(self) -> float:
        """Images whose unknown score is above it are answered `unknown`."""
        return self.calibration["unknown"]["threshold"]

    @cached_property
    def method(self) -> Adapt:
        return self.made_by(Adapt, "makes no classifier")

    @cached_property
    def steps(self) -> list[tuple[Shrink | Continual, dict[str, Any]]]:
        """The methods that changed the model's structure, in order, and their plans."""
        found: list[tuple[Shrink | Continual, dict[str, Any]]] = []
        for step in self.manifest.get("steps", []):
            cls = catalogue.get(step["name"])
            method = cls(parse_options(cls.Options, step["options"], step["name"]))
            if not isinstance(method, Shrink | Continual):
                raise BundleError(f"Bundle {self.path} names {method.name} as a step, which changes no structure")
            found.append((method, step["plan"]))
        return found

    @property
    def codes(self) -> list[tuple[np.ndarray, Codes]]:
        """Weights that a step made from integers, output channels first, and those integers."""
        shrinking = [method for method, _ in self.steps if isinstance(method, Shrink)]
        return [pair for method in shrinking for pair in method.codes(self.model.classifier)]

    @property
    def head_shapes(self) -> dict[str, torch.Size]:
        """Shapes of the tensors of the head that the method made, before any step."""
        if self.steps:
            return {name: torch.Size(shape) for name, shape in self.manifest["head"].items()}
        return shapes(self.model.classifier.head.state_dict())

    @property
    def fingerprint(self) -> str:
        """Of the weights, calibration and metrics: what a Bundle made from this one names as its parent."""
        return hashlib.sha256(json.dumps(self.manifest["sha256"], sort_keys=True).encode()).hexdigest()[:32]

    @cached_property
    @torch.inference_mode(False)  # its tensors can take part in gradients, whoever looks first
    def model(self) -> Calibrated:
        """The torch model: normalised images [B, 3, H, W] -> (probabilities [B, C], unknown score [B])."""
        path = self.path / "model.safetensors"
        with must_fit(self.path):
            weights = load_file(path)
            head, score = part(weights, "classifier.head."), part(weights, "ood.")
            described, name = self.manifest["backbone"], self.calibration["unknown"]["name"]
            if self.method.reads_features() and not self.steps:
                backbone = rebuild_backbone(described, part(weights, "classifier.backbone.model."))
                classifier = Classifier(backbone, filled(self.method.head(shapes(head)), head))
            else:
                held = sum(tensor.numel() for tensor in weights.values())
                classifier = filled(self.structure(held), part(weights, "classifier."))
            unknown = filled(empty_score(name, shapes(score)), score)
            fits = classifier.head(torch.zeros(1, classifier.width)).shape
            if fits != (1, len(self.classes)):
                raise RuntimeError(f"the head answers {fits[1]} classes, expected {len(self.classes)}")
            temperature = float(weights["temperature"])
            if not 0 < temperature < float("inf"):
                raise ValueError(f"the temperature is {temperature}, expected a positive number")
            return Calibrated(classifier, temperature, unknown, self.task).eval()

    def structure(self, held: int) -> Classifier:
        """The classifier with random weights, after all steps.

        Args:
            held: how many numbers its weights file holds.
        """
        described, most = self.manifest["backbone"], room_for(held) if self.steps else held
        if not self.method.reads_features():
            backbone = rebuild_backbone(described, most=most)
            added = sum(method.added(plan) for method, plan in self.steps if isinstance(method, Continual))
            classifier = self.method.finish(self.method.attach(backbone, len(self.classes) - added))
        else:
            if sum(shape.numel() for shape in self.head_shapes.values()) > most:
                raise BundleError(f"the head had more than {most:,} numbers, the weights hold {held:,}")
            backbone = rebuild_backbone(described, most=most)
            classifier = Classifier(backbone, self.method.head(self.head_shapes))
        for method, plan in self.steps:
            classifier = method.rebuild(classifier, plan)
        cast(Backbone, classifier.backbone).changes = json.dumps(self.manifest.get("steps", []), sort_keys=True)
        return classifier

    @property
    def memory(self) -> Exemplars | None:
        """The images it keeps of its classes to learn others by; None when it keeps none, or came without them.

        Raises:
            BundleError: they are damaged.
        """
        file, told = self.path / MEMORY, self.manifest.get("memory")
        if told is None or not file.is_file():
            return None
        if not isinstance(told, dict) or sha256(file) != told.get("sha256"):
            raise BundleError(f"{MEMORY} in Bundle {self.path} was edited or is damaged: give old images with --old")
        return read_exemplars(file, self.classes)

    def labels_of(self, dataset: Dataset, rows: np.ndarray | list[int]) -> np.ndarray:
        """Labels of some images in this Bundle's order of classes, of which the data may have only some: int64 [n], or
        uint8 [n, C] of 0 and 1."""
        place = np.array([self.classes.index(name) for name in dataset.classes])
        if self.task == "single-label":
            return place[dataset.labels[rows]]
        labels = np.zeros((len(rows), len(self.classes)), np.uint8)
        labels[:, place] = dataset.labels[rows]
        return labels

    def to_text(self) -> str:
        return (
            f"{self.manifest['method']['name']} on {self.manifest['backbone']['name']}: {self.manifest['why']}\n"
            f"{self.metrics['split']}, {self.metrics['n']} images: {headline(self.metrics)}\n"
            f"{self.path}/report.html"
        )

    def predict(
        self,
        images: str | Path | Image.Image | np.ndarray | Iterable[str | Path | Image.Image | np.ndarray],
        *,
        device: str = "auto",
        progress: Callable[[int, int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Answer for images: files, folders, PIL images or uint8 arrays [H, W, 3].

        Returns:
            One row per image: image, label, probability, unknown, top (up to five [label, probability]). An image
            that cannot be decoded has label None and says why under `error`.

        Raises:
            DataError: no image, or none that can be decoded.
        """
        single = isinstance(images, str | Path | np.ndarray) or hasattr(images, "getbands")
        dataset = open_images([images] if single else list(images))  # type: ignore[list-item]
        probabilities, scores, errors = self.infer(dataset, device=device, progress=progress)
        if len(errors) == len(dataset):
            raise DataError(f"none of the {len(dataset)} images can be decoded ({dataset.ids[0]}: {errors[0]})")
        return [
            unreadable(dataset.ids[row], errors[row])
            if row in errors
            else answer(
                dataset.ids[row],
                probabilities[row],
                float(scores[row]),
                classes=self.classes,
                task=self.task,
                threshold=self.threshold,
            )
            for row in range(len(dataset))
        ]

    @torch.inference_mode()
    def infer(
        self, dataset: Dataset, *, device: str = "auto", progress: Callable[[int, int], None] | None = None
    ) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """Probabilities [n, C], unknown scores [n], and the reason for each row that could not be decoded.

        Raises:
            BundleError: the model answers with something that is no number.
        """
        errors: dict[int, str] = {}
        n = len(dataset)
        probabilities = np.full((n, len(self.classes)), np.nan, np.float32)
        scores = np.full(n, np.nan, np.float32)
        if self.method.reads_features() and not self.steps:
            found = extract(dataset, cast(Backbone, self.model.classifier.backbone), device=device, progress=progress)
            errors = found.errors
            for start in range(0, n, CHUNK):
                rows = slice(start, start + CHUNK)
                features = torch.from_numpy(found.X[rows])
                answers = self.model.judge(features, self.model.classifier.head(features))
                probabilities[rows], scores[rows] = (answer.numpy() for answer in answers)
        else:
            target = pick_device(device)
            model = self.model.to(target)
            for rows, pixels in stream_pixels(dataset, self.preprocessing, errors):
                images = normalise(torch.from_numpy(pixels).to(target), self.preprocessing)
                probabilities[rows], scores[rows] = (answer.cpu().numpy() for answer in model(images))
                if progress:
                    progress(rows[-1] + 1, n)
        for row in np.flatnonzero(np.isnan(probabilities).any(1) | np.isnan(scores)).tolist():
            if row not in errors:
                raise BundleError(
                    f"the model of Bundle {self.path} answers {dataset.ids[row]} with NaN: its weights are damaged, "
                    "fit again"
                )
        return probabilities, scores, errors


def room_for(held: int) -> int:
    """How many numbers the architecture may have of which a shrunk model holds `held`."""
    return max(int(held / SMALLEST), ROOM)


def filled(module: M, weights: Mapping[str, Tensor]) -> M:
    module.load_state_dict(weights)
    return module


def part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items()}


def headline(metrics: dict[str, Any]) -> str:
    """Each metric with its 95% interval, in one line."""
    names = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")
    parts: list[str] = []
    for name in names:
        entry = metrics.get(name) or {}
        if entry.get("value") is not None:
            parts.append(f"{name.replace('_', ' ')} {entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]")
    return ", ".join(parts)
