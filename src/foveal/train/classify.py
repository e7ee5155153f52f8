"""Training an image classifier by the loop, and reading images with it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from foveal.backbones.adapter import normalise
from foveal.core.errors import UsageError
from foveal.core.method import Adapt, Classifier, Recipe, classification_loss
from foveal.core.preprocessing import Preprocessing
from foveal.data.dataset import Dataset
from foveal.data.images import to_pixels
from foveal.train.batches import ahead, stacked
from foveal.train.events import Listener, TrainResult, balanced_accuracy, silent
from foveal.train.feed import LabelledImages
from foveal.train.loop import WORKERS, choose_device, place, train, unplace
from foveal.train.processes import accelerator_for, dealt_back, told_when_lost


def train_classifier(
    method: Adapt,
    model: Classifier,
    dataset: Dataset,
    preprocessing: Preprocessing,
    labels: np.ndarray,
    indices_train: np.ndarray,
    indices_val: np.ndarray,
    class_weights: Tensor,
    seed: int,
    *,
    recipe: Recipe,
    device: str = "auto",
    work: Path,
    budget_s: float | None = None,
    on_event: Listener = silent,
) -> TrainResult:
    """Train what a method attached, from where `work` left off. See `foveal.train.loop.train`.

    Args:
        labels: of all images of `dataset`: int64 [n], or uint8 [n, C] of 0 and 1.
        indices_train, indices_val: rows of `dataset` to learn from, and to measure after each epoch (may be empty).
        class_weights: [C], float32.
    """
    if len(indices_train) == 0:
        raise UsageError(f"{method.name} got no training images: expected at least one per class")

    def validate(model: Classifier) -> dict[str, float]:
        target = next(iter(model.parameters())).device
        logits, _ = read_shared(model, dataset, indices_val, preprocessing, target, accelerator_for(device))
        held = torch.from_numpy(labels[indices_val])
        loss = classification_loss(logits, {"labels": held, "class_weights": class_weights.cpu()})
        return {"val_loss": float(loss), "val_balanced_accuracy": balanced_accuracy(logits, held)}

    return train(
        method,
        model,
        LabelledImages(dataset, labels, indices_train, preprocessing, class_weights, recipe),
        seed,
        recipe=recipe,
        device=device,
        work=work,
        budget_s=budget_s,
        validate=validate if len(indices_val) else None,
        on_event=on_event,
    )


def predict_logits(
    model: Classifier,
    dataset: Dataset,
    indices: np.ndarray,
    preprocessing: Preprocessing,
    *,
    device: str = "auto",
    batch: int = 64,
    together: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logits [n, C] and features [n, D], float32 on the CPU, of some images in order. Images stream through.

    The model is moved to the device and, afterwards, back; it is in eval mode meanwhile.

    Args:
        together: every process of the run makes this call, and reads a share of the images.
    """
    if len(indices) == 0:
        raise UsageError("no images to predict: expected at least one")
    accelerator = accelerator_for(device) if together or device != "cpu" else None
    target = choose_device(device, accelerator) if accelerator else torch.device("cpu")
    home, training = next(iter(model.parameters())).device, model.training
    place(model, target)
    try:
        if together and accelerator:
            return read_shared(model.eval(), dataset, indices, preprocessing, target, accelerator, batch)
        return read_rows(model.eval(), dataset, indices, preprocessing, target, batch)
    finally:
        unplace(model, home)
        model.train(training)


def read_shared(
    model: Classifier,
    dataset: Dataset,
    indices: np.ndarray,
    preprocessing: Preprocessing,
    device: torch.device,
    accelerator: Accelerator,
    batch: int = 64,
) -> tuple[Tensor, Tensor]:
    """`read_rows` of all images, of which each process read its share."""
    rank, world = accelerator.process_index, accelerator.num_processes
    if world == 1 or len(indices) < world:
        return read_rows(model, dataset, indices, preprocessing, device, batch)
    logits, features = read_rows(model, dataset, indices[rank::world], preprocessing, device, batch)
    with told_when_lost():
        return dealt_back(logits, len(indices), accelerator), dealt_back(features, len(indices), accelerator)


def read_rows(
    model: Classifier,
    dataset: Dataset,
    indices: np.ndarray,
    preprocessing: Preprocessing,
    device: torch.device,
    batch: int = 64,
) -> tuple[Tensor, Tensor]:
    """`predict_logits` of a model in eval mode where it is: its tensors keep their place and layout."""
    sizes = [min(batch, len(indices) - start) for start in range(0, len(indices), batch)]
    logits: list[Tensor] = []
    features: list[Tensor] = []

    def view(row: int) -> np.ndarray:
        return to_pixels(dataset.image(row), preprocessing)

    with ThreadPoolExecutor(WORKERS) as pool, torch.inference_mode():
        for pixels in stacked(ahead(view, map(int, indices), pool, 2 * batch), sizes):
            read = model.features(normalise(torch.from_numpy(pixels).to(device), preprocessing))
            features.append(read.float().cpu())
            logits.append(model.head(read).float().cpu())
    return torch.cat(logits).clone(), torch.cat(features).clone()
