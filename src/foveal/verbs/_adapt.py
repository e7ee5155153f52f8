"""One method on one split: features or batches in, a classifier with held-out logits out."""

from __future__ import annotations

import copy
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from foveal.train.events import TrainResult

from foveal.core import catalogue
from foveal.core.errors import UsageError
from foveal.core.method import Adapt, Classifier, Task, trainable
from foveal.core.progress import Progress
from foveal.core.seeds import derive, seed_everything
from foveal.data.split import folds
from foveal.evaluate.calibration import fit_temperature, to_probabilities
from foveal.evaluate.metrics import measure
from foveal.verbs._prepare import Prepared

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")
FOLDS = 5
ONE_FOLD_ABOVE = 20_000
"""With more training images than this, one held-out fold replaces all five: enough to calibrate on, no copy of X."""


@dataclass(frozen=True)
class Known:
    """Labelled images of the known classes: their rows in the data set, features [n, D], labels [n] or [n, C],
    logits [n, C]."""

    rows: np.ndarray
    features: Tensor
    labels: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Adapted:
    """What a method made of one split.

    `changed` says that the backbone is not the prepared one any more. The logits of `held_out` are of models that
    never saw those images; temperature and unknown threshold come from them. Out of fold, `held_out` may be `fitted`
    itself.
    """

    method: Adapt
    classifier: Classifier
    fitted: Known
    held_out: Known
    held_out_name: str
    test: Known
    temperature: float
    seconds: float
    trained_params: int
    changed: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)

    def probabilities(self, known: Known, task: Task) -> np.ndarray:
        """Calibrated probabilities [n, C]."""
        return to_probabilities(known.logits.numpy(), task, self.temperature)

    @property
    def frozen(self) -> bool:
        """Whether the prepared features are what the head reads."""
        return self.method.reads_features() and not self.changed

    @property
    def total_params(self) -> int:
        return sum(p.numel() for p in self.classifier.state_dict().values())


class FrozenRows:
    """The training and test rows of one split, gathered once and shared by all frozen-feature methods.

    Training rows are ordered by cross-validation fold, so that leaving out the last fold is a view.
    """

    def __init__(self, prepared: Prepared, splits: np.ndarray, seed: int, class_weights: str) -> None:
        train = np.flatnonzero(splits != "test")
        fold = folds(
            prepared.dataset.labels[train],
            prepared.groups[train],
            FOLDS,
            derive(seed, "folds"),
            prepared.dataset.classes,
        )
        order = np.argsort(fold, kind="stable")
        self.train, self.fold = train[order], torch.from_numpy(fold[order])
        self.test = np.flatnonzero(splits == "test")
        self.X = torch.from_numpy(np.ascontiguousarray(prepared.extraction.X[self.train]))
        self.y = torch.from_numpy(prepared.dataset.labels[self.train])
        weights, self.per_class = prepared.label_weights(self.train, class_weights)
        self.weights = torch.from_numpy(weights)
        self.X_test = torch.from_numpy(np.ascontiguousarray(prepared.extraction.X[self.test]))
        self.y_test = torch.from_numpy(prepared.dataset.labels[self.test])

    def bounds(self, fold: int) -> tuple[int, int]:
        start, stop = torch.searchsorted(self.fold, torch.tensor([fold, fold + 1])).tolist()
        return start, stop

    def out_of_fold(self, method: Adapt, seed: int) -> Tensor:
        """Logits of training rows from heads that saw neither them nor their near-duplicates.

        Of all rows, or of the last fold's only when there are many.
        """

        def held_out(fold: int) -> Tensor:
            start, stop = self.bounds(fold)
            X, y, weights = (without(rows, start, stop) for rows in (self.X, self.y, self.weights))
            return logits_of(method.fit_features(X, y, weights, seed), self.X[start:stop])

        if len(self.X) > ONE_FOLD_ABOVE:
            return held_out(FOLDS - 1)
        occupied = self.fold.unique().tolist()
        with side_by_side() as pool:
            return torch.cat(list(pool.map(held_out, occupied)))

    def fit(self, method: Adapt, seed: int) -> nn.Module:
        """The head from all training rows."""
        return method.fit_features(self.X, self.y, self.weights, seed).eval()


@contextmanager
def side_by_side() -> Generator[ThreadPoolExecutor]:
    """A pool for fits of a few thousand rows: one core each, for cores that share one such fit mostly wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def without(rows: Tensor, start: int, stop: int) -> Tensor:
    """All rows but [start, stop); a view when they are the last or the first."""
    if stop == len(rows):
        return rows[:start]
    return rows[stop:] if start == 0 else torch.cat([rows[:start], rows[stop:]])


@torch.inference_mode()
def logits_of(head: nn.Module, X: Tensor, chunk: int = 4096) -> Tensor:
    head.eval()
    return torch.cat([head(X[start : start + chunk]) for start in range(0, len(X), chunk)]).clone()


def points(probabilities: np.ndarray, labels: np.ndarray, prepared: Prepared) -> dict[str, float | None]:
    """The metrics without intervals."""
    measured = measure(probabilities, labels, prepared.dataset.classes, prepared.dataset.task, resamples=0)
    return {name: measured[name]["value"] for name in METRICS}


def choose(choice: str) -> Adapt:
    """The adapt method that `NAME` or `NAME:key=value,...` names.

    Raises:
        UsageError: unknown name or options, or a method of another family.
    """
    method = catalogue.create(choice)
    if not isinstance(method, Adapt) or method.spec.family != "adapt":
        raise UsageError(f"{method.name} is a {method.spec.family} method: fit and compare take adapt methods")
    return method


def check_suits(method: Adapt, prepared: Prepared) -> Adapt:
    """The method, if it can do the task of the data.

    Raises:
        UsageError: it cannot.
    """
    task = prepared.dataset.task
    if task not in method.spec.tasks:
        raise UsageError(f"{method.name} does not do {task} data: choose a method that lists it in `foveal methods`")
    return method


def adapt_frozen(
    method: Adapt, prepared: Prepared, rows: FrozenRows, seed: int, out_of_fold: Tensor | None = None
) -> Adapted:
    """Fit a head on frozen features, calibrated on out-of-fold logits."""
    start = time.perf_counter()
    inner = derive(seed, "fit")
    if len(rows.X) > ONE_FOLD_ABOVE:
        head = rows.fit(method, inner)
    else:
        with side_by_side() as pool:
            head = pool.submit(rows.fit, method, inner).result()
    logits = rows.out_of_fold(method, inner) if out_of_fold is None else out_of_fold
    held = slice(len(rows.X) - len(logits), None)
    held_out = Known(rows.train[held], rows.X[held], rows.y[held], logits)
    whole = len(logits) == len(rows.X)
    fitted = (
        held_out if whole else Known(rows.train[: held.start], rows.X[: held.start], rows.y[: held.start], logits[:0])
    )
    temperature = fit_temperature(logits.numpy(), held_out.labels.numpy(), prepared.dataset.task)
    return Adapted(
        method,
        Classifier(prepared.backbone, head).eval(),
        fitted,
        held_out,
        "training images, out of fold" if whole else "one fold of the training images",
        Known(rows.test, rows.X_test, rows.y_test, logits_of(head, rows.X_test)),
        temperature,
        time.perf_counter() - start,
        sum(p.numel() for p in head.state_dict().values()),
    )


def adapt_trained(
    method: Adapt,
    prepared: Prepared,
    splits: np.ndarray,
    seed: int,
    class_weights: str,
    *,
    device: str,
    work: Path,
    budget: float | None,
    progress: Progress,
) -> Adapted:
    """Train through the backbone, calibrated on the validation split. Goes on from what `work` holds."""
    from foveal.train.classify import train_classifier

    begin = time.perf_counter()
    seed_everything(derive(seed, "init"))
    train_rows, val_rows = np.flatnonzero(splits == "train"), np.flatnonzero(splits == "val")
    _, per_class = prepared.label_weights(train_rows, class_weights)
    model = method.attach(copy.deepcopy(prepared.backbone), len(prepared.dataset.classes))
    trained_params = sum(p.numel() for _, p in trainable(model))
    result = train_classifier(
        method,
        model,
        prepared.dataset,
        prepared.backbone.preprocessing,
        prepared.dataset.labels,
        train_rows,
        val_rows,
        torch.from_numpy(per_class),
        seed,
        recipe=method.recipe(),
        device=device,
        work=work,
        budget_s=budget,
        on_event=lambda event: report_event(event, method.name, progress),
    )
    return judged(
        method,
        result,
        prepared,
        splits,
        device=device,
        seconds=time.perf_counter() - begin,
        trained_params=trained_params,
    )


def judged(
    method: Adapt,
    result: TrainResult,
    prepared: Prepared,
    splits: np.ndarray,
    *,
    device: str,
    seconds: float,
    trained_params: int,
) -> Adapted:
    """What the loop made, with its answers for every split and the temperature that the validation images ask for."""
    from foveal.train.classify import predict_logits

    def known(name: str) -> Known:
        rows = np.flatnonzero(splits == name)
        logits, features = predict_logits(
            result.model, prepared.dataset, rows, prepared.backbone.preprocessing, device=device, together=True
        )
        return Known(rows, features, torch.from_numpy(prepared.dataset.labels[rows]), logits)

    fitted, held_out, test = known("train"), known("val"), known("test")
    temperature = fit_temperature(held_out.logits.numpy(), held_out.labels.numpy(), prepared.dataset.task)
    return Adapted(
        method,
        result.model.eval(),
        fitted,
        held_out,
        "validation images",
        test,
        temperature,
        seconds,
        trained_params,
        history=result.history,
    )


def report_event(event: dict[str, Any], name: str, progress: Progress) -> None:
    if "step" in event and "steps" in event:
        progress.update(f"training {name}", event["step"], event["steps"])
    if "message" in event:
        progress.say(str(event["message"]))


def adapt(
    method: Adapt,
    prepared: Prepared,
    splits: np.ndarray,
    rows: FrozenRows | None,
    seed: int,
    class_weights: str,
    *,
    device: str,
    work: Path,
    budget: float | None,
    progress: Progress,
) -> Adapted:
    """Run one method on one split, whichever kind it is."""
    if method.reads_features():
        assert rows is not None
        return adapt_frozen(method, prepared, rows, seed)
    return adapt_trained(
        method,
        prepared,
        splits,
        seed,
        class_weights,
        device=device,
        work=work,
        budget=budget,
        progress=progress,
    )
