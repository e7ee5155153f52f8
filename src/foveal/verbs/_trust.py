"""What makes a classifier one that can be trusted: a temperature, and a score for images unlike any it knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from foveal.backbones.adapter import normalise
from foveal.data.worlds import garbage
from foveal.evaluate.calibration import Calibrated, calibration_record
from foveal.evaluate.ood import choose_ood
from foveal.features.stream import GARBAGE, garbage_features
from foveal.verbs._adapt import Adapted, logits_of
from foveal.verbs._prepare import Prepared


def trust(adapted: Adapted, prepared: Prepared, device: str) -> tuple[Calibrated, dict[str, Any]]:
    """The calibrated model, and what goes into calibration.json."""
    task, held_out = prepared.dataset.task, adapted.held_out
    strange, strange_logits = strange_images(adapted, prepared, device)
    same = held_out is adapted.fitted
    score, unknown = choose_ood(
        adapted.fitted.features.numpy(),
        adapted.fitted.labels.numpy(),
        None if same else held_out.features.numpy(),
        held_out.logits.numpy(),
        strange,
        strange_logits,
        task=task,
        temperature=adapted.temperature,
        fitted_on=adapted.held_out_name,
    )
    logits, labels = held_out.logits.numpy(), held_out.labels.numpy()
    measured = calibration_record(logits, labels, task, adapted.temperature, adapted.held_out_name)
    tested = calibration_record(
        adapted.test.logits.numpy(), adapted.test.labels.numpy(), task, adapted.temperature, "test images"
    )
    record = {"temperature": {"value": adapted.temperature, "fitted_on": measured, "test": tested}, "unknown": unknown}
    return Calibrated(adapted.classifier, adapted.temperature, score, task).eval(), record


@torch.inference_mode()
def strange_images(adapted: Adapted, prepared: Prepared, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits of procedural images that resemble no photo."""
    classifier = adapted.classifier
    if adapted.frozen:
        features = torch.from_numpy(garbage_features(prepared.backbone, device=device))
    else:
        pixels = torch.from_numpy(garbage(GARBAGE, prepared.backbone.preprocessing.size, 0))
        features = classifier.features(normalise(pixels, prepared.backbone.preprocessing))
    return features.numpy(), logits_of(classifier.head, features).numpy()
