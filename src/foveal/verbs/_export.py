"""A Bundle's model as ONNX, checked on real images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveal.core.bundle import write_json
from foveal.core.errors import DataError, UsageError
from foveal.core.folders import atomic_file
from foveal.core.progress import Progress
from foveal.data.open import open_dataset, open_images
from foveal.ship.bundle import Bundle, load
from foveal.ship.export import export_onnx
from foveal.ship.hub import own_copy

CHECKED = 16


def export_bundle(path: Path, images: Path | None, progress: Progress) -> dict[str, Any]:
    """Write model.onnx into the Bundle and its parity into cost.json; on failure the Bundle is as it was.

    Raises:
        UsageError: no images to check parity on.
        FovealError: the exported model does not answer as the torch model.
    """
    bundle = load(own_copy(path, progress))
    pictures = parity_images(bundle, images)
    target = bundle.path / "model.onnx"
    with atomic_file(target) as staging:
        record = export_onnx(
            bundle.model,
            bundle.preprocessing,
            staging,
            images=pictures,
            classes=bundle.classes,
            threshold=bundle.threshold,
        )
    record["path"] = str(target)
    with atomic_file(bundle.path / "cost.json") as staging:
        write_json(staging, {**bundle.cost, "onnx": {key: value for key, value in record.items() if key != "path"}})
    progress.say(f"{target}: {target.stat().st_size / 2**20:.1f} MiB")
    return record


def parity_images(bundle: Bundle, images: Path | None) -> list[Image.Image]:
    """Up to CHECKED images, spread over the given folder or over the data the Bundle was fitted on."""
    if images is not None:
        dataset = open_images([images])
    else:
        try:
            dataset = open_dataset(bundle.manifest["data"]["source"], offline=True)
        except Exception as error:
            raise UsageError(
                f"the images that {bundle.path} was fitted on are not here any more ({error}): "
                "name a folder of images with --images, to check the exported model on"
            ) from None
    found: list[Image.Image] = []
    for index in np.linspace(0, len(dataset) - 1, min(4 * CHECKED, len(dataset))).astype(int):
        try:
            found.append(dataset.image(int(index)))
        except DataError:
            continue
        if len(found) == CHECKED:
            break
    if not found:
        raise UsageError(f"none of the images of {dataset.name} can be decoded: name others with --images")
    return found
