"""A finished model -> a Bundle on disk, with its measurements, report and card."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveal.core.bundle import atomic_folder, open_bundle, seal, write_json
from foveal.core.errors import BundleError, UsageError
from foveal.core.options import options_to_dict
from foveal.core.progress import Progress
from foveal.evaluate import report
from foveal.evaluate.card import write_card
from foveal.evaluate.cost import cost
from foveal.evaluate.metrics import measure
from foveal.evaluate.report import Mistake, ReportContext, write_report
from foveal.features.session import feature_session
from foveal.ship.bundle import save_weights
from foveal.verbs._adapt import Adapted
from foveal.verbs._findings import find, unseen_probabilities
from foveal.verbs._prepare import Prepared, manifest_data
from foveal.verbs._race import verdict
from foveal.verbs._reference import REFERENCES, reference_probabilities
from foveal.verbs._trust import trust
from foveal.verbs.reproduce import versions

MISTAKES = 12


def request_of(
    data: Any, method: str, backbone: str, seed: int, class_weights: str, scratch: bool = False
) -> dict[str, Any]:
    """What must be equal for two `fit` commands to be the same."""
    name = data if isinstance(data, str | Path) else data.name
    return {
        "data": str(name),
        "method": method,
        "backbone": backbone,
        "seed": seed,
        "class_weights": class_weights,
        **({"scratch": True} if scratch else {}),
    }


def finished(out: Path, request: dict[str, Any]) -> bool:
    """Whether `out` holds the Bundle of this very request.

    Raises:
        UsageError: it holds something else, which `fit` does not overwrite.
    """
    if not os.path.exists(out) or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        held = open_bundle(out, any_task=True).manifest["request"]
    except (BundleError, KeyError) as error:
        raise UsageError(f"--out {out} exists and is not overwritten ({error}): choose another --out") from None
    if held != request:
        differs = ", ".join(f"{key} {held.get(key)}" for key in request | held if held.get(key) != request.get(key))
        raise UsageError(f"--out {out} holds the Bundle of another command ({differs}): choose another --out")
    return True


def write_bundle(
    out: Path,
    prepared: Prepared,
    splits: np.ndarray,
    adapted: Adapted,
    contest: list[dict[str, Any]] | None,
    *,
    request: dict[str, Any],
    seed: int,
    class_weights: str,
    device: str,
    started: float,
    progress: Progress,
    lineage: Mapping[str, Any] | None = None,
    cost_too: Callable[[Path], Mapping[str, Any]] = lambda folder: {},
    metrics_too: Mapping[str, Any] | None = None,
) -> None:
    """Measure on the test split, and write everything or nothing.

    Args:
        lineage: of a model made from another Bundle's: entries of bundle.json that take the place of a fit's.
        cost_too: what cost.json says besides; called with the folder once its weights are written.
        metrics_too: what metrics.json says besides.
    """
    dataset, backbone = prepared.dataset, prepared.backbone
    model, calibration = trust(adapted, prepared, device)
    probabilities = adapted.probabilities(adapted.test, dataset.task)
    labels = adapted.test.labels.numpy()
    metrics = {"split": "test", **measure(probabilities, labels, dataset.classes, dataset.task)}
    with torch.inference_mode():
        scores = model.ood(adapted.test.features, adapted.test.logits)
    metrics["unknown_rate"] = float((scores > calibration["unknown"]["threshold"]).float().mean())
    references = {
        name: {"about": REFERENCES[name], **measure(p, labels, dataset.classes, dataset.task)}
        for name, p in reference_probabilities(prepared, splits, seed, class_weights).items()
    }
    metrics["references"] = {
        name: {key: found[key] for key in ("about", "accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")}
        for name, found in references.items()
    }
    metrics["race"] = contest
    metrics["history"] = adapted.history
    metrics |= metrics_too or {}
    told = unseen_probabilities(prepared, adapted) if report.verdict(metrics)["tone"] != "care" else None
    findings = find(prepared, told)  # a model not to be relied on accuses no labels
    manifest = {
        "foveal": versions(),
        "task": dataset.task,
        "classes": list(dataset.classes),
        "backbone": backbone.describe(),
        "method": {"name": adapted.method.name, "options": options_to_dict(adapted.method.options)},
        "why": verdict(contest) if contest else "asked for",
        "seed": seed,
        "class_weights": class_weights,
        "data": manifest_data(prepared, splits),
        "request": request,
        "parent": None,
        "seconds": round(time.perf_counter() - started, 2),
        **(lineage or {}),
    }
    with atomic_folder(out) as folder:
        save_weights(model, folder / "model.safetensors")
        write_json(folder / "calibration.json", calibration)
        write_json(folder / "metrics.json", metrics)
        session = feature_session(backbone, device=device) if adapted.frozen else None
        spent = cost(
            adapted.classifier, backbone.preprocessing, adapted.trained_params, folder, device=device, session=session
        )
        spent |= cost_too(folder)
        write_json(folder / "cost.json", spent)
        context = ReportContext(
            manifest=manifest,
            calibration=calibration,
            metrics=metrics,
            cost=spent,
            findings=findings,
            mistakes=mistakes(prepared, adapted.test.rows, probabilities, labels),
        )
        write_report(folder / "report.html", context)
        write_card(folder / "README.md", context, adapted.classifier)
        seal(folder, manifest)


def mistakes(prepared: Prepared, test: np.ndarray, probabilities: np.ndarray, labels: np.ndarray) -> list[Mistake]:
    """The wrong answers on test images that were given with most confidence, as thumbnails."""
    classes = prepared.dataset.classes
    if labels.ndim == 2:
        worst_label = np.abs(probabilities - labels).argmax(1)
        error = np.abs(probabilities - labels)[np.arange(len(labels)), worst_label]
        order = np.argsort(-error)[:MISTAKES]
        order = order[error[order] > 0.5]
    else:
        confidence = probabilities.max(1)
        wrong = np.flatnonzero(probabilities.argmax(1) != labels)
        order = wrong[np.argsort(-confidence[wrong])][:MISTAKES]
    rows: list[Mistake] = []
    for index in order.tolist():
        image = prepared.dataset.image(int(test[index]))
        image.thumbnail((160, 160))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        guessed = probabilities[index] >= 0.5 if labels.ndim == 2 else [probabilities[index].argmax()]
        true = np.flatnonzero(labels[index]) if labels.ndim == 2 else [labels[index]]
        named = np.flatnonzero(guessed) if labels.ndim == 2 else guessed
        rows.append(
            {
                "id": prepared.dataset.ids[int(test[index])],
                "thumbnail": buffer.getvalue(),
                "true": "|".join(classes[int(c)] for c in true),
                "predicted": "|".join(classes[int(c)] for c in named),
                "probability": float(probabilities[index].max()),
            }
        )
    return rows
