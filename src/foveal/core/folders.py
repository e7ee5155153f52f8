"""Where foveal keeps what it can compute again, and how a file gets there whole or not at all."""

from __future__ import annotations

import errno
import os
import sys
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from foveal.core.errors import FovealError, UsageError


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


LOCK = "lock"


def claim(work: Path) -> IO[bytes]:
    """Make the folder of an unfinished run, or take up what a stopped one left there: its `request.json` tells it.

    Returns:
        A file; while it is open no other process gets the same folder.

    Raises:
        UsageError: another process is at work there, or the folder holds something else.
        FovealError: it cannot be written.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
        if {entry.name for entry in work.iterdir()} - {LOCK} and not (work / "request.json").is_file():
            raise UsageError(f"{work} holds something that no foveal left there: move it away, or choose another --out")
        lock = (work / LOCK).open("ab")
    except FileExistsError:
        raise UsageError(f"{work} is in the way: move it away, or choose another --out") from None
    except OSError as error:
        raise unwritable(work, error) from error
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UsageError(
                f"another foveal is at work on {work.with_suffix('')}: wait for it, or choose another --out"
            ) from None
        except OSError:  # a file system without locks
            pass
    return lock


def unwritable(target: Path, error: OSError) -> FovealError:
    """A full or read-only place, in one clear message."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        what, todo = "no space left on the device", "free some space and run the same command again"
    else:
        what, todo = str(error.strerror or error), "choose another folder (the cache's is $FOVEAL_CACHE)"
    return FovealError(f"cannot write {target} ({what}): {todo}")
