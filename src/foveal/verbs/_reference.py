"""Two reference rows beside every method: what is not above them has learnt nothing, or only brightness."""

from __future__ import annotations

import numpy as np
import torch

from foveal.core.seeds import derive
from foveal.evaluate.calibration import to_probabilities
from foveal.verbs._adapt import choose, logits_of
from foveal.verbs._prepare import Prepared

REFERENCES = {
    "majority": "always answers the most frequent class of the training split",
    "brightness": "logistic regression on each image's mean and standard deviation of grey",
}


def reference_probabilities(
    prepared: Prepared, splits: np.ndarray, seed: int, class_weights: str
) -> dict[str, np.ndarray]:
    """Probabilities [n_test, C] of both references, fitted on the training and validation images."""
    train, test = np.flatnonzero(splits != "test"), np.flatnonzero(splits == "test")
    labels, task = prepared.dataset.labels, prepared.dataset.task
    classes = len(prepared.dataset.classes)
    frequency = (
        labels[train].mean(0) if labels.ndim == 2 else np.bincount(labels[train], minlength=classes) / len(train)
    )
    scan = prepared.extraction.scan
    X = torch.from_numpy(np.stack([scan["mean"], scan["std"]], axis=1).astype(np.float32))
    weights, _ = prepared.label_weights(train, class_weights)
    head = choose("linear").fit_features(
        X[train], torch.from_numpy(labels[train]), torch.from_numpy(weights), derive(seed, "fit")
    )
    return {
        "majority": np.tile(frequency.astype(np.float32), (len(test), 1)),
        "brightness": to_probabilities(logits_of(head, X[test]).numpy(), task),
    }
