"""A Bundle and images of new classes -> a Bundle of both, its memory, and how far old answers moved."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveal.backbones.adapter import Backbone
from foveal.core import catalogue
from foveal.core.bundle import sha256, write_json
from foveal.core.errors import DataError, UsageError
from foveal.core.families.continual import Continual
from foveal.core.folders import atomic_file, claim
from foveal.core.method import Classifier
from foveal.core.options import options_to_dict
from foveal.core.progress import Progress
from foveal.core.seeds import derive, generator, seed_everything
from foveal.data.dataset import Dataset
from foveal.data.join import join
from foveal.data.memory import NAME, Exemplars, write_exemplars
from foveal.data.open import open_dataset
from foveal.evaluate.stream import drift, kept_and_learnt
from foveal.ship.bundle import Bundle, load_classifier
from foveal.train.classify import predict_logits
from foveal.train.events import Event, TrainResult
from foveal.train.stream import both, learn, remembered
from foveal.verbs._adapt import Adapted, judged, report_event
from foveal.verbs._known import check_knows, own_split
from foveal.verbs._prepare import Prepared, check_choices, prepare, source_of
from foveal.verbs._write import finished, write_bundle

HELD = 4
"""Of a memory, one image in so many is never trained on: it calibrates and judges the Bundles to come."""


@dataclass(frozen=True)
class Old:
    """Images of the classes that are known: to rehearse, to calibrate by, and to test on."""

    exemplars: Exemplars
    calibrate: Dataset
    test: Dataset
    about: str


def update_bundle(
    path: Path,
    data: str,
    choice: str,
    out: Path,
    *,
    memory: int,
    old: str | None,
    seed: int,
    offline: bool,
    device: str,
    progress: Progress,
) -> Bundle:
    """Learn, measure and write.

    Raises:
        UsageError: a method of another family, a memory too small, no old images, or `out` holds something else.
        DataError: classes that the Bundle knows already, or images of several labels.
    """
    start = time.perf_counter()
    check_choices(device=device)
    method = chosen(choice)
    if memory < 2:
        raise UsageError(f"--memory {memory}: expected at least 2 images a class, one to rehearse and one to judge by")
    bundle = load_classifier(path, offline=offline)
    request = {
        **bundle.manifest["request"],
        "update": {"bundle": bundle.fingerprint, "data": str(data), "method": choice, "memory": memory, "old": old},
        "seed": seed,
    }
    if finished(out, request):
        progress.say(f"{out} already holds the Bundle of this very command")
        return load_classifier(out)
    new = open_dataset(data, offline=offline)
    check_new(bundle, new)
    parent = bundle.model.classifier
    seed_everything(derive(seed, "grow", len(bundle.classes)))
    grown = method.grow(parent, len(new.classes))
    plan = method.plan(parent, grown)

    known = old_images(bundle, old, memory, offline=offline, device=device, progress=progress)
    prepared = replace(joined(bundle, known, new, seed, device=device, progress=progress), source=source_of(data))
    splits = prepared.splits(seed)
    dataset, train = prepared.dataset, np.flatnonzero(splits == "train")
    work = out.with_name(out.name + ".work")
    _held = claim(work)
    write_json(work / "request.json", request)

    def listen(event: Event) -> None:
        if event["event"] == "read":
            progress.update("reading images", event["done"], event["images"])
        report_event(event, method.name, progress)

    begun = time.perf_counter()
    model, history = learn(
        method, parent, grown, dataset, dataset.labels, train, bundle.preprocessing, seed,
        work=work / "stages", per_class=memory - memory // HELD, device=device, on_event=listen,
    )  # fmt: skip
    added = size(model) - size(parent)
    adapted = judged(
        bundle.method, TrainResult(model, history), prepared, splits,
        device=device, seconds=time.perf_counter() - begun, trained_params=added,
    )  # fmt: skip
    adapted = replace(adapted, changed=True)
    exemplars = with_new(known.exemplars, adapted, prepared, len(bundle.classes), memory)
    with atomic_file(work / NAME) as staging:
        write_exemplars(staging, exemplars, bundle.preprocessing)

    def keep(folder: Path) -> dict[str, Any]:
        shutil.copyfile(work / NAME, folder / NAME)
        return {"memory": {"images": sum(exemplars.counts().values()), "bytes": (folder / NAME).stat().st_size}}

    record = {
        "method": method.name,
        "options": options_to_dict(method.options),
        "old_classes": len(bundle.classes),
        "parameters_added": added,
        **measured(bundle, adapted, prepared, device),
        "about": known.about,
    }
    write_bundle(
        out, prepared, splits, adapted, None,
        request=request, seed=seed, class_weights="none", device=device, started=start, progress=progress,
        lineage={
            "backbone": bundle.manifest["backbone"],
            "why": bundle.manifest["why"],
            "parent": bundle.fingerprint,
            "head": {name: list(shape) for name, shape in bundle.head_shapes.items()},
            "steps": [
                *bundle.manifest.get("steps", []),
                {"name": method.name, "options": options_to_dict(method.options), "plan": plan},
            ],
            "memory": {"per_class": memory, "images": exemplars.counts(), "sha256": sha256(work / NAME)},
        },
        cost_too=keep,
        metrics_too={"update": record},
    )  # fmt: skip
    shutil.rmtree(work, ignore_errors=True)
    return load_classifier(out)


def chosen(choice: str) -> Continual:
    method = catalogue.create(choice)
    if not isinstance(method, Continual):
        able = " or ".join(catalogue.names("continual"))
        raise UsageError(
            f"{method.name} is a method of family {method.spec.family}: expected one that adds classes, {able}"
        )
    return method


def size(model: Classifier) -> int:
    return sum(tensor.numel() for tensor in model.state_dict().values())


def check_new(bundle: Bundle, new: Dataset) -> None:
    if bundle.task != "single-label" or new.task != "single-label":
        raise DataError(f"the Bundle is {bundle.task}, {new.name} {new.task}: update takes one label an image")
    twice = sorted(set(new.classes) & set(bundle.classes))
    if twice:
        raise DataError(
            f"{new.name} has classes that the Bundle knows already ({', '.join(twice)}): leave them out, "
            "or fit anew on everything; update adds new ones"
        )


def old_images(bundle: Bundle, old: str | None, memory: int, *, offline: bool, device: str, progress: Progress) -> Old:
    """Images of every class the Bundle knows: those given, those it keeps, or some of the data it was fitted on."""
    exemplars = bundle.memory if old is None else None
    if exemplars is not None:
        shortened = Exemplars(
            first(exemplars.learn, memory - memory // HELD), first(exemplars.held, max(1, memory // HELD))
        )
        calibrate, test = halves(shortened.held)
        known = Old(shortened, calibrate, test, "the images that the Bundle keeps to judge by")
    else:
        known = from_data(bundle, old, memory, offline=offline, device=device, progress=progress)
    missing = [name for name, count in counts(known.exemplars.learn).items() if not count]
    if missing:
        raise UsageError(
            f"no image of {', '.join(missing)} among the old ones: it would be forgotten; name some with --old"
        )
    return known


def from_data(bundle: Bundle, old: str | None, memory: int, *, offline: bool, device: str, progress: Progress) -> Old:
    """Herded from the training images; what was held out at the fit calibrates and tests."""
    name = bundle.manifest["data"]["source"]
    if old is not None:
        backbone = classifier_backbone(bundle)
        prepared = prepare(old, backbone, offline=offline, device=device, progress=progress)
        check_knows(bundle, prepared.dataset)
        splits = prepared.splits(bundle.manifest["seed"])
    else:
        found = own_split(bundle, name, offline=True, device=device, progress=progress)
        if found is None:
            raise UsageError(
                f"{bundle.path} keeps no images of its classes, and the data it was fitted on ({name}) are gone or "
                "have changed: give images of them with --old"
            )
        prepared, splits = found
    rows = np.arange(len(prepared.dataset))
    dataset = replace(prepared.dataset, labels=bundle.labels_of(prepared.dataset, rows), classes=bundle.classes)
    train, test = (dataset.subset(np.flatnonzero(splits == name)) for name in ("train", "test"))
    if bundle.method.reads_features() and not bundle.steps and old is None:
        features = np.asarray(prepared.extraction.X[np.flatnonzero(splits == "train")])
    else:
        _, seen = predict_logits(
            bundle.model.classifier, train, np.arange(len(train)), bundle.preprocessing, device=device
        )
        features = seen.numpy()
    learnt = train.subset(remembered(features, train.labels, memory - memory // HELD))
    order = generator(bundle.manifest["seed"], "held").permutation(len(test))
    half = np.isin(np.arange(len(test)), nth(test.labels, order, max(1, memory // HELD)))
    held = test.subset(half)
    rest = test.subset(~half)
    return Old(Exemplars(learnt, held), held, rest, f"images of {dataset.name} that were held out")


def classifier_backbone(bundle: Bundle) -> Backbone:
    backbone = bundle.model.classifier.backbone
    if not isinstance(backbone, Backbone):
        raise UsageError(f"{bundle.path} has no plain backbone: update cannot read images with it")
    return backbone


def nth(labels: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """The first `count` rows of every class in an order, but at most half of them (rounded up)."""
    rows = []
    for label in np.unique(labels):
        own = order[labels[order] == label]
        rows.append(own[: min(count, -(-len(own) // 2))])
    return np.concatenate(rows) if rows else np.array([], np.int64)


def first(dataset: Dataset, count: int) -> Dataset:
    """The first `count` images of every class."""
    rows = [np.flatnonzero(dataset.labels == label)[:count] for label in range(len(dataset.classes))]
    return dataset.subset(np.concatenate(rows))


def halves(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """Every second image of each class, and the others; twice the same where no class has two."""
    place = np.zeros(len(dataset), np.int64)
    for label in range(len(dataset.classes)):
        own = np.flatnonzero(dataset.labels == label)
        place[own] = np.arange(len(own))
    second = dataset.subset(place % 2 == 1)
    return (second, dataset.subset(place % 2 == 0)) if len(second) else (dataset, dataset)


def counts(dataset: Dataset) -> dict[str, int]:
    return dict(zip(dataset.classes, np.bincount(dataset.labels, minlength=len(dataset.classes)).tolist(), strict=True))


def joined(bundle: Bundle, known: Old, new: Dataset, seed: int, *, device: str, progress: Progress) -> Prepared:
    """Old and new images as one data set with its splits, old classes first."""
    backbone = classifier_backbone(bundle)
    fresh = prepare(new, backbone, device=device, progress=progress)
    parts = split_new(fresh, seed)
    whole = join(
        f"{bundle.manifest['data']['name']} + {new.name}",
        [
            (replace(known.exemplars.learn, set_aside=()), "train"),
            (replace(known.calibrate, set_aside=()), "val"),
            (replace(known.test, set_aside=()), "test"),
            *((fresh.dataset.subset(np.flatnonzero(parts == name)), name) for name in ("train", "val", "test")),
        ],
        (*bundle.classes, *new.classes),
    )
    aside = dict.fromkeys(whole.set_aside)
    return prepare(replace(whole, set_aside=tuple(aside)), backbone, device=device, progress=progress)


def split_new(fresh: Prepared, seed: int) -> np.ndarray:
    """'train', 'val' or 'test' for each new image; one new class alone is drawn at random, near-copies together.

    Raises:
        DataError: too few images of a class.
    """
    if fresh.has_test or len(fresh.dataset.classes) > 1:
        return fresh.splits(seed)
    groups = np.unique(fresh.groups)
    if len(groups) < 3:
        raise DataError(
            f"class {', '.join(fresh.dataset.classes)} has {len(groups)} distinct images; 3 needed (2 to train on "
            "and 1 to test): add images"
        )
    order = generator(seed, "split of one class").permutation(groups)
    tested, checked = max(1, len(groups) // 4), len(groups) // 10
    parts = np.full(len(fresh.groups), "train")
    parts[np.isin(fresh.groups, order[:tested])] = "test"
    parts[np.isin(fresh.groups, order[tested : tested + checked])] = "val"
    return parts


def with_new(old: Exemplars, adapted: Adapted, prepared: Prepared, known: int, memory: int) -> Exemplars:
    """The memory, and the new classes': herded from what was trained on, and some that were not."""
    dataset, fitted = prepared.dataset, adapted.fitted
    new = fitted.labels.numpy() >= known
    features, labels = fitted.features.numpy()[new], fitted.labels.numpy()[new]
    learnt = dataset.subset(fitted.rows[new][remembered(features, labels, memory - memory // HELD)])
    val = adapted.held_out.rows
    val = val[dataset.labels[val] >= known]
    held = first(dataset.subset(val), max(1, memory // HELD))

    def both_of(a: Dataset, b: Dataset) -> Dataset:
        return join("memory", [(a, "train"), (b, "train")], dataset.classes)

    return Exemplars(both_of(old.learn, learnt), both_of(old.held, held))


def measured(bundle: Bundle, adapted: Adapted, prepared: Prepared, device: str) -> dict[str, Any]:
    """How far the answers to old test images moved, and how well old and new ones are answered."""
    known, dataset, rows = len(bundle.classes), prepared.dataset, adapted.test.rows
    ours = rows[dataset.labels[rows] < known]
    if not len(ours):
        return {
            "moved": None,
            **kept_and_learnt(None, adapted.test.logits, adapted.test.labels, dataset.classes, known),
        }
    before, after = both(bundle.model.classifier, adapted.classifier, dataset, ours, bundle.preprocessing, device)
    return {
        "moved": {"n": len(ours), **drift(before, after)},
        **kept_and_learnt(
            (before, torch.from_numpy(dataset.labels[ours])), adapted.test.logits, adapted.test.labels, dataset.classes,
            known,
        ),
    }  # fmt: skip
