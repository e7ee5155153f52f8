"""Where foveal keeps what it can compute again, and how a file gets there whole or not at all."""

from __future__ import annotations

import errno
import os
import sys
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from foveal.core.errors import FovealError


def cache_root() -> Path:
    """`$FOVEAL_CACHE`, or `foveal` in the user's cache folder. Everything below it may be deleted at any time."""
    given = os.environ.get("FOVEAL_CACHE")
    if given:
        return Path(given).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "foveal"


@contextmanager
def atomic_file(target: Path) -> Generator[Path]:
    """A temporary file beside `target` that takes its place when the block ends well; removed otherwise.

    Raises:
        FovealError: the folder cannot be made or written, or the device is full.
    """
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.touch(exist_ok=False)
        yield staging
        with staging.open("rb") as file:
            os.fsync(file.fileno())
        staging.replace(target)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        with suppress(OSError):
            staging.unlink()


def unwritable(target: Path, error: OSError) -> FovealError:
    """A full or read-only place, in one clear message."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        what, todo = "no space left on the device", "free some space and run the same command again"
    else:
        what, todo = str(error.strerror or error), "choose another folder (the cache's is $FOVEAL_CACHE)"
    return FovealError(f"cannot write {target} ({what}): {todo}")
