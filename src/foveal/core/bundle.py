"""The Bundle: a folder that holds a model and everything needed to trust it. Written whole or not at all."""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from foveal.core.errors import BundleError
from foveal.core.folders import unwritable
from foveal.core.schema import faults, read_json
from foveal.core.task import OTHER_TASKS

__all__ = ["FORMAT", "BundleFiles", "atomic_folder", "open_bundle", "read_json", "seal", "sha256", "write_json"]

FORMAT = 1
REQUIRED = ("bundle.json", "model.safetensors", "calibration.json", "metrics.json", "cost.json")
PROTECTED = ("model.safetensors", "calibration.json", "metrics.json")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """fsync a file or folder, so that a rename that follows cannot overtake its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def exchange(first: Path, second: Path) -> None:
    """Swap two folders in one step where the kernel can (Linux renameat2), else in two."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    here, exchange_flag = -100, 2
    if swap is not None and swap(here, os.fsencode(first), here, os.fsencode(second), exchange_flag) == 0:
        return
    aside = first.with_name(first.name + ".old")
    second.rename(aside)
    first.rename(second)
    aside.rename(first)


@contextmanager
def atomic_folder(target: Path) -> Generator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well.

    A crash leaves the old folder or the new one, never half. On an error the temporary folder is removed.

    Raises:
        FovealError: no space left on the device, or the folder cannot be written.
    """
    target = Path(os.path.realpath(target))
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left_over in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
            writer = left_over.name.split(".")[-2]
            if writer.isdecimal() and left_over.name == f".{target.name}.{writer}.tmp" and not running(int(writer)):
                shutil.rmtree(left_over, ignore_errors=True)
        staging.mkdir()
        yield staging
        for file in sorted(staging.rglob("*")):
            sync(file)
        sync(staging)
        if target.exists():
            exchange(staging, target)
        else:
            staging.rename(target)
        sync(target.parent)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@dataclass(frozen=True)
class BundleFiles:
    """The readable parts of a Bundle folder, verified."""

    path: Path
    manifest: dict[str, Any]
    calibration: dict[str, Any]
    metrics: dict[str, Any]
    cost: dict[str, Any]


def seal(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write bundle.json last, with the SHA-256 of the files that must not change."""
    hashes = {name: sha256(folder / name) for name in PROTECTED if (folder / name).exists()}
    write_json(folder / "bundle.json", {"format": FORMAT, **manifest, "sha256": hashes})


def open_bundle(path: str | Path, *, any_task: bool = False) -> BundleFiles:
    """Read and verify a Bundle folder. Only files of the names above are opened, whatever the Bundle says.

    The hashes find damage and edits by hand. They prove nothing about who made the Bundle.

    Args:
        any_task: take a Bundle for any task, rather than for classifying images alone. Those for other tasks may lack
            calibration.json.

    Raises:
        BundleError: not a Bundle, a file is missing, was edited or says something that no Bundle says, the format is
            newer than this version, or the task is another.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a Bundle: expected a folder made by `foveal fit`")
    absent = [name for name in REQUIRED if not (folder / name).is_file()]
    if len(absent) == len(REQUIRED):
        raise BundleError(f"{folder} is not a Bundle (no bundle.json): expected a folder made by `foveal fit`")
    try:
        parts = {name: read_json(folder / name) for name in REQUIRED if name.endswith(".json") and name not in absent}
        found = {name: sha256(folder / name) for name in PROTECTED if name not in absent}
    except ValueError as error:
        raise BundleError(
            f"Bundle {folder} has an unreadable JSON file ({error}): restore the folder or fit again"
        ) from None
    except OSError as error:
        raise BundleError(f"Bundle {folder} cannot be read ({error.strerror}): check who may read it") from None
    manifest = cast("dict[str, Any]", parts.get("bundle.json") if isinstance(parts.get("bundle.json"), dict) else {})
    task = str(manifest.get("task"))
    if missing := [name for name in absent if not (task in OTHER_TASKS and name == "calibration.json")]:
        raise BundleError(f"Bundle {folder} lacks {', '.join(missing)}: restore the folder or fit again")
    version = manifest.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise BundleError(
            f"Bundle {folder} has format {version}, this foveal reads up to {FORMAT}: pip install --upgrade foveal"
        )
    must_fit("bundle.json", manifest, folder, task)
    if task in OTHER_TASKS and not any_task:
        raise BundleError(f"Bundle {folder} is for {task}: expected one that classifies images")
    for name, digest in found.items():
        if digest != manifest["sha256"].get(name):
            raise BundleError(f"{name} in Bundle {folder} was edited or is damaged: restore the folder or fit again")
    for name, content in parts.items():
        must_fit(name, content, folder, task)
    return BundleFiles(folder, manifest, parts.get("calibration.json", {}), parts["metrics.json"], parts["cost.json"])


def must_fit(name: str, content: Any, folder: Path, task: str) -> None:
    if fault := faults(name, content, task):
        raise BundleError(f"{name} in Bundle {folder} is not as foveal writes it ({fault}): restore it or fit again")
