"""The data sets that installed packages ship, read where they lie: no download, no unpacking."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveal.core.errors import DataError, MissingExtra
from foveal.data.dataset import Dataset, Files, Memory, encode_labels
from foveal.data.folder import open_folder


@dataclass(frozen=True)
class Sample:
    """A data set inside a package: how it is opened, and the row `samples()` shows of it."""

    module: str
    package: str
    images: int
    classes: tuple[str, ...]
    licence: str
    open: Callable[[str, str], Dataset]


def folder_of(module: str, package: str, name: str) -> str:
    """Where an installed package lies, without importing it.

    Raises:
        MissingExtra: it is not installed.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(package, "samples", f"sample:{name}")
    return spec.submodule_search_locations[0]


def open_elpv(folder: str, name: str) -> Dataset:
    """Electroluminescence photos of solar cells: labels.csv holds path, probability of a defect, type."""
    root = os.path.join(folder, "data")
    with open(os.path.join(root, "labels.csv"), encoding="ascii") as file:
        rows = sorted(line.split() for line in file if line.strip())
    if name == "elpv":
        names = [["defective" if float(probability) >= 0.5 else "functional"] for _, probability, _ in rows]
    else:
        names = [[kind] for _, _, kind in rows]
    labels, classes = encode_labels(names, "single-label")
    paths = [path for path, _, _ in rows]
    return Dataset(name, paths, labels, classes, "single-label", None, Files(root, paths))


def open_textile(folder: str, name: str) -> Dataset:
    """Simulated woven fabric.

    File numbers repeat across classes (global/textile_0001.jpg, local/textile_0001.jpg) but pictures do not: every
    image is a weave of its own, the highest pixel correlation of any two is 0.19, so none need to be kept together.
    """
    dataset = open_folder(Path(folder, "data", "textile_images", "simulated"))
    return Dataset(name, dataset.ids, dataset.labels, dataset.classes, dataset.task, None, dataset.source)


def open_digits(folder: str, name: str) -> Dataset:
    """Handwritten digits, 8 x 8 pixels of 0 to 16, as PNG files of 32 x 32 in memory."""
    path = os.path.join(folder, "datasets", "data", "digits.csv.gz")
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    pixels = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    labels, classes = encode_labels([[str(digit)] for digit in table[:, -1]], "single-label")
    ids = [f"digit-{row:04d}.png" for row in range(len(table))]
    return Dataset(name, ids, labels, classes, "single-label", None, Memory([png(image) for image in pixels]))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


SAMPLES = {
    "elpv": Sample("elpv_dataset", "elpv-dataset", 2624, ("defective", "functional"), "CC BY-NC-SA 4.0", open_elpv),
    "elpv-type": Sample("elpv_dataset", "elpv-dataset", 2624, ("mono", "poly"), "CC BY-NC-SA 4.0", open_elpv),
    "textile": Sample(
        "conformal_clip_data", "conformal-clip-data", 2000, ("global", "local", "nominal"), "MIT", open_textile
    ),
    "digits": Sample(
        "sklearn", "scikit-learn", 1797, tuple("0123456789"), "BSD 3-Clause (UCI digits: CC BY 4.0)", open_digits
    ),
}


def open_sample(name: str) -> Dataset:
    """The sample data set of that name.

    Raises:
        DataError: no such sample.
        MissingExtra: the package that ships it is not installed.
    """
    if name not in SAMPLES:
        raise DataError(
            f"sample:{name} is unknown: expected one of {', '.join('sample:' + known for known in SAMPLES)}"
        )
    sample = SAMPLES[name]
    return sample.open(folder_of(sample.module, sample.package, name), name)


def samples() -> list[dict[str, Any]]:
    """One row per sample: name, images, classes, licence, installed."""
    return [
        {
            "name": name,
            "images": sample.images,
            "classes": list(sample.classes),
            "licence": sample.licence,
            "installed": find_spec(sample.module) is not None,
        }
        for name, sample in SAMPLES.items()
    ]
