"""Commands in processes of their own that need not import the libraries again: each is forked from a process that
imported them and did nothing else. A command sees its arguments, folder, output and exit code as ever."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

LIBRARIES = ["timm", "onnxruntime", "accelerate", "pyarrow", "foveal.cli.main", "foveal.ship.bundle"]


@cache
def nursery() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


def run(command: Sequence[str], folder: Path) -> tuple[int, str]:
    """Exit code and output (both streams) of `foveal ...` or `python -c CODE` in a folder."""
    with TemporaryDirectory() as place:
        said = Path(place, "said")
        process = nursery().Process(target=begin, args=(list(command), str(folder), str(said), dict(os.environ)))
        process.start()
        process.join()
        return process.exitcode, said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""


def begin(command: list[str], folder: str, said: str, environment: dict[str, str]) -> None:
    stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = command
    if command[0] == "foveal":
        from foveal.cli.main import main

        main()
    else:
        sys.path.insert(0, "")
        exec(compile(command[-1], "<block>", "exec"), {"__name__": "__main__"})
