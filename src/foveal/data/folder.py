"""Folders of images: one folder per class, with or without train/ val/ test/ above."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from foveal.core.errors import DataError
from foveal.data.dataset import Dataset, Files, encode_labels, printable, unique
from foveal.data.images import EXTENSIONS

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass
class Found:
    """Image files below a folder, relative to it, sorted; what could not be used, and how many were no images."""

    paths: list[str] = field(default_factory=list)
    set_aside: list[tuple[str, str]] = field(default_factory=list)
    ignored: int = 0


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def walk(root: str) -> Found:
    """Every image file below `root`; hidden files and folders are skipped.

    A folder is entered once, however many links lead to it: real folders first, then linked ones, so a loop ends.
    """
    found = Found()
    visited: set[tuple[int, int]] = set()
    linked = [""]
    while linked:
        linked.sort(reverse=True)
        waiting = [linked.pop()]
        while waiting:
            folder = waiting.pop()
            try:
                status = os.stat(os.path.join(root, folder))
                if (status.st_dev, status.st_ino) in visited:
                    continue
                visited.add((status.st_dev, status.st_ino))
                with os.scandir(os.path.join(root, folder)) as entries:
                    listed = sorted(entries, key=lambda entry: entry.name, reverse=True)
            except OSError as error:
                found.set_aside.append((printable(folder), f"folder cannot be read ({error.strerror})"))
                continue
            for entry in listed:
                if entry.name.startswith((".", "__MACOSX")):
                    continue
                path = os.path.join(folder, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(path)
                elif _links_to_folder(entry):
                    linked.append(path)
                elif not is_image(entry.name):
                    found.ignored += 1
                elif not _is_file(entry):
                    found.set_aside.append((printable(path), "not a file, or a link to one that is missing"))
                else:
                    found.paths.append(path)
    found.paths.sort()
    found.set_aside.sort()
    return found


def _links_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def open_folder(folder: Path) -> Dataset:
    """A folder of class folders, or of train/ val/ test/ folders that hold class folders.

    Raises:
        DataError: no images, images without class folders, or splits mixed with class folders.
    """
    found = walk(os.fspath(folder))
    if not found.paths:
        raise DataError(
            f"{printable(str(folder))} holds no images ({found.ignored} other files): "
            "expected one folder of images per class"
        )
    parts = [path.split(os.sep) for path in found.paths]
    depth, splits = _layout(folder, parts)
    labelled = [row for row, path in enumerate(parts) if len(path) > depth + 1]
    stray = [
        (printable(path), "not in a class folder")
        for path, own in zip(found.paths, parts, strict=True)
        if len(own) <= depth + 1
    ]
    labels, classes = encode_labels([[printable(parts[row][depth])] for row in labelled], "single-label")
    paths = [found.paths[row] for row in labelled]
    return Dataset(
        name=printable(folder.resolve().name),
        ids=unique([printable(path.replace(os.sep, "/")) for path in paths]),
        labels=labels,
        classes=classes,
        task="single-label",
        splits=np.array([splits[parts[row][0]] for row in labelled]) if splits else None,
        source=Files(os.fspath(folder.absolute()), paths),
        set_aside=tuple(found.set_aside + stray),
        ignored=found.ignored,
    )


def _layout(folder: Path, parts: Sequence[Sequence[str]]) -> tuple[int, dict[str, str]]:
    """How deep the class folders lie, and which top folder is which split (none if the folder is not split)."""
    tops = Counter(path[0] for path in parts if len(path) > 1)
    name = printable(str(folder))
    if not tops:
        raise DataError(
            f"{name} holds {len(parts)} images but no class folders: expected one folder of images per class, "
            "or a CSV with columns image,label"
        )
    splits = {top: SPLIT_NAMES[top.lower()] for top in tops if top.lower() in SPLIT_NAMES}
    others = sorted(set(tops) - set(splits))
    nested = {path[0] for path in parts if len(path) > 2 and path[0] in splits}
    if "train" not in splits.values() and others:
        return 0, {}
    if splits and not others and nested:
        return 1, splits
    if len(splits) < 2:  # a class that happens to be called 'train'
        return 0, {}
    if others:
        raise DataError(
            f"{name} holds {', '.join(sorted(map(printable, splits)))} beside {', '.join(map(printable, others[:3]))}: "
            "expected class folders, or only train/ val/ test/ folders with class folders inside"
        )
    raise DataError(
        f"{name} holds {', '.join(sorted(map(printable, splits)))} with images but without class folders: "
        "expected one folder per class inside each"
    )
