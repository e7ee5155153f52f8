"""`foveal fit --task video`: folders of clips in, a Bundle that names them out."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch

from foveal.core.bundle import atomic_folder, seal, write_json
from foveal.core.errors import DataError
from foveal.core.families.video import ClipClassifier, Video
from foveal.core.method import classification_loss
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
from foveal.verbs._order import Order

STRANGE = 32
"""Clips of procedural pictures that stand for what the model does not know."""
STRIPS = 10
KEPT = ("about", "accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")


def fit(order: Order) -> Any:
    """See `foveal.verbs.fit.fit`.

    Raises:
        UsageError: a method that does not classify clips, or --out holds something else.
        DataError: DATA holds no clips by class, or too few of a class.
        BackboneError: nothing of the method fits on the backbone.
    """
    chosen, seed = order.chosen(Video, "does not classify clips"), order.seed
    if order.finished():
        return load(order.out)
    clips = open_clips(order.data, lambda done, total: order.progress.update("reading clips", done, total))
    order.tell_set_aside(clips.set_aside, "clips")
    splits = splits_of(clips, seed)
    rows = {name: np.flatnonzero(splits == name) for name in ("train", "val", "test")}
    loaded = order.load_backbone()
    preprocessing, described = loaded.preprocessing, loaded.describe()
    seed_everything(derive(seed, "init"))
    model = chosen.attach(loaded, clips.classes)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = class_weights(clips, rows["train"])
    order.progress.say(
        f"{len(clips)} clips of {len(clips.classes)} classes: {len(rows['train'])} to learn from, "
        f"{len(rows['val'])} to calibrate on, {len(rows['test'])} to measure on; {model.frames} frames of each"
    )

    def judge(network: ClipClassifier, some: np.ndarray, **asked: Any) -> Judged:
        held = [clips.clips[row] for row in some]
        judged = judge_clips(chosen, network, held, preprocessing, device=order.device, **asked)
        if judged.errors:
            place, reason = next(iter(judged.errors.items()))
            raise DataError(f"clip {clips.ids[int(some[place])]} cannot be read any more ({reason})")
        return judged

    def validate(network: ClipClassifier) -> dict[str, float]:
        logits, held = judge(network, rows["val"]).logits, torch.from_numpy(clips.labels[rows["val"]])
        loss = classification_loss(logits, {"labels": held, "class_weights": weights})
        return {"val_loss": float(loss), "val_balanced_accuracy": balanced_accuracy(logits, held)}

    feed = LabelledClips(clips, rows["train"], chosen, preprocessing, weights)
    result = order.train(chosen, model, feed, validate)
    network = result.model
    judged = {name: judge(network, some) for name, some in rows.items()}
    labels = {name: clips.labels[some] for name, some in rows.items()}
    calibrated, calibration = trust(chosen, network, judged, labels, preprocessing, order.device)
    T = float(calibration["temperature"]["value"])
    probabilities = to_probabilities(judged["test"].logits.numpy(), "single-label", T)
    metrics = {"split": "test", **measure(probabilities, labels["test"], clips.classes, "single-label")}
    mixed = to_probabilities(judge(network, rows["test"], shuffled=seed).logits.numpy(), "single-label", T)
    metrics["references"] = references(mixed, labels, clips.classes)
    metrics["history"] = result.history
    remembered = {
        "name": clips.name,
        "clips": len(clips),
        "frames": int(clips.counts.sum()),
        "set_aside": [list(item) for item in clips.set_aside],
        "splits": {name: len(some) for name, some in rows.items()},
        "split_by": "seed, copies kept together" if splits is not clips.splits else "the data",
        "fingerprint": feed.fingerprint(),
    }
    manifest = order.manifest(chosen, remembered, classes=list(clips.classes), backbone=described)
    with atomic_folder(order.out) as folder:
        save_weights(calibrated, folder / "model.safetensors")
        write_json(folder / "calibration.json", calibration)
        write_json(folder / "metrics.json", metrics)
        spent = clip_cost(network, preprocessing.size, trained, folder, device=order.device)
        write_json(folder / "cost.json", spent)
        strips = [
            strip(chosen, clips, rows["test"], probabilities, place)
            for place in surest_wrong(probabilities, labels["test"])
        ]
        write_video(folder, manifest, calibration, metrics, spent, strips)
        seal(folder, manifest)
    return order.close()


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
