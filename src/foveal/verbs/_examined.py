"""A Bundle and images, labelled or not -> what a look inside the network finds, and the folder that tells of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from foveal.backbones.pair import state_hash
from foveal.backbones.wrapper import OpenModel
from foveal.core.bundle import atomic_folder, write_json
from foveal.core.errors import DataError, FovealError, UsageError
from foveal.core.families.robust import Robust
from foveal.core.options import options_to_dict
from foveal.core.progress import Progress
from foveal.core.seeds import generator, seed_everything
from foveal.data.dataset import Dataset
from foveal.evaluate.examined import write_examined
from foveal.features.session import pick_device
from foveal.ship.bundle import Bundle, load_classifier
from foveal.verbs._audited import RECORD, check_free, readable
from foveal.verbs._known import own_split
from foveal.verbs._prepare import check_choices
from foveal.verbs._pretrained import open_unlabelled
from foveal.verbs.reproduce import versions


def examined(
    method: Robust,
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
    """Look and write; returns what audit.json holds.

    Raises:
        UsageError: no image asked for, or `out` holds something else.
        DataError: no image can be decoded.
        FovealError: the method changed the network.
    """
    start = time.perf_counter()
    check_choices(device=device)
    if images < 1:
        raise UsageError(f"--images {images}: expected at least 1")
    check_free(out)
    bundle = load_classifier(path, offline=offline)
    dataset, about = free_images(bundle, data, offline=offline, device=device, progress=progress)
    rows = np.sort(generator(seed, "examination").permutation(len(dataset))[:images])
    pixels, rows = readable(dataset, rows, bundle)
    if not len(rows):
        raise DataError(f"no image of {dataset.name} can be decoded: run `foveal check` on it")
    before = state_hash(bundle.model)
    classifier = bundle.model.classifier.to(pick_device(device))
    model = OpenModel(classifier, bundle.preprocessing)
    seed_everything(seed)
    progress.update("looking", 0, 1)
    found = method.examine(model, torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, seed)
    progress.update("looking", 1, 1)
    if state_hash(bundle.model) != before:
        raise FovealError(f"{method.name} changed the network it looks into: what was measured would mean nothing")
    pictures = [each for section in found.sections for each in section.pictures.items()]
    files = {f"picture-{number}.png": caption for number, (caption, _) in enumerate(pictures, start=1)}
    content = {
        "folder": str(out),
        "bundle": str(path),
        "bundle_fingerprint": bundle.fingerprint,
        "method": method.name,
        "options": options_to_dict(method.options),
        "examined": f"{len(rows)} {about}, without labels",
        "seed": seed,
        "found": dict(found.numbers),
        "verdict": found.verdict,
        "findings": list(found.findings),
        "pictures": files,
        "foveal": versions(),
        "seconds": round(time.perf_counter() - start, 2),
    }
    with atomic_folder(out) as folder:
        tensors = {name: tensor.contiguous() for name, tensor in found.tensors.items()}
        save_file(tensors, folder / "tensors.safetensors")
        for name, (_, each) in zip(files, pictures, strict=True):
            Image.fromarray(each).save(folder / name)
        write_json(folder / RECORD, content)
        context = {key: content[key] for key in ("bundle", "method", "examined", "seed", "seconds")}
        write_examined(folder / "index.html", found, {**context, "method": choice})
    return content


def free_images(bundle: Bundle, data: str, *, offline: bool, device: str, progress: Progress) -> tuple[Dataset, str]:
    """The images of DATA but for those held out when the Bundle was fitted on it, or that DATA calls 'test'."""
    own = own_split(bundle, data, offline=offline, device=device, progress=progress)
    if own:
        dataset = own[0].dataset
        return dataset.subset(own[1] != "test"), f"images of {dataset.name} that were not held out"
    dataset, _ = open_unlabelled(data, offline=offline)
    return dataset, f"images of {dataset.name}"
