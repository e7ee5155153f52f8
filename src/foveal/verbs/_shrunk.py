"""A Bundle and a chain of methods -> a Bundle of the last one's model, with before and after side by side."""

from __future__ import annotations

import copy
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from foveal.backbones.adapter import Backbone, rebuild_backbone
from foveal.core import catalogue
from foveal.core.bundle import write_json
from foveal.core.errors import BackboneError, DataError, UsageError
from foveal.core.families.shrink import QUANTITIES, Accelerate, Quantity, Shrink, Shrunk, Target
from foveal.core.folders import claim
from foveal.core.method import Classifier
from foveal.core.options import options_to_dict
from foveal.core.progress import Progress
from foveal.core.seeds import derive, seed_everything
from foveal.core.threads import cpu_threads
from foveal.evaluate.beside import judged, numbers, share_of
from foveal.evaluate.calibration import fit_temperature, to_probabilities
from foveal.evaluate.cost import macs
from foveal.evaluate.metrics import measure
from foveal.features.session import pick_device
from foveal.ship.beside import Exporter, latency_share, timed_beside
from foveal.ship.bundle import Bundle, load_classifier, room_for
from foveal.ship.variants import HeldOut
from foveal.train.classify import predict_logits
from foveal.train.tuning import TrainingImages
from foveal.verbs._adapt import Adapted, Known
from foveal.verbs._export import CALIBRATING, HELD_OUT, check_whole, squares_of
from foveal.verbs._frontier import frontier
from foveal.verbs._prepare import Prepared, manifest_data, prepare
from foveal.verbs._write import finished, write_bundle

PHOTOS = 4
"""On how many test images every export is checked against torch."""


@dataclass(frozen=True)
class Goal:
    """What is asked of one method of a chain: a share of a quantity, of what the chain began with."""

    quantity: Quantity
    share: float
    place: int


def choose_chain(text: str) -> list[Shrink]:
    """The methods that `NAME[:options][+NAME...]` names.

    Raises:
        UsageError: unknown names or options, or methods of other families.
    """
    chain: list[Shrink] = []
    for choice in re.split(r"\+(?=[A-Za-z])", text):
        method = catalogue.create(choice)
        if not isinstance(method, Shrink):
            able = [name for family in ("shrink", "accelerate") for name in catalogue.names(family)]
            raise UsageError(
                f"{method.name} is a method of family {method.spec.family}: shrink takes {', '.join(able)}"
            )
        chain.append(method)
    return chain


def parse_target(text: str | None, chain: Sequence[Shrink]) -> Goal | None:
    """`QUANTITY=SHARE`, for the last method of the chain that can be given it.

    Raises:
        UsageError: not of that form, or no method can.
    """
    if text is None:
        return None
    name, _, number = text.partition("=")
    try:
        share = float(number)
    except ValueError:
        share = 0.0
    if name not in QUANTITIES or not 0 < share < 1:
        raise UsageError(
            f"--target {text}: expected {', '.join(f'{each}=' for each in QUANTITIES)} and a share between 0 and 1, "
            "such as macs=0.5"
        )
    able = [place for place, method in enumerate(chain) if name in method.targets]
    if not able:
        said = "; ".join(f"{each.name}: {', '.join(each.targets) or 'its options alone'}" for each in chain)
        raise UsageError(f"--target {text}: no method of the chain can be given that ({said})")
    return Goal(cast(Quantity, name), share, able[-1])


def shrink_bundle(
    path: Path,
    chain: Sequence[Shrink],
    goal: Goal | None,
    out: Path,
    *,
    request: dict[str, Any],
    data: str | None,
    max_drop: float,
    offline: bool,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """Run the chain, measure, and write the Bundle.

    Returns:
        What its cost.json says under `shrunk`.

    Raises:
        UsageError: `out` holds something else, or no labelled images of the Bundle's classes.
    """
    start = time.perf_counter()
    bundle = load_classifier(path, offline=offline)
    request = {**bundle.manifest["request"], "shrink": request}
    if finished(out, request):
        progress.say(f"{out} already holds the Bundle of this very command")
        return load_classifier(out).cost["shrunk"]
    prepared, splits = images_for(bundle, data, offline=offline, device=device, progress=progress)
    work = out.with_name(out.name + ".work")
    _held = claim(work)
    write_json(work / "request.json", request)
    seed = bundle.manifest["seed"]
    class_weights = bundle.manifest.get("class_weights", "auto")
    rows = np.flatnonzero(splits == "train")
    training = TrainingImages(
        prepared.dataset,
        prepared.dataset.labels,
        rows,
        bundle.preprocessing,
        torch.from_numpy(prepared.label_weights(rows, class_weights)[1]),
        derive(seed, "shrink"),
        device=pick_device(device),
        work=work,
        on_progress=progress.update,
    )
    before, exporter = bundle.model.classifier, exporter_for(bundle, prepared, splits)
    after, made = run_chain(before, chain, goal, training, exporter)
    check_opens(bundle, after)
    adapted = as_adapted(bundle, after, prepared, splits, training, device, time.perf_counter() - start)
    record = compare(bundle, adapted, prepared, splits, chain, exporter, max_drop, device, progress)
    record["target"] = goal and {"quantity": goal.quantity, "share": goal.share}
    if isinstance(chain[-1], Accelerate):
        progress.say(f"measuring {chain[-1].name} at other budgets")
        given = made[-2].module if len(made) > 1 else before
        record["frontier"] = frontier(chain[-1], given.cpu(), prepared, adapted.test.rows, exporter, device)
    record["steps"] = [
        {"name": method.name, "options": options_to_dict(method.options), "notes": dict(step.notes)}
        for method, step in zip(chain, made, strict=True)
    ]
    steps = [
        {"name": method.name, "options": options_to_dict(method.options), "plan": step.plan}
        for method, step in zip(chain, made, strict=True)
    ]

    def cost_too(folder: Path) -> dict[str, Any]:
        record["sides"]["after"]["bytes"] = (folder / "model.safetensors").stat().st_size
        return {"shrunk": record}

    own = replace(prepared, backbone=cast(Backbone, after.backbone))  # the data may have been read by another one
    write_bundle(
        out, own, splits, adapted, None,
        request=request, seed=seed, class_weights=class_weights, device=device, started=start, progress=progress,
        lineage={
            "backbone": bundle.manifest["backbone"],
            "why": bundle.manifest["why"],
            "parent": bundle.fingerprint,
            "head": {name: list(shape) for name, shape in bundle.head_shapes.items()},
            "steps": [*bundle.manifest.get("steps", []), *steps],
        },
        cost_too=cost_too,
    )  # fmt: skip
    shutil.rmtree(work, ignore_errors=True)
    return load_classifier(out).cost["shrunk"]


def images_for(
    bundle: Bundle, data: str | None, *, offline: bool, device: str, progress: Progress
) -> tuple[Prepared, np.ndarray]:
    """Labelled images with the Bundle's classes in its order, and their split: as at its fit, unless others are given.

    Raises:
        UsageError: the Bundle's data are gone or have changed, or the data given do not fit it.
    """
    manifest = bundle.manifest
    if data is None:
        check_whole(bundle)
    source = manifest["data"]["source"] if data is None else data
    try:
        prepared = prepare(
            source, manifest["request"]["backbone"], offline=offline or data is None, device=device, progress=progress
        )
    except Exception as error:
        if data is not None:
            raise
        raise UsageError(
            f"the images that {bundle.path} was fitted on are not here any more ({error}): "
            "name labelled images with --data, to tune and judge on"
        ) from None
    dataset = prepared.dataset
    splits = prepared.splits(manifest["seed"])
    if data is None and manifest_data(prepared, splits)["fingerprint"] != manifest["data"]["fingerprint"]:
        raise UsageError(
            f"{source} is not what {bundle.path} was fitted on (images or labels have changed): "
            "name labelled images that it was not trained on with --data"
        )
    if dataset.task != bundle.task or not set(dataset.classes) <= set(bundle.classes):
        raise UsageError(
            f"{dataset.name} is {dataset.task} with classes {', '.join(dataset.classes)}; {bundle.path} is "
            f"{bundle.task} with {', '.join(bundle.classes)}: use data of its task and classes"
        )
    labels = bundle.labels_of(dataset, np.arange(len(dataset)))
    return replace(prepared, dataset=replace(dataset, labels=labels, classes=bundle.classes)), splits


def exporter_for(bundle: Bundle, prepared: Prepared, splits: np.ndarray) -> Exporter:
    """
    Raises:
        UsageError: no test image can be decoded.
    """
    rows = np.flatnonzero(splits == "test")
    photos = []
    for row in rows[: 4 * PHOTOS].tolist():
        try:
            photos.append(prepared.dataset.image(row))
        except DataError:
            continue
    if not photos:
        raise UsageError(f"{prepared.dataset.name} has no readable test images: name others with --data")
    return Exporter(bundle.preprocessing, bundle.classes, bundle.task, photos[:PHOTOS], cpu_threads())


def run_chain(
    model: Classifier, chain: Sequence[Shrink], goal: Goal | None, training: TrainingImages, exporter: Exporter
) -> tuple[Classifier, list[Shrunk]]:
    """Each method on what the one before it made; `model` stays as it is."""
    reference, current = model, copy.deepcopy(model).eval().to(training.device)
    seed_everything(training.seed)

    def share(candidate: Classifier) -> float:
        assert goal is not None
        if goal.quantity == "latency":
            return latency_share(exporter, candidate, reference)
        return share_of(goal.quantity, candidate, reference, exporter.preprocessing.size)

    made: list[Shrunk] = []
    for place, method in enumerate(chain):
        training.stage = method.name
        target = Target(goal.quantity, goal.share, share) if goal and goal.place == place else None
        made.append(method.shrink(current, training, target))
        current = made[-1].module.eval()
    return current.cpu(), made


def check_opens(bundle: Bundle, after: Classifier) -> None:
    """
    Raises:
        UsageError: so little is left that the Bundle would not be opened again.
    """
    held = sum(value.numel() for value in after.state_dict().values())
    try:
        rebuild_backbone(bundle.manifest["backbone"], most=room_for(held))
    except BackboneError as error:
        raise UsageError(
            f"so little is left that the Bundle could not be opened again ({error}): ask for less, or fit a smaller "
            "backbone"
        ) from None


def as_adapted(
    bundle: Bundle,
    after: Classifier,
    prepared: Prepared,
    splits: np.ndarray,
    training: TrainingImages,
    device: str,
    seconds: float,
) -> Adapted:
    """What the new classifier answers on every split, and the temperature that fits it."""

    def known(name: str) -> Known:
        rows = np.flatnonzero(splits == name)
        logits, features = predict_logits(after, prepared.dataset, rows, bundle.preprocessing, device=device)
        return Known(rows, features, torch.from_numpy(prepared.dataset.labels[rows]), logits)

    held_out = known("val")
    seen = bundle.method.reads_features() and not bundle.steps
    total = sum(value.numel() for value in after.state_dict().values())
    return Adapted(
        bundle.method,
        after,
        known("train"),
        held_out,
        "validation images, on which the parent's head was fitted" if seen else "validation images",
        known("test"),
        fit_temperature(held_out.logits.numpy(), held_out.labels.numpy(), bundle.task),
        seconds,
        total if training.history else min(total, bundle.cost["parameters"]["trained"]),
        changed=True,
        history=training.history,
    )


def compare(
    bundle: Bundle,
    adapted: Adapted,
    prepared: Prepared,
    splits: np.ndarray,
    chain: Sequence[Shrink],
    exporter: Exporter,
    max_drop: float,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """Cost and accuracy before and after on the same test images; the times are of one run."""
    before, after, test = bundle.model.classifier, adapted.classifier, adapted.test
    logits, _ = predict_logits(before, prepared.dataset, test.rows, bundle.preprocessing, device=device)
    calibrating, _ = squares_of(bundle, prepared.dataset, np.flatnonzero(splits == "train"), CALIBRATING)
    squares, rows = squares_of(bundle, prepared.dataset, test.rows, HELD_OUT)
    held_out = HeldOut(np.stack(squares), prepared.dataset.labels[rows], np.stack(squares[:1]))
    progress.say("timing before and after in turns")
    codes = [pair for method in chain for pair in method.codes(after)]
    timed = timed_beside(exporter, {"before": before, "after": after}, held_out, codes, calibrating)

    def side(name: str, model: Classifier, answered: np.ndarray) -> dict[str, Any]:
        right = measure(
            to_probabilities(answered, bundle.task), test.labels.numpy(), bundle.classes, bundle.task, resamples=0
        )
        return {
            "parameters": numbers(model),
            "macs": macs(model, bundle.preprocessing.size),
            "bytes": (bundle.path / "model.safetensors").stat().st_size if name == "before" else None,
            "latency": timed.latency[name],
            "accuracy": right["accuracy"]["value"],
            "balanced_accuracy": right["balanced_accuracy"]["value"],
        }

    sides = {"before": side("before", before, logits.numpy()), "after": side("after", after, test.logits.numpy())}
    if timed.int8:
        like = {key: sides["after"][key] for key in ("parameters", "macs")}
        sides["after, int8"] = {**like, "latency": timed.latency["after, int8"], **timed.int8}
    return judged(sides, max_drop=max_drop, test_images=len(test.rows), timing=timed.about)
