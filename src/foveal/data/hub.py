"""Data sets of the Hugging Face Hub, through the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from foveal.core.errors import DataError, MissingExtra
from foveal.data.dataset import Dataset, inside, read_file
from foveal.data.folder import SPLIT_NAMES
from foveal.data.table import Table, assemble


def open_hub(name: str, *, offline: bool = False) -> Dataset:
    """hub:owner/name. Offline, only what the Hugging Face cache holds is used.

    Raises:
        MissingExtra: `datasets` is not installed.
        DataError: no such data set, not in the cache while offline, or no image and label columns.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "hub", f"hub:{name}") from None
    if name.count("/") != 1 or not all(name.split("/")):
        raise DataError(f"hub:{name}: expected hub:owner/name")
    try:
        with no_network(datasets) if offline else nullcontext():
            loaded = datasets.load_dataset(name)
    except Exception as error:  # the library raises errors of its own, of the Hub's client and of the network
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if offline:
            raise DataError(
                f"hub:{name} is not in the Hugging Face cache: run once without --offline ({reason})"
            ) from None
        raise DataError(f"hub:{name} cannot be loaded ({reason}): check the name and the network") from None
    parts: dict[str, Any] = (
        {str(part): rows for part, rows in loaded.items()} if isinstance(loaded, Mapping) else {"train": loaded}
    )
    return from_datasets(name, parts)


@contextmanager
def no_network(datasets: Any) -> Iterator[None]:
    """`datasets` and the Hub's client answer from the cache alone."""
    import huggingface_hub.constants as hub

    before = datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before


@dataclass(frozen=True, eq=False)
class Columns:
    """Image columns of the parts of a data set, undecoded; image i is row `row[i]` of part `part[i]`."""

    parts: list[Any]
    column: str
    part: np.ndarray
    row: np.ndarray

    def read(self, index: int) -> bytes:
        image = self.parts[int(self.part[index])][int(self.row[index])][self.column]
        if image and image.get("bytes") is not None:
            return image["bytes"]
        if image and image.get("path"):
            if not inside(image["path"], cache_folders()):
                raise DataError("its path leads out of the Hugging Face cache")
            return read_file(image["path"])
        raise DataError("no image in this row")


def cache_folders() -> list[str]:
    """Where `datasets` and the Hub's client put what they download: all that a data set of the Hub may point to."""
    import datasets
    import huggingface_hub.constants as hub

    config: Any = datasets.config  # pyright: ignore[reportAttributeAccessIssue]
    return [str(config.HF_DATASETS_CACHE), str(config.DOWNLOADED_DATASETS_PATH), hub.HF_HUB_CACHE]


def from_datasets(name: str, loaded: Mapping[str, Any]) -> Dataset:
    """A Dataset of `datasets.Dataset` parts; parts called train, validation and test become the split.

    Raises:
        DataError: no image column or no label column.
    """
    import datasets

    splits = {part: SPLIT_NAMES[part] for part in loaded if part in SPLIT_NAMES}
    chosen = splits or dict.fromkeys(loaded, "train")
    first = loaded[next(iter(chosen))]
    features: Mapping[str, Any] = first.features
    image = next((column for column, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = label_column(features, datasets)
    if image is None or label is None:
        listed = ", ".join(f"{column} ({type(kind).__name__})" for column, kind in features.items())
        raise DataError(f"hub:{name} has columns {listed}: expected an image column and a label column")
    parts = [loaded[part].cast_column(image, datasets.Image(decode=False)).select_columns([image]) for part in chosen]
    table = Table(f"hub:{name}", [], [], [], [])
    ids: list[str] = []
    for part in chosen:
        table.label += texts(loaded[part][label], features[label])
        ids += [f"{part}/{row:07d}" for row in range(len(loaded[part]))]
        table.split += [chosen[part]] * len(loaded[part])
    table.where = ids
    if len(set(table.split)) < 2:
        table.split = []
    sizes = [len(part) for part in parts]
    source = Columns(
        parts, image, np.repeat(np.arange(len(parts)), sizes), np.concatenate([np.arange(size) for size in sizes])
    )
    return assemble(table, ids, source, {})


def label_column(features: Mapping[str, Any], datasets: Any) -> str | None:
    """A column called label or labels, else the only ClassLabel."""
    for column in ("label", "labels"):
        if column in features:
            return column
    of_classes = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    return of_classes[0] if len(of_classes) == 1 else None


def texts(values: Any, kind: Any) -> list[Any]:
    """Labels as text, or lists of text where an image has several."""
    names = getattr(kind, "names", None) or getattr(getattr(kind, "feature", None), "names", None)

    def text(value: Any) -> str:
        if value is None or (isinstance(value, int) and value < 0):
            return ""
        return names[value] if names and isinstance(value, int) else str(value)

    return [[text(one) for one in value] if isinstance(value, list) else text(value) for value in values]
