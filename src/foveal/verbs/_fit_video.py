"""`foveal fit --task video`: folders of clips in, a Bundle that names them out."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from foveal.backbones.adapter import load_backbone
from foveal.core import catalogue
from foveal.core.bundle import atomic_folder, seal, write_json
from foveal.core.errors import DataError, UsageError
from foveal.core.families.video import ClipClassifier, Video
from foveal.core.folders import claim
from foveal.core.method import classification_loss
from foveal.core.options import options_to_dict
from foveal.core.progress import Progress
from foveal.core.seeds import derive, seed_everything
from foveal.data.clips import Clips, MemoryClip, open_clips
from foveal.data.split import make_split
from foveal.data.worlds import garbage
from foveal.evaluate.calibration import Calibrated, calibration_record, fit_temperature, to_probabilities
from foveal.evaluate.cost import clip_cost
from foveal.evaluate.metrics import measure
from foveal.evaluate.ood import choose_ood
from foveal.evaluate.video_page import Strip, write_video
from foveal.features.clips import Judged, judge_clips
from foveal.ship.bundle import load, save_weights
from foveal.train.clips import LabelledClips
from foveal.train.events import balanced_accuracy
from foveal.train.loop import train
from foveal.verbs._adapt import report_event
from foveal.verbs._write import finished
from foveal.verbs.reproduce import versions

STRANGE = 32
"""Clips of procedural pictures that stand for what the model does not know."""
STRIPS = 10
KEPT = ("about", "accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")


def fit(
    data: str,
    *,
    method: str,
    backbone: str,
    out: Path,
    seed: int,
    budget: float | None,
    device: str,
    offline: bool,
    progress: Progress,
) -> Any:
    """See `foveal.verbs.fit.fit`.

    Raises:
        UsageError: a method that does not classify clips, or --out holds something else.
        DataError: DATA holds no clips by class, or too few of a class.
        BackboneError: nothing of the method fits on the backbone.
    """
    start = time.perf_counter()
    chosen = choose(method)
    request = {"data": str(data), "task": "video", "method": method, "backbone": backbone, "seed": seed}
    if finished(out, request):
        progress.say(f"{out} already holds the Bundle of this very command")
        return load(out)
    clips = open_clips(data, lambda done, total: progress.update("reading clips", done, total))
    if clips.set_aside:
        name, reason = clips.set_aside[0]
        progress.say(f"{len(clips.set_aside)} clips set aside (first: {name}: {reason})")
    splits = splits_of(clips, seed)
    rows = {name: np.flatnonzero(splits == name) for name in ("train", "val", "test")}
    loaded = load_backbone(backbone, offline=offline)
    preprocessing, described = loaded.preprocessing, loaded.describe()
    seed_everything(derive(seed, "init"))
    model = chosen.attach(loaded, clips.classes)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = class_weights(clips, rows["train"])
    progress.say(
        f"{len(clips)} clips of {len(clips.classes)} classes: {len(rows['train'])} to learn from, "
        f"{len(rows['val'])} to calibrate on, {len(rows['test'])} to measure on; {model.frames} frames of each"
    )

    def judge(network: ClipClassifier, some: np.ndarray, **asked: Any) -> Judged:
        judged = judge_clips(chosen, network, [clips.clips[row] for row in some], preprocessing, device=device, **asked)
        if judged.errors:
            place, reason = next(iter(judged.errors.items()))
            raise DataError(f"clip {clips.ids[int(some[place])]} cannot be read any more ({reason})")
        return judged

    def validate(network: ClipClassifier) -> dict[str, float]:
        logits, held = judge(network, rows["val"]).logits, torch.from_numpy(clips.labels[rows["val"]])
        loss = classification_loss(logits, {"labels": held, "class_weights": weights})
        return {"val_loss": float(loss), "val_balanced_accuracy": balanced_accuracy(logits, held)}

    work = out.with_name(out.name + ".work")
    _held = claim(work)
    write_json(work / "request.json", request)
    feed = LabelledClips(clips, rows["train"], chosen, preprocessing, weights)
    result = train(
        chosen, model, feed, seed, recipe=chosen.recipe(), device=device, work=work, budget_s=budget, validate=validate,
        on_event=lambda event: report_event(event, chosen.name, progress),
    )  # fmt: skip
    network = result.model
    judged = {name: judge(network, some) for name, some in rows.items()}
    labels = {name: clips.labels[some] for name, some in rows.items()}
    calibrated, calibration = trust(chosen, network, judged, labels, preprocessing, device)
    T = float(calibration["temperature"]["value"])
    probabilities = to_probabilities(judged["test"].logits.numpy(), "single-label", T)
    metrics = {"split": "test", **measure(probabilities, labels["test"], clips.classes, "single-label")}
    mixed = to_probabilities(judge(network, rows["test"], shuffled=seed).logits.numpy(), "single-label", T)
    metrics["references"] = references(mixed, labels, clips.classes)
    metrics["history"] = result.history
    manifest = {
        "foveal": versions(),
        "task": "video",
        "classes": list(clips.classes),
        "backbone": described,
        "method": {"name": chosen.name, "options": options_to_dict(chosen.options)},
        "why": "asked for",
        "seed": seed,
        "data": {
            "name": clips.name,
            "source": str(Path(data).absolute()),
            "clips": len(clips),
            "frames": int(clips.counts.sum()),
            "set_aside": [list(item) for item in clips.set_aside],
            "splits": {name: len(some) for name, some in rows.items()},
            "split_by": "seed, copies kept together" if splits is not clips.splits else "the data",
            "fingerprint": feed.fingerprint(),
        },
        "request": request,
        "parent": None,
        "seconds": round(time.perf_counter() - start, 2),
    }
    with atomic_folder(out) as folder:
        save_weights(calibrated, folder / "model.safetensors")
        write_json(folder / "calibration.json", calibration)
        write_json(folder / "metrics.json", metrics)
        spent = clip_cost(network, preprocessing.size, trained, folder, device=device)
        write_json(folder / "cost.json", spent)
        strips = [
            strip(chosen, clips, rows["test"], probabilities, place)
            for place in surest_wrong(probabilities, labels["test"])
        ]
        write_video(folder, manifest, calibration, metrics, spent, strips)
        seal(folder, manifest)
    shutil.rmtree(work, ignore_errors=True)
    return load(out)


def choose(text: str) -> Video:
    method = catalogue.create(text)
    if not isinstance(method, Video):
        raise UsageError(f"{method.name} does not classify clips: expected {' or '.join(catalogue.names('video'))}")
    return method


def splits_of(clips: Clips, seed: int) -> np.ndarray:
    """'train', 'val' or 'test' of each clip; given ones are kept, and what they lack is cut from 'train'.

    Raises:
        DataError: too few clips of a class.
    """
    if clips.splits is None:
        return make_split(clips.labels, clips.groups, seed, classes=clips.classes)
    splits = clips.splits.copy()
    if not (splits == "test").any():
        splits[splits == "val"] = "test"
    if not (splits == "val").any():
        rows = np.flatnonzero(splits == "train")
        splits[rows] = make_split(
            clips.labels[rows], clips.groups[rows], seed, test=0.0, val=0.125, classes=clips.classes
        )
    return splits


def class_weights(clips: Clips, rows: np.ndarray) -> torch.Tensor:
    """Inverse class frequency [C], mean 1 over clips.

    Raises:
        DataError: a class without a training clip.
    """
    frequency = np.bincount(clips.labels[rows], minlength=len(clips.classes))
    if (frequency == 0).any():
        empty = ", ".join(clips.classes[index] for index in np.flatnonzero(frequency == 0))
        raise DataError(f"no training clip of class {empty}: add some, or drop the class from every split")
    return torch.from_numpy(len(rows) / (len(clips.classes) * frequency)).float()


def trust(
    method: Video,
    network: ClipClassifier,
    judged: dict[str, Judged],
    labels: dict[str, np.ndarray],
    preprocessing: Any,
    device: str,
) -> tuple[Calibrated, dict[str, Any]]:
    """The calibrated model, and what goes into calibration.json: fitted on the validation clips."""
    logits = {name: each.logits.numpy() for name, each in judged.items()}
    T = fit_temperature(logits["val"], labels["val"], "single-label")
    stills = garbage(STRANGE, preprocessing.size, 0)
    strange = judge_clips(method, network, [MemoryClip(still[None]) for still in stills], preprocessing, device=device)
    score, unknown = choose_ood(
        judged["train"].features.numpy(), labels["train"], judged["val"].features.numpy(), logits["val"],
        strange.features.numpy(), strange.logits.numpy(), temperature=T, fitted_on="validation clips",
    )  # fmt: skip
    measured = calibration_record(logits["val"], labels["val"], "single-label", T, "validation clips")
    tested = calibration_record(logits["test"], labels["test"], "single-label", T, "test clips")
    record = {"temperature": {"value": T, "fitted_on": measured, "test": tested}, "unknown": unknown}
    return Calibrated(cast(Any, network), T, score).eval(), record


def references(mixed: np.ndarray, labels: dict[str, np.ndarray], classes: tuple[str, ...]) -> dict[str, Any]:
    """What the figures are to be held against: the most frequent class, and the same model blind to order."""
    frequency = np.bincount(labels["train"], minlength=len(classes)) / len(labels["train"])
    rows = {
        "majority": ("always answers the most frequent class", np.tile(frequency, (len(labels["test"]), 1))),
        "shuffled": ("this model, shown the frames of each clip in an order at random", mixed),
    }
    found = {
        name: {"about": about, **measure(p, labels["test"], classes, "single-label")}
        for name, (about, p) in rows.items()
    }
    return {name: {key: row[key] for key in KEPT} for name, row in found.items()}


def surest_wrong(probabilities: np.ndarray, labels: np.ndarray) -> list[int]:
    """Places of the wrong answers given with most confidence, then of the surest right ones; STRIPS in all."""
    wrong = probabilities.argmax(1) != labels
    return np.lexsort((-probabilities.max(1), ~wrong))[:STRIPS].tolist()


def strip(method: Video, clips: Clips, rows: np.ndarray, probabilities: np.ndarray, place: int) -> Strip:
    row = int(rows[place])
    clip = clips.clips[row]
    answer = int(probabilities[place].argmax())
    return Strip(
        clips.ids[row],
        clip.read(method.sample(int(clips.counts[row]), 0.5).tolist()),
        clips.classes[int(clips.labels[row])],
        clips.classes[answer],
        float(probabilities[place, answer]),
    )
