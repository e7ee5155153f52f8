"""DATA, in any of its forms -> one Dataset."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from foveal.core.errors import DataError
from foveal.data.dataset import Dataset, Files, printable, read_file, unique
from foveal.data.folder import open_folder, walk
from foveal.data.images import to_rgb, upright

FORMS = (
    "a folder of class folders, a folder with train/ val/ test/, a .csv or .parquet with columns image,label[,split], "
    "a .tar or pattern such as shard-{000..003}.tar, hub:owner/name, or sample:NAME"
)


def open_dataset(data: str | Path | Dataset, *, offline: bool = False) -> Dataset:
    """Open labelled images of any form (FORMS). Nothing is decoded and no image is kept in memory.

    Raises:
        DataError: what came, what was expected and what to do.
        MissingExtra: a form needs a library that is not installed.
    """
    if isinstance(data, Dataset):
        return data
    text = os.fspath(data)
    if not text.strip():
        raise DataError(f"DATA is empty: expected {FORMS}")
    kind, _, name = text.partition(":")
    if kind == "sample":
        from foveal.data.samples import open_sample

        return open_sample(name)
    if kind == "hub":
        from foveal.data.hub import open_hub

        return open_hub(name, offline=offline)
    if text.lower().endswith(".tar") and not os.path.isdir(text):
        from foveal.data.shards import open_shards

        return open_shards(text)
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        return open_folder(path)
    if not os.path.exists(path):
        raise DataError(f"{printable(text)} does not exist: expected {FORMS}")
    from foveal.data.table import open_csv, open_parquet

    if path.suffix.lower() == ".csv":
        return open_csv(path)
    if path.suffix.lower() in (".parquet", ".pq"):
        return open_parquet(path)
    raise DataError(f"{printable(text)} is not a form of DATA: expected {FORMS}")


def open_pool(data: str | Path | Dataset, *, offline: bool = False) -> Dataset:
    """As `open_dataset`, and images without labels: in a folder that has no folders, in a Parquet file of paths.

    Without labels `classes` is empty and every label 0.

    Raises:
        DataError: as `open_dataset`.
    """
    path = "" if isinstance(data, Dataset) else os.path.expanduser(os.fspath(data))
    if os.path.isdir(path) and not has_folders(path):
        found = walk(path)
        if not found.paths:
            raise DataError(f"{printable(path)} holds no images ({found.ignored} other files)")
        return Dataset(
            name=printable(Path(path).resolve().name),
            ids=unique([printable(name) for name in found.paths]),
            labels=np.zeros(len(found.paths), np.int64),
            classes=(),
            task="single-label",
            splits=None,
            source=Files(os.path.abspath(path), found.paths),
            set_aside=tuple(found.set_aside),
            ignored=found.ignored,
        )
    if path.lower().endswith((".parquet", ".pq")) and os.path.isfile(path):
        from foveal.data.table import open_parquet

        return open_parquet(Path(path), labelled=False)
    return open_dataset(data, offline=offline)


def has_folders(path: str) -> bool:
    with os.scandir(path) as entries:
        return any(entry.is_dir() and not entry.name.startswith((".", "__MACOSX")) for entry in entries)


def open_images(images: Sequence[str | Path | Image.Image | np.ndarray]) -> Dataset:
    """Unlabelled images, for prediction: files, every image below folders, PIL images, uint8 arrays [H, W(, 3)].

    Labels are all 0 and `classes` is empty. A file that cannot be read keeps its row; reading it raises.

    Raises:
        DataError: no image at all.
    """
    items: list[str | Image.Image] = []
    ids: list[str] = []
    aside: list[tuple[str, str]] = []
    for given in images:
        if isinstance(given, str | Path):
            path, inner = os.fspath(given), [""]
            if os.path.isdir(path):
                found = walk(path)
                inner = found.paths
                aside += [(os.path.join(printable(path), name), reason) for name, reason in found.set_aside]
                if not inner:
                    aside.append((printable(path), f"a folder without images ({found.ignored} other files)"))
            items += [os.path.join(path, name) if name else path for name in inner]
            ids += [printable(item) for item in items[len(ids) :] if isinstance(item, str)]
        else:
            items.append(as_image(given))
            ids.append(f"image-{len(ids):04d}")
    if not items:
        reason = f" ({aside[0][0]}: {aside[0][1]})" if aside else ""
        raise DataError(f"no images given{reason}: give image files, or folders that hold some")
    return Dataset(
        name=ids[0],
        ids=unique(ids),
        labels=np.zeros(len(items), np.int64),
        classes=(),
        task="single-label",
        splits=None,
        source=Given(items),
        set_aside=tuple(aside),
    )


def as_image(given: Image.Image | np.ndarray) -> Image.Image:
    """An upright PIL image, loaded, of a PIL image or a uint8 array.

    Raises:
        DataError: another type or shape, or a PIL image that is truncated.
    """
    if isinstance(given, Image.Image):
        try:
            given.load()
        except Exception as error:  # decoders meet damaged bytes with errors of any type
            raise DataError(f"an image came as a PIL image that cannot be loaded ({error})") from None
        return upright(given)
    what = type(given).__name__
    if isinstance(given, np.ndarray):
        if given.dtype == np.uint8 and given.size and (given.ndim == 2 or given.shape[2:] in ((3,), (4,))):
            return Image.fromarray(given)
        what = f"{given.dtype} array {given.shape}"
    raise DataError(f"an image came as {what}: expected a path, a PIL image or a uint8 array [H, W, 3]")


@dataclass(frozen=True, eq=False)
class Given:
    """Paths, and pictures that are in memory already."""

    items: Sequence[str | Image.Image]

    def read(self, index: int) -> bytes:
        item = self.items[index]
        if isinstance(item, str):
            return read_file(item)
        buffer = io.BytesIO()
        if item.mode in ("I", "F"):
            item.save(buffer, "TIFF")
        else:
            lossless = item.mode in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")
            (item if lossless else to_rgb(item)).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
