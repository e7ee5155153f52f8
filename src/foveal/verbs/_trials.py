"""The trials of a comparison, a method and a seed each: what they are made of, and one after the other here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foveal.core.errors import BackboneError
from foveal.core.progress import Progress
from foveal.verbs._adapt import Adapted, FrozenRows, adapt, choose, points
from foveal.verbs._compared import images_per_second
from foveal.verbs._prepare import Prepared

Outcome = tuple[str, int, "dict[str, Any] | BackboneError"]
"""Method, seed, and its row; or why the method cannot work on this backbone."""


@dataclass(frozen=True)
class Terms:
    """What all trials of a comparison have in common."""

    class_weights: str
    device: str
    budget: float | None
    folder: Path
    """Where a trial that was stopped half-way finds its checkpoint."""


def one_by_one(
    prepared: Prepared, trials: list[tuple[str, int]], terms: Terms, progress: Progress
) -> Iterator[Outcome]:
    """Outcomes in this process, seed by seed; a method that was refused is not tried again."""
    refused: set[str] = set()
    for seed in dict.fromkeys(seed for _, seed in trials):
        splits = prepared.splits(seed)
        rows: FrozenRows | None = None
        for name in [name for name, own in trials if own == seed and name not in refused]:
            progress.say(f"seed {seed}: {name}")
            if rows is None and choose(name).reads_features():
                rows = FrozenRows(prepared, splits, seed, terms.class_weights)
            try:
                yield name, seed, measured(name, seed, prepared, splits, rows, terms, progress)
            except BackboneError as refusal:
                refused.add(name)
                yield name, seed, refusal


def measured(
    name: str,
    seed: int,
    prepared: Prepared,
    splits: np.ndarray,
    rows: FrozenRows | None,
    terms: Terms,
    progress: Progress,
) -> dict[str, Any]:
    """The row of one trial.

    Raises:
        BackboneError: the method cannot work on this backbone.
    """
    work = terms.folder / f"{name.replace(':', '-')}-{seed}"
    adapted = adapt(
        choose(name), prepared, splits, rows, seed, terms.class_weights,
        device=terms.device, work=work, budget=terms.budget, progress=progress,
    )  # fmt: skip
    return row(name, seed, adapted, prepared, terms.device)


def row(name: str, seed: int, adapted: Adapted, prepared: Prepared, device: str) -> dict[str, Any]:
    probabilities = adapted.probabilities(adapted.test, prepared.dataset.task)
    return {
        "method": name,
        "seed": seed,
        "split": "test",
        **points(probabilities, adapted.test.labels.numpy(), prepared),
        "seconds": round(adapted.seconds, 3),
        "trained_params": adapted.trained_params,
        "total_params": adapted.total_params,
        "images_per_second": images_per_second(adapted, prepared, device),
    }


def reference_row(
    name: str, seed: int, probabilities: np.ndarray, labels: np.ndarray, prepared: Prepared
) -> dict[str, Any]:
    cost = dict.fromkeys(("seconds", "trained_params", "total_params", "images_per_second"))
    return {"method": name, "seed": seed, "split": "test", **points(probabilities, labels, prepared), **cost}
