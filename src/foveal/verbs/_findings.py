"""The data check, with out-of-fold probabilities of a quick frozen-feature method where there are enough labels."""

from __future__ import annotations

from typing import Any

import numpy as np

from foveal.core.errors import DataError
from foveal.core.seeds import derive
from foveal.data.checks import check
from foveal.evaluate.calibration import to_probabilities
from foveal.verbs._adapt import Adapted, FrozenRows, choose
from foveal.verbs._prepare import Prepared

QUICK = {"single-label": "gda-clip", "multi-label": "linear"}


def out_of_fold_probabilities(prepared: Prepared, seed: int) -> np.ndarray | None:
    """Probabilities [n, C] from models that did not see the image; None where labels are too few for folds."""
    everything = np.full(len(prepared.dataset), "train")
    try:
        rows = FrozenRows(prepared, everything, seed, "auto")
    except DataError:
        return None
    task = prepared.dataset.task
    logits = rows.out_of_fold(choose(QUICK[task]), derive(seed, "fit"))
    probabilities = np.full((len(prepared.dataset), logits.shape[1]), np.nan, np.float32)
    probabilities[rows.train[-len(logits) :]] = to_probabilities(logits.numpy(), task)
    return probabilities


def unseen_probabilities(prepared: Prepared, adapted: Adapted) -> np.ndarray:
    """Probabilities [n, C] of the images that the model behind them had not seen; NaN for the others."""
    probabilities = np.full((len(prepared.dataset), len(prepared.dataset.classes)), np.nan, np.float32)
    for known in (adapted.held_out, adapted.test):
        probabilities[known.rows] = adapted.probabilities(known, prepared.dataset.task)
    return probabilities


def find(prepared: Prepared, probabilities: np.ndarray | None) -> dict[str, list[dict[str, Any]]]:
    """Findings by kind; kinds with none are left out."""
    found = check(
        prepared.dataset,
        prepared.extraction.scan,
        prepared.groups,
        X=prepared.features,
        probabilities=probabilities,
        splits=prepared.dataset.splits,
    )
    return {kind: items for kind, items in found.items() if items}
