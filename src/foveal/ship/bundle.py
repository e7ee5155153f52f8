"""Writing a Bundle, loading one, and predicting with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveal.backbones.adapter import rebuild_backbone
from foveal.core import catalogue
from foveal.core.bundle import BundleFiles, open_bundle
from foveal.core.errors import BundleError, DataError
from foveal.core.method import Adapt, Classifier
from foveal.core.options import parse_options
from foveal.core.preprocessing import Preprocessing
from foveal.data.dataset import Dataset
from foveal.data.open import open_images
from foveal.evaluate.calibration import Calibrated
from foveal.evaluate.ood import empty_score
from foveal.features.extract import extract, read_pixels

if TYPE_CHECKING:
    from PIL import Image

TOP = 5


def save_weights(model: Calibrated, path: Path) -> None:
    """All parameters and buffers, as safetensors."""
    save_file({name: value.contiguous().clone() for name, value in model.state_dict().items()}, path)


def load(path: str | Path) -> Bundle:
    """Open a Bundle folder made by `foveal fit`.

    Raises:
        BundleError: not a Bundle, incomplete, edited, or of a newer format.
    """
    return Bundle(open_bundle(path))


@dataclass(frozen=True)
class Bundle:
    """A trained model with its classes, calibration, metrics and cost. `predict` answers for images."""

    files: BundleFiles

    @property
    def path(self) -> Path:
        return self.files.path

    @property
    def metrics(self) -> dict[str, Any]:
        return self.files.metrics

    @property
    def calibration(self) -> dict[str, Any]:
        return self.files.calibration

    @property
    def cost(self) -> dict[str, Any]:
        return self.files.cost

    @property
    def manifest(self) -> dict[str, Any]:
        return self.files.manifest

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.manifest["classes"])

    @property
    def task(self) -> str:
        return self.manifest["task"]

    @property
    def threshold(self) -> float:
        """Images whose unknown score is above it are answered `unknown`."""
        return self.calibration["unknown"]["threshold"]

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing.from_dict(self.manifest["backbone"]["preprocessing"])

    @cached_property
    def method(self) -> Adapt:
        chosen = self.manifest["method"]
        cls = catalogue.get(chosen["name"])
        method = cls(parse_options(cls.Options, chosen["options"], chosen["name"]))
        if not isinstance(method, Adapt):
            raise BundleError(f"Bundle {self.path} was made by {method.name}, which makes no classifier")
        return method

    @cached_property
    def model(self) -> Calibrated:
        """The torch model: normalised images [B, 3, H, W] -> (probabilities [B, C], unknown score [B])."""
        weights = self.path / "model.safetensors"
        try:
            with safe_open(weights, "pt") as file:
                shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            backbone = rebuild_backbone(self.manifest["backbone"])
            if self.method.reads_features():
                classifier = Classifier(backbone, self.method.head(part(shapes, "classifier.head.")))
            else:
                classifier = self.method.finish(self.method.attach(backbone, len(self.classes)))
            score = empty_score(self.calibration["unknown"]["name"], part(shapes, "ood."))
            model = Calibrated(classifier, self.calibration["temperature"]["value"], score, self.task)
            model.load_state_dict(load_file(weights))
        except (SafetensorError, RuntimeError, KeyError) as error:
            reason = str(error).replace("\n", " ")
            raise BundleError(
                f"the weights of Bundle {self.path} do not fit its bundle.json ({reason}): restore the folder or fit again"
            ) from None
        return model.eval()

    def to_dict(self) -> dict[str, Any]:
        return {"bundle": str(self.path), "metrics": self.metrics, "cost": self.cost}

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
        dataset = open_images(
            [images] if isinstance(images, str | Path | np.ndarray) or hasattr(images, "size") else images
        )
        probabilities, scores, errors = self.infer(dataset, device=device, progress=progress)
        if len(errors) == len(dataset):
            raise DataError(f"none of the {len(dataset)} images can be decoded ({dataset.ids[0]}: {errors[0]})")
        return [
            unreadable(dataset.ids[row], errors[row])
            if row in errors
            else self.answer(dataset.ids[row], probabilities[row], float(scores[row]))
            for row in range(len(dataset))
        ]

    def answer(self, image: str, probabilities: np.ndarray, score: float) -> dict[str, Any]:
        order = np.argsort(-probabilities, kind="stable")[:TOP]
        top = [[self.classes[index], float(probabilities[index])] for index in order]
        chosen = top[:1]
        if self.task == "multi-label":
            chosen = [item for item in top if item[1] >= 0.5]
        return {
            "image": image,
            "label": "|".join(sorted(str(name) for name, _ in chosen)),
            "probability": min((p for _, p in chosen), default=1 - float(probabilities.max())),
            "unknown": score > self.threshold,
            "top": top,
        }

    @torch.inference_mode()
    def infer(
        self, dataset: Dataset, *, device: str = "auto", progress: Callable[[int, int], None] | None = None
    ) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """Probabilities [n, C], unknown scores [n], and the reason for each row that could not be decoded."""
        if self.method.reads_features():
            found = extract(dataset, self.model.classifier.backbone, device=device, progress=progress)
            chunks = (
                self.judge(torch.from_numpy(np.ascontiguousarray(found.X[start : start + 1024])))
                for start in range(0, len(dataset), 1024)
            )
            probabilities, scores = stack(chunks)
            return probabilities, scores, found.errors
        from foveal.train.loop import pick_device

        target = pick_device(device)
        model = self.model.to(target)
        errors: dict[int, str] = {}
        outputs: list[tuple[Tensor, Tensor]] = []
        for done, pixels in read_pixels(dataset, self.preprocessing, errors):
            outputs.append(model.from_pixels(torch.from_numpy(pixels).to(target), self.preprocessing))
            if progress:
                progress(done, len(dataset))
        probabilities, scores = stack(outputs)
        return probabilities, scores, errors


def part(shapes: Mapping[str, torch.Size], prefix: str) -> dict[str, torch.Size]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def stack(outputs: Iterable[Sequence[Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    probabilities, scores = zip(*outputs, strict=True)
    return torch.cat(probabilities).cpu().numpy(), torch.cat(scores).cpu().numpy()


def unreadable(image: str, reason: str) -> dict[str, Any]:
    return {"image": image, "label": None, "probability": None, "unknown": True, "top": [], "error": reason}


def headline(metrics: dict[str, Any]) -> str:
    """Each metric with its 95% interval, in one line."""
    names = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")
    parts: list[str] = []
    for name in names:
        entry = metrics.get(name) or {}
        if entry.get("value") is not None:
            parts.append(f"{name.replace('_', ' ')} {entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]")
    return ", ".join(parts)
