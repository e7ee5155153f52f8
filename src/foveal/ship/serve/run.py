"""Bind, start one process or several, and stop when told to."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveal.core.errors import MissingExtra, UsageError
from foveal.ship.serve.limits import CONNECTIONS, Settings

if TYPE_CHECKING:
    from foveal.ship.serve.guard import Guard

IDLE_SECONDS = 30
"""For which a connection is kept open between two requests."""


def require(page: bool) -> None:
    """
    Raises:
        MissingExtra: a library of the extra is not installed.
    """
    for library in ("fastapi", "uvicorn", "python_multipart", "prometheus_client", *(["gradio"] if page else [])):
        if find_spec(library) is None:
            raise MissingExtra(library, "serve", "foveal serve")


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UsageError: the port is in use or not allowed, or the host is not one of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        code: Any = getattr(error, "errno", None)
        reason = os.strerror(code) if code in errno.errorcode else error
        raise UsageError(
            f"cannot listen on {host} port {port} ({reason}): choose another --port (0 for any that is free) or --host"
        ) from None


def run(settings: Settings, listener: socket.socket, workers: int) -> None:
    """Serve until SIGINT or SIGTERM; what was asked before is answered before this returns."""
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    from foveal.ship.runtime import open_runtime
    from foveal.ship.serve.app import build
    from foveal.ship.serve.protocol import Protocol

    limits = settings.limits
    config = uvicorn.Config(
        partial(build if workers == 1 else build_worker, settings),
        factory=True,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        workers=workers,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=int(limits.body_seconds + limits.request_seconds) + 1,
    )
    folders = ("GRADIO_TEMP_DIR", *(["PROMETHEUS_MULTIPROC_DIR"] if workers > 1 else []))
    with quiet_signals(), shared_folders(folders):
        if workers == 1:
            uvicorn.Server(config).run([listener])
        else:
            open_runtime(settings.bundle)  # what cannot be opened is said here once, and not by every process
            Multiprocess(config, [listener]).run()


def build_worker(settings: Settings) -> Guard:
    """The application of one of several processes, which stops as if told to once the one that started it is gone."""
    from foveal.ship.serve.app import build

    threading.Thread(target=stop_as_orphan, name="foveal-orphan", daemon=True).start()
    return build(settings)


def stop_as_orphan() -> None:
    """Wait for the end of the parent process, which may be killed and tell nobody; then finish and stop."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        signal.raise_signal(signal.SIGTERM)


@contextmanager
def shared_folders(names: Sequence[str]) -> Generator[None]:
    """Temporary folders that all processes of a server share, under these names in the environment."""
    with tempfile.TemporaryDirectory(prefix="foveal-serve-") as folder:
        for name in names:
            os.environ[name] = str(Path(folder, name.lower()))
            Path(os.environ[name]).mkdir()
        try:
            yield
        finally:
            for name in names:
                del os.environ[name]


@contextmanager
def quiet_signals() -> Generator[None]:
    """uvicorn raises what stopped it once more when it is done; being stopped is how a server ends well."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, lambda *_: None) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
