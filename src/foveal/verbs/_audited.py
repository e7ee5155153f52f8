"""A Bundle and images -> an attack that learns from some, measured on others, and the folder that tells of it."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from foveal.backbones.pair import state_hash
from foveal.core import catalogue
from foveal.core.bundle import atomic_folder, read_json, write_json
from foveal.core.errors import DataError, FovealError, UsageError
from foveal.core.families.robust import Perturbation, Robust
from foveal.core.folders import claim
from foveal.core.options import options_to_dict
from foveal.core.progress import Progress
from foveal.core.seeds import derive, generator, seed_everything
from foveal.data.dataset import Dataset
from foveal.data.open import open_dataset
from foveal.evaluate.attack import Ask, answers, figures, sweep
from foveal.evaluate.audited import amplified, verdict, write_audit
from foveal.evaluate.corruptions import CORRUPTIONS, STRENGTHS
from foveal.features.stream import stream_pixels
from foveal.ship.audit import ask_of, encoder_of
from foveal.ship.bundle import Bundle, load_classifier
from foveal.train.loop import train
from foveal.train.unlabelled import UnitImages
from foveal.verbs._adapt import report_event
from foveal.verbs._known import check_knows, own_split
from foveal.verbs._prepare import check_choices
from foveal.verbs.reproduce import versions

RECORD = "audit.json"
EXAMPLES = 6


@dataclass(frozen=True)
class Judged:
    """The images of an audit: those the attack learns from, and those it is measured on, with their labels."""

    dataset: Dataset
    learn: np.ndarray
    measure: np.ndarray
    pixels: np.ndarray
    labels: np.ndarray
    about: str


def audited(
    path: Path,
    data: str,
    choice: str,
    *,
    out: Path,
    images: int,
    seed: int,
    offline: bool,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """Attack, measure and write; returns what audit.json holds.

    Raises:
        UsageError: a method that does not attack, too few images asked for, or `out` holds something else.
        DataError: classes the Bundle does not know, or too few images that can be decoded.
        FovealError: the method changed the network.
    """
    start = time.perf_counter()
    check_choices(device=device)
    method = chosen(choice)
    if images < 2:
        raise UsageError(f"--images {images}: expected at least 2, for the attack compares images")
    check_free(out)
    bundle = load_classifier(path, offline=offline)
    judged = choose_images(bundle, data, images, seed, offline=offline, device=device, progress=progress)
    before = state_hash(bundle.model)
    attack = learnt(method, bundle, judged, out, seed, device=device, progress=progress)
    if state_hash(bundle.model) != before:
        raise FovealError(f"{method.name} changed the network it attacks: what was measured would mean nothing")
    ask = ask_of(bundle, device)
    found = sweep(
        ask, judged.pixels, judged.labels, attack,
        seed=seed, progress=lambda done, total: progress.update("measuring", done, total),
    )  # fmt: skip
    found["corruptions"] = corrupted(ask, judged, seed, progress)
    shown = examples(bundle, ask, judged, attack)
    content = {
        "folder": str(out),
        "bundle": str(path),
        "bundle_fingerprint": bundle.fingerprint,
        "method": method.name,
        "options": options_to_dict(method.options),
        "measured": judged.about,
        "learnt": f"{len(judged.learn)} other images of {judged.dataset.name}, without labels",
        "seed": seed,
        "found": found,
        "verdict": verdict(found)["text"],
        "examples": [{key: each[key] for key in ("name", "said", "then", "files")} for each in shown],
        "foveal": versions(),
        "seconds": round(time.perf_counter() - start, 2),
    }
    with atomic_folder(out) as folder:
        tensors = {name: tensor.contiguous() for name, tensor in attack.state_dict().items()}
        save_file(tensors, folder / "perturbation.safetensors")
        Image.fromarray(amplified(attack.delta.numpy())).save(folder / "perturbation.png")
        for each in shown:
            for kind, name in zip(("clean", "attacked"), each["files"], strict=True):
                Image.fromarray(each[kind]).save(folder / name)
        write_json(folder / RECORD, content)
        context = {key: content[key] for key in ("bundle", "method", "measured", "learnt", "seed", "seconds")}
        context["method"] = choice
        write_audit(folder / "index.html", found, shown, context)
    shutil.rmtree(out.with_name(out.name + ".work"), ignore_errors=True)
    return content


def chosen(choice: str) -> Robust:
    method = catalogue.create(choice)
    if not isinstance(method, Robust):
        able = " or ".join(catalogue.names("robust"))
        raise UsageError(
            f"{method.name} is a method of family {method.spec.family}: expected one that attacks or examines, {able}"
        )
    return method


def check_free(out: Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        read_json(out / RECORD)["found"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"--out {out} exists and holds no audit: choose another --out") from None


def choose_images(
    bundle: Bundle, data: str, images: int, seed: int, *, offline: bool, device: str, progress: Progress
) -> Judged:
    """Up to `images` to learn from and as many others to measure on: by the Bundle's own split on the data it was
    fitted on, by the data's own where they have one, else by halves drawn by seed."""
    own = own_split(bundle, data, offline=offline, device=device, progress=progress)
    if own:
        dataset, splits = own[0].dataset, own[1]
        measure, learn = np.flatnonzero(splits == "test"), np.flatnonzero(splits != "test")
        about = f"images of {dataset.name} that were held out when the Bundle was fitted"
    else:
        dataset = open_dataset(data, offline=offline)
        held = [] if dataset.splits is None else [name for name in ("test", "val") if (dataset.splits == name).any()]
        if held and dataset.splits is not None and (dataset.splits == "train").any():
            measure, learn = np.flatnonzero(dataset.splits == held[0]), np.flatnonzero(dataset.splits == "train")
            about = f"images of {dataset.name}, split {held[0]}"
        else:
            order = generator(seed, "audit halves").permutation(len(dataset))
            measure, learn = np.sort(order[::2]), np.sort(order[1::2])
            about = f"one half of {dataset.name}, drawn by seed"
    check_knows(bundle, dataset)
    rng = generator(seed, "audit")
    measure, learn = (np.sort(rng.permutation(rows)[:images]) for rows in (measure, learn))
    pixels, measure = readable(dataset, measure, bundle)
    _, learn = readable(dataset, learn, bundle)
    if len(learn) < 2 or not len(measure):
        raise DataError(
            f"{dataset.name} has {len(learn)} images for the attack to learn from and {len(measure)} others to measure "
            "on that can be decoded: expected at least 2 and 1"
        )
    return Judged(
        dataset, learn, measure, pixels, bundle.labels_of(dataset, measure).astype(bool_or_int(bundle)), about
    )


def bool_or_int(bundle: Bundle) -> type:
    return np.int64 if bundle.task == "single-label" else np.bool_


def readable(dataset: Dataset, rows: np.ndarray, bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [n, S, S, 3] of the rows that can be decoded, and these rows."""
    errors: dict[int, str] = {}
    parts = [part for _, part in stream_pixels(dataset.subset(rows), bundle.preprocessing, errors)]
    size = bundle.preprocessing.size
    pixels = np.concatenate(parts) if parts else np.zeros((0, size, size, 3), np.uint8)
    return pixels, np.delete(rows, list(errors))


def learnt(
    method: Robust, bundle: Bundle, judged: Judged, out: Path, seed: int, *, device: str, progress: Progress
) -> Perturbation:
    """What the method's attack became on the images to learn from. Goes on where a stopped run was."""
    work = out.with_name(out.name + ".work")
    _held = claim(work)
    write_json(work / "request.json", {"bundle": str(bundle.path), "method": method.name})
    encoder = encoder_of(bundle, device)
    seed_everything(derive(seed, "attack"))
    attack = method.attack(encoder, bundle.preprocessing.size)
    return train(
        method, attack, UnitImages(judged.dataset, judged.learn, bundle.preprocessing), seed,
        recipe=method.recipe(), device=device, work=work,
        on_event=lambda event: report_event(event, method.name, progress),
    ).model  # fmt: skip


def corrupted(ask: Ask, judged: Judged, seed: int, progress: Progress) -> dict[str, list[dict[str, float]]]:
    """Figures of each kind of ordinary damage at each strength."""
    import torch

    clean, _ = answers(ask, judged.pixels)
    found: dict[str, list[dict[str, float]]] = {}
    for place, (name, corrupt) in enumerate(CORRUPTIONS.items()):
        found[name] = []
        for strength in STRENGTHS:
            rng = generator(seed, "corruption", name, strength)
            damaged = np.stack([corrupt(each, strength, rng) for each in judged.pixels])
            said, unknown = answers(ask, damaged)
            found[name].append({"strength": strength, **figures(clean, said, unknown, torch.from_numpy(judged.labels))})
        progress.update("damaging", place + 1, len(CORRUPTIONS))
    return found


def examples(bundle: Bundle, ask: Ask, judged: Judged, attack: Perturbation) -> list[dict[str, Any]]:
    """The first images whose answer the attack alters, as they were and as they became."""
    import torch

    before, odd_before = answers(ask, judged.pixels)
    after, odd_after = answers(ask, judged.pixels, attack)
    altered = (before != after) if before.ndim == 1 else (before != after).any(1)
    shown: list[dict[str, Any]] = []
    for number, row in enumerate(torch.nonzero(altered)[:EXAMPLES, 0].tolist(), start=1):
        pixels = judged.pixels[row]
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        attacked = (attack(image)[0].permute(1, 2, 0) * 255).round().byte().numpy()
        shown.append(
            {
                "name": judged.dataset.ids[int(judged.measure[row])],
                "said": named(bundle, before[row], bool(odd_before[row])),
                "then": named(bundle, after[row], bool(odd_after[row])),
                "clean": pixels,
                "attacked": attacked,
                "change": amplified((attacked.astype(np.float32) - pixels).transpose(2, 0, 1)),
                "files": [f"example-{number}-clean.png", f"example-{number}-attacked.png"],
            }
        )
    return shown


def named(bundle: Bundle, answer: Any, unknown: bool) -> str:
    if answer.ndim:
        label = ", ".join(name for name, there in zip(bundle.classes, answer.tolist(), strict=True) if there) or "none"
    else:
        label = bundle.classes[int(answer)]
    return f"unknown (nearest: {label})" if unknown else label
