"""A teacher's Bundle and images -> a trained student, and both measured side by side."""

from __future__ import annotations

import copy
import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveal.backbones.adapter import load_backbone
from foveal.core import catalogue
from foveal.core.errors import DataError, UsageError
from foveal.core.families.distill import Distill
from foveal.core.progress import Progress
from foveal.core.seeds import derive, seed_everything
from foveal.data.dataset import Dataset
from foveal.data.open import open_images
from foveal.evaluate.calibration import to_probabilities
from foveal.evaluate.cost import cost
from foveal.evaluate.metrics import measure
from foveal.features.cache import KEY
from foveal.ship.bundle import Bundle
from foveal.train.classify import predict_logits
from foveal.train.distill import TaughtImages, train_student
from foveal.train.loop import WORKERS
from foveal.verbs._adapt import METRICS, Adapted, judged, report_event
from foveal.verbs._prepare import Prepared, manifest_data, prepare


@dataclass(frozen=True)
class Lesson:
    """Who teaches whom on which images. `prepared` holds the student's backbone before training."""

    teacher: Bundle
    prepared: Prepared
    splits: np.ndarray
    seed: int
    unlabelled: Dataset | None
    notes: tuple[str, ...]

    @property
    def same_classes(self) -> bool:
        return self.teacher.classes == tuple(self.prepared.dataset.classes)

    def described(self) -> dict[str, Any]:
        """What the student's bundle.json says of its teacher."""
        return {
            "fingerprint": self.teacher.fingerprint,
            "backbone": self.teacher.manifest["backbone"]["name"],
            "method": self.teacher.manifest["method"],
            "classes": list(self.teacher.classes),
        }


def choose(choice: str) -> Distill:
    """The distill method that `NAME` or `NAME:key=value,...` names.

    Raises:
        UsageError: unknown name or options, or a method of another family.
    """
    method = catalogue.create(choice)
    if not isinstance(method, Distill):
        raise UsageError(
            f"{method.name} is a method of family {method.spec.family}: expected one of "
            f"{', '.join(catalogue.names('distill'))}"
        )
    return method


def lesson(
    teacher: Bundle,
    data: Any,
    student: str,
    *,
    scratch: bool,
    unlabelled: Path | None,
    seed: int,
    offline: bool,
    device: str,
    progress: Progress,
) -> Lesson:
    """Read and check everything that training needs.

    Raises:
        DataError: nothing usable in DATA or among the unlabelled images.
        UsageError: the teacher does another task.
    """
    reader = teacher.manifest["request"]["backbone"]  # as at its fit: the same near-copies, and so the same split
    prepared = prepare(data, reader, offline=offline, device=device, split=True, progress=progress)
    if prepared.dataset.task != teacher.task:
        raise UsageError(f"the teacher answers {teacher.task} data, {prepared.dataset.name} is {prepared.dataset.task}")
    splits = prepared.splits(seed)
    seed_everything(derive(seed, "student"))
    backbone = load_backbone(student, pretrained=not scratch, offline=offline)
    others = None
    if unlabelled is not None:
        held = [prepared.extraction.keys[row] for row in np.flatnonzero(splits != "train")]
        others = readable(open_images([unlabelled]), set(held), progress)
    notes = overlap(teacher, prepared, splits, seed)
    for note in notes:
        progress.say(note)
    return Lesson(teacher, replace(prepared, backbone=backbone), splits, seed, others, notes)


def overlap(teacher: Bundle, prepared: Prepared, splits: np.ndarray, seed: int) -> tuple[str, ...]:
    """A note when the teacher may have learnt from images that the student is tested on."""
    theirs, ours = teacher.manifest["data"], manifest_data(prepared, splits)
    same = theirs.get("fingerprint") == ours["fingerprint"]
    if not same or prepared.has_test or seed == teacher.manifest["seed"]:
        return ()
    return (f"the teacher was fitted with seed {teacher.manifest['seed']} and learnt from some of these test images",)


def readable(dataset: Dataset, held: set[bytes], progress: Progress) -> Dataset:
    """The unlabelled images that can be decoded and are none of those that the student is judged on.

    Args:
        held: hashes of the files of these.

    Raises:
        DataError: none is left.
    """

    def fault(row: int) -> str:
        try:
            if hashlib.sha256(dataset.read(row)).digest()[:KEY] in held:
                return "is one of the images to test on"
            dataset.image(row)
        except DataError as error:
            return str(error)
        return ""

    reasons: dict[int, str] = {}
    with ThreadPoolExecutor(WORKERS) as pool:
        for row, reason in enumerate(pool.map(fault, range(len(dataset)))):
            progress.update("reading unlabelled images", row + 1, len(dataset))
            if reason:
                reasons[row] = reason
    if len(reasons) == len(dataset):
        raise DataError(
            f"none of the {len(dataset)} unlabelled images can be used ({dataset.ids[0]}: {reasons[0]}): give a folder "
            "of other images, or leave out --unlabelled"
        )
    if reasons:
        first = next(iter(reasons))
        progress.say(f"{len(reasons)} unlabelled images set aside (first: {dataset.ids[first]}: {reasons[first]})")
    return dataset.drop(reasons)


def taught(
    method: Distill,
    given: Lesson,
    class_weights: str,
    *,
    baseline: bool,
    device: str,
    work: Path,
    budget: float | None,
    progress: Progress,
) -> tuple[Adapted, dict[str, Any]]:
    """The trained student, and the record of what it came to beside its teacher."""
    teacher = given.teacher.model.classifier
    adapted = student_of(method, given, teacher, class_weights, device, work, budget, progress)
    rows = [row("student", f"{method.name} on {given.prepared.backbone.name}", adapted.classifier, given, adapted)]
    rows.insert(0, teacher_row(given, device))
    if baseline:
        alone = student_of(method.alone(), given, None, class_weights, device, work / "alone", budget, progress)
        rows.append(row("labels alone", f"the same student, {method.name} without its teacher", None, given, alone))
    record = {
        "rows": rows,
        "unlabelled": 0 if given.unlabelled is None else len(given.unlabelled),
        "notes": list(given.notes),
        "shares": shares(rows[0], rows[1]),
    }
    return adapted, record


def student_of(
    method: Distill,
    given: Lesson,
    teacher: Any,
    class_weights: str,
    device: str,
    work: Path,
    budget: float | None,
    progress: Progress,
) -> Adapted:
    """Train one student, beside a teacher or alone. Goes on from what `work` holds."""
    begin = time.perf_counter()
    prepared = given.prepared
    dataset, backbone = prepared.dataset, copy.deepcopy(prepared.backbone)
    seed_everything(derive(given.seed, "init"))
    student = method.attach(backbone, len(dataset.classes))
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    train_rows = np.flatnonzero(given.splits == "train")
    feed = TaughtImages(
        dataset, dataset.labels, train_rows, backbone.preprocessing,
        torch.from_numpy(prepared.label_weights(train_rows, class_weights)[1]), method.recipe(),
        teacher=None if teacher is None else given.teacher.preprocessing,
        unlabelled=None if teacher is None else given.unlabelled,
    )  # fmt: skip
    name = method.name if teacher is not None else "the student on labels alone"
    result = train_student(
        method, method.pair(student, teacher), feed, np.flatnonzero(given.splits == "val"), given.seed,
        device=device, work=work, budget_s=budget, on_event=lambda event: report_event(event, name, progress),
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    return judged(method, result, prepared, given.splits, device=device, seconds=seconds, trained_params=trained)


def teacher_row(given: Lesson, device: str) -> dict[str, Any]:
    """The teacher on the student's test images; without metrics if it knows other classes."""
    bundle, dataset = given.teacher, given.prepared.dataset
    manifest = bundle.manifest
    about = f"{manifest['method']['name']} on {manifest['backbone']['name']}"
    model = bundle.model.classifier
    found: dict[str, Any] = {"name": "teacher", "about": about, **spent(model, bundle.preprocessing)}
    if given.same_classes:
        test = np.flatnonzero(given.splits == "test")
        logits, _ = predict_logits(model, dataset, test, bundle.preprocessing, device=device, together=True)
        found |= figures(logits.numpy(), dataset.labels[test], dataset, bundle.calibration["temperature"]["value"])
    return found


def row(name: str, about: str, model: Any, given: Lesson, adapted: Adapted) -> dict[str, Any]:
    """A student on the test images, with what it costs when `model` is given."""
    dataset = given.prepared.dataset
    found: dict[str, Any] = {"name": name, "about": about, "seconds": round(adapted.seconds, 2)}
    if model is not None:
        found |= spent(model, given.prepared.backbone.preprocessing)
    logits, labels = adapted.test.logits.numpy(), adapted.test.labels.numpy()
    return found | figures(logits, labels, dataset, adapted.temperature)


def figures(logits: np.ndarray, labels: np.ndarray, dataset: Dataset, temperature: float) -> dict[str, Any]:
    measured = measure(to_probabilities(logits, dataset.task, temperature), labels, dataset.classes, dataset.task)
    return {name: measured[name] for name in METRICS}


def spent(model: Any, preprocessing: Any) -> dict[str, Any]:
    """Parameters, multiply-accumulates and milliseconds of one image in torch on the CPU."""
    found = cost(model, preprocessing, 0, device="cpu")
    return {
        "parameters": found["parameters"]["total"],
        "macs": found["macs"],
        "milliseconds": found["latency"][0]["milliseconds"],
        "threads": found["latency"][0]["threads"],
    }


def shares(teacher: dict[str, Any], student: dict[str, Any]) -> dict[str, float]:
    """What the student takes of what the teacher takes; the times are of the same run."""
    return {key: round(student[key] / teacher[key], 4) for key in ("parameters", "macs", "milliseconds")}
