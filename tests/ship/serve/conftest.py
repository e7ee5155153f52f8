import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

import foveal

SAYS = re.compile(r"serving .* on (http://\S+):(\d+):")


@dataclass
class Server:
    """A `foveal serve` process."""

    process: subprocess.Popen[str]
    url: str
    port: int
    client: httpx.Client

    def get(self, path: str, **given: object) -> httpx.Response:
        return self.client.get(self.url + path, **given)  # type: ignore[arg-type]

    def post(self, path: str, **given: object) -> httpx.Response:
        return self.client.post(self.url + path, **given)  # type: ignore[arg-type]

    def metric(self, name: str, **labels: str) -> float:
        """The sum over all lines of a metric that have these labels."""
        total = 0.0
        for line in self.get("/metrics").text.splitlines():
            found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if (
                found
                and found[1] == name
                and all(f'{key}="{value}"' in (found[2] or "") for key, value in labels.items())
            ):
                total += float(found[3])
        return total

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


Serve = Callable[..., Server]


@contextmanager
def serving(bundle: Path, *options: object, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """A server on a free port, ready to answer."""
    process = subprocess.Popen(
        [sys.executable, "-m", "foveal", "serve", str(bundle), "--port", "0", *map(str, options)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        assert process.stderr is not None
        heard = ""
        while not (said := SAYS.search(heard)):
            line = process.stderr.readline()
            assert line, f"the server ended: {heard}"
            heard += line
        server = Server(process, f"{said[1]}:{said[2]}", int(said[2]), httpx.Client(timeout=60))
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                if server.get("/health/ready").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
        yield server
        server.client.close()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stderr and process.stderr.close()


@pytest.fixture(scope="session")
def small(colours: foveal.Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported Bundle with a small backbone; the class of an image is its colour."""
    folder = tmp_path_factory.mktemp("served") / "colours"
    shutil.copytree(colours.path, folder)
    foveal.export(folder)
    return folder


@pytest.fixture(scope="session")
def good(photos: Path) -> list[Path]:
    """Images of each class."""
    return [photos / name / "03.jpg" for name in ("blue", "green", "red")]
