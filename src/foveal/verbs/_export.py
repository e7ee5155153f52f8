"""A Bundle's model as ONNX, checked on real images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveal.core.bundle import write_json
from foveal.core.errors import DataError, FovealError, UsageError
from foveal.core.folders import atomic_file
from foveal.core.progress import Progress
from foveal.data.dataset import Dataset
from foveal.data.images import to_pixels
from foveal.data.open import open_dataset, open_images
from foveal.data.split import make_split
from foveal.data.worlds import garbage
from foveal.evaluate.exported import note_export
from foveal.features.session import cpu_threads
from foveal.ship.bundle import Bundle, load, load_classifier
from foveal.ship.export import export_onnx
from foveal.ship.export_tasks import export_clips, export_towers
from foveal.ship.hub import own_copy
from foveal.ship.image_text import ImageTextBundle
from foveal.ship.landmarks import LandmarkBundle
from foveal.ship.quantize import quantize
from foveal.ship.variants import HeldOut, compare_variants, why_no_int8
from foveal.ship.video import VideoBundle
from foveal.verbs._prepare import manifest_data, prepare

CHECKED = 16
CALIBRATING = 128
HELD_OUT = 1000
GARBAGE = 64


def export_bundle(path: Path, images: Path | None, progress: Progress, int8: bool = False) -> dict[str, Any]:
    """Write model.onnx into the Bundle and its parity into cost.json; on failure the Bundle is as it was.

    Raises:
        UsageError: no images to check parity on, a Bundle of a task that is not exported, or int8 of other than a
            classifier of images.
        FovealError: the exported model does not answer as the torch model.
    """
    bundle: Any = load(own_copy(path, progress))
    if int8 and not isinstance(bundle, Bundle):
        raise UsageError(f"{bundle.path} is for {bundle.manifest['task']}: --int8 is for classifiers of images alone")
    target = bundle.path / "model.onnx"
    with atomic_file(target) as staging:
        if isinstance(bundle, Bundle):
            record = export_onnx(
                bundle.model,
                bundle.preprocessing,
                staging,
                images=parity_images(bundle, images),
                classes=bundle.classes,
                threshold=bundle.threshold,
            )
        elif isinstance(bundle, VideoBundle):
            record = export_clips(bundle, staging, images)
        elif isinstance(bundle, ImageTextBundle):
            record = export_towers(bundle, staging, images)
        elif isinstance(bundle, LandmarkBundle):
            record = bundle.write_onnx(staging)
        else:
            raise UsageError(
                f"{bundle.path} is for {bundle.manifest['task']}: expected a Bundle that classifies images or clips, "
                "finds landmarks, or has towers for images and texts; this one answers through `foveal predict`"
            )
    record["path"] = str(target)
    onnx = {key: value for key, value in record.items() if key != "path"}
    with atomic_file(bundle.path / "cost.json") as staging:
        write_json(staging, {**bundle.cost, "onnx": onnx})
    if isinstance(bundle, Bundle):
        note_export(bundle.path, onnx)
    (bundle.path / "model.int8.onnx").unlink(missing_ok=True)  # of another export; cost.json speaks of this one
    progress.say(f"{target}: {target.stat().st_size / 2**20:.1f} MiB")
    return record


def shrink_export(path: Path, data: str | None, max_drop: float, require: bool, progress: Progress) -> dict[str, Any]:
    """Make an exported Bundle's int8 model, compare all variants, keep what is accepted and record everything.

    Returns:
        What cost.json's `onnx` gains: variants, chosen, calibrated_on, judged_on, calibration.

    Raises:
        UsageError: no labelled images of the Bundle's classes.
        FovealError: `require`, and no int8 variant was accepted; the record is written, model.onnx stays.
    """
    bundle = load_classifier(path)
    squares, calibrated_on, held_out, judged_on = labelled_images(bundle, data, progress)
    target, threads = path / "model.int8.onnx", cpu_threads()
    files = {"model.onnx": path / "model.onnx"}
    with atomic_file(target) as staging:
        progress.say(f"int8: calibrating on {calibrated_on}")
        calibration = quantize(files["model.onnx"], staging, squares, threads, bundle.codes)
        rows, chosen = compare_variants(
            {**files, target.name: staging}, held_out, max_drop=max_drop, threads=threads, say=progress.say
        )
    refusal = why_no_int8(rows)
    if refusal:
        target.unlink()
    found = {
        "variants": rows,
        "chosen": chosen,
        "calibrated_on": calibrated_on,
        "judged_on": judged_on,
        "calibration": calibration,
    }
    with atomic_file(path / "cost.json") as staging:
        write_json(staging, {**bundle.cost, "onnx": {**bundle.cost["onnx"], **found}})
    note_export(path, {**bundle.cost["onnx"], **found})
    if refusal and require:
        raise FovealError(f"no int8 variant of {path} was accepted, model.onnx stays as it was: {refusal}")
    return found


def labelled_images(bundle: Bundle, data: str | None, progress: Progress) -> tuple[list[np.ndarray], str, HeldOut, str]:
    """Squares to calibrate on and what they are; labelled squares to judge on and what they are.

    The Bundle's own data are split as at its fit, so that what judges was neither trained on nor calibrates.

    Raises:
        UsageError: the Bundle's data are gone or have changed, or `data` do not fit it.
    """
    manifest = bundle.manifest
    if data is None:
        check_whole(bundle)
        source = manifest["data"]["source"]
        try:
            prepared = prepare(source, manifest["request"]["backbone"], offline=True, progress=progress)
            splits = prepared.splits(manifest["seed"])
            same = manifest_data(prepared, splits)["fingerprint"] == manifest["data"]["fingerprint"]
        except Exception as error:
            raise UsageError(
                f"the images that {bundle.path} was fitted on are not here any more ({error}): "
                "name labelled images with --data, to calibrate and judge int8 on"
            ) from None
        if not same:
            raise UsageError(
                f"{source} is not what {bundle.path} was fitted on (images or labels have changed): "
                "name labelled images that it was not trained on with --data"
            )
        dataset, whose = prepared.dataset, f"{manifest['data']['name']}, which the fit did not see"
    else:
        dataset = open_dataset(data)
        given = dataset.splits
        splits = (
            make_split(dataset.labels, np.arange(len(dataset)), manifest["seed"], classes=dataset.classes)
            if given is None or not {"train", "test"} <= set(given.tolist())
            else given
        )
        whose = f"{dataset.name}, given with --data"
    if dataset.task != bundle.task or not set(dataset.classes) <= set(bundle.classes):
        raise UsageError(
            f"{dataset.name} is {dataset.task} with classes {', '.join(dataset.classes)}; {bundle.path} is "
            f"{bundle.task} with {', '.join(bundle.classes)}: use data of its task and classes"
        )
    calibrating, _ = squares_of(bundle, dataset, np.flatnonzero(splits == "train"), CALIBRATING)
    squares, rows = squares_of(bundle, dataset, np.flatnonzero(splits == "test"), HELD_OUT)
    if not calibrating or not squares:
        raise UsageError(f"{dataset.name} has no readable images to calibrate or to judge on: name others with --data")
    held_out = HeldOut(
        np.stack(squares), bundle.labels_of(dataset, rows), garbage(GARBAGE, bundle.preprocessing.size, 0)
    )
    return (
        calibrating,
        f"{len(calibrating)} training images of {dataset.name}",
        held_out,
        f"{len(squares)} test images of {whose}",
    )


def check_whole(bundle: Bundle) -> None:
    """
    Raises:
        UsageError: a Bundle that was updated: its data are new classes alone, beside old ones that it kept.
    """
    if "memory" in bundle.manifest:
        raise UsageError(
            f"{bundle.path} was updated, so that no one data set holds its images: name labelled images of its "
            f"classes ({', '.join(bundle.classes)}) with --data"
        )


def squares_of(bundle: Bundle, dataset: Dataset, rows: np.ndarray, most: int) -> tuple[list[np.ndarray], list[int]]:
    """Up to `most` of these images, spread evenly, as squares; and their rows. Damaged ones are left out."""
    squares: list[np.ndarray] = []
    kept: list[int] = []
    for row in rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)].tolist():
        try:
            squares.append(to_pixels(dataset.image(row), bundle.preprocessing))
        except DataError:
            continue
        kept.append(row)
    return squares, kept


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
