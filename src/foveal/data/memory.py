"""A few images of every class that a Bundle knows, kept beside its weights, so that it can learn more without the rest.

One safetensors file: the bytes of all images, where each ends, its class, and whether it is held back. Images larger
than `KEPT` bytes are kept as JPEGs no larger than a model looks at. Reading it runs no code; what it holds is decoded
like any image of a stranger.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from foveal.core.errors import BundleError
from foveal.core.preprocessing import Preprocessing
from foveal.data.dataset import Dataset, Memory, printable, unique

NAME = "memory.safetensors"
KEPT = 64 * 2**10
MOST = 2**32
"""Bytes of a memory that is read."""


@dataclass(frozen=True, eq=False)
class Exemplars:
    """`learn` in the order of their worth within each class; `held` are never trained on, and calibrate and judge."""

    learn: Dataset
    held: Dataset

    def counts(self) -> dict[str, int]:
        """Images of each class, of both kinds."""
        labels = np.concatenate([self.learn.labels, self.held.labels])
        return dict(
            zip(self.learn.classes, np.bincount(labels, minlength=len(self.learn.classes)).tolist(), strict=True)
        )


def kept(dataset: Dataset, index: int, preprocessing: Preprocessing) -> bytes:
    """The bytes of an image file, or a JPEG of the image in the size a model resizes it to."""
    content = dataset.read(index)
    if len(content) <= KEPT:
        return content
    image = dataset.image(index)
    scale = preprocessing.resized / min(image.size)
    if scale < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_exemplars(path: Path, exemplars: Exemplars, preprocessing: Preprocessing) -> None:
    """Write the file; see the top of this module."""
    parts = ((exemplars.learn, 0), (exemplars.held, 1))
    images = [kept(part, row, preprocessing) for part, _ in parts for row in range(len(part))]
    tensors = {
        "bytes": np.frombuffer(b"".join(images), np.uint8),
        "ends": np.cumsum([len(image) for image in images], dtype=np.int64),
        "label": np.concatenate([part.labels for part, _ in parts]).astype(np.int64),
        "held": np.repeat(np.array([0, 1], np.uint8), [len(part) for part, _ in parts]),
    }
    ids = unique([image for part, _ in parts for image in part.ids])
    save_file(tensors, path, {"ids": json.dumps(ids)})


def read_exemplars(path: Path, classes: tuple[str, ...]) -> Exemplars:
    """The file back again. It may come from a stranger.

    Raises:
        BundleError: not such a file, damaged, or of other classes.
    """
    try:
        if path.stat().st_size > MOST:
            raise ValueError(f"more than {MOST >> 30} GiB")
        with safe_open(path, "np") as file:
            ids = [printable(str(name)) for name in json.loads(file.metadata()["ids"])]
            content, ends, label, held = (file.get_tensor(name) for name in ("bytes", "ends", "label", "held"))
        if content.dtype != np.uint8 or any(each.shape != (len(ids),) for each in (ends, label, held)):
            raise ValueError("its tensors do not fit together")
        if any(each.dtype.kind not in "iu" for each in (ends, label, held)):
            raise ValueError("its tensors are not integers")
        starts = np.concatenate([[0], ends[:-1]])
        if len(ids) and (starts[0] != 0 or (ends < starts).any() or ends[-1] != len(content)):
            raise ValueError("an image ends outside of it")
        if len(ids) and not (label.min() >= 0 and label.max() < len(classes)):
            raise ValueError(f"a label is not one of {len(classes)} classes")
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"the memory {path} cannot be read ({error}): give old images with --old") from None
    images = [content[start:end].tobytes() for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    whole = Dataset("memory", unique(ids), label.astype(np.int64), classes, "single-label", None, Memory(images))
    return Exemplars(whole.subset(held == 0), whole.subset(held == 1))
