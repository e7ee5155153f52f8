"""Which frozen-feature method suits these data: cross-validation inside the training split, nothing else."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from foveal.core import catalogue
from foveal.core.method import Adapt
from foveal.core.progress import Progress
from foveal.core.seeds import derive
from foveal.evaluate.calibration import to_probabilities
from foveal.verbs._adapt import Adapted, FrozenRows, adapt_frozen, choose, points
from foveal.verbs._prepare import Prepared


def frozen_methods(task: str) -> list[str]:
    """Names of the methods that fit a head on frozen features and do this task."""
    classes = {name: catalogue.get(name) for name in catalogue.names("adapt")}
    return [
        name
        for name, cls in classes.items()
        if issubclass(cls, Adapt) and cls.reads_features() and task in cls.spec.tasks
    ]


def race(prepared: Prepared, rows: FrozenRows, seed: int, progress: Progress) -> tuple[Adapted, list[dict[str, Any]]]:
    """Fit every frozen-feature method on each fold's complement; the best out-of-fold balanced accuracy wins.

    Ties go to the quicker. Returns the winner, fitted on the whole training split, and a row per method.
    """
    task = prepared.dataset.task
    contest: list[dict[str, Any]] = []
    logits: dict[str, Tensor] = {}
    entrants = frozen_methods(task)
    for done, name in enumerate(entrants):
        progress.update("racing methods", done, len(entrants))
        start = time.perf_counter()
        logits[name] = rows.out_of_fold(choose(name), derive(seed, "fit"))
        labels = rows.y[-len(logits[name]) :].numpy()
        measured = points(to_probabilities(logits[name].numpy(), task), labels, prepared)
        contest.append({"method": name, **measured, "seconds": time.perf_counter() - start})
    progress.update("racing methods", len(entrants), len(entrants))
    contest.sort(key=lambda row: (-(row["balanced_accuracy"] or 0.0), row["seconds"]))
    winner = contest[0]["method"]
    return adapt_frozen(choose(winner), prepared, rows, seed, logits[winner]), contest


def verdict(contest: list[dict[str, Any]]) -> str:
    """Why the winner won, in one line."""
    first, *others = contest
    beaten = ", ".join(f"{row['method']} {row['balanced_accuracy']:.3f}" for row in others)
    return f"best cross-validated balanced accuracy inside the training split, {first['balanced_accuracy']:.3f}" + (
        f" (then {beaten})" if beaten else ""
    )
