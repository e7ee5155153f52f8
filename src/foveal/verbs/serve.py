"""`foveal serve`: a Bundle behind a URL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

from foveal.core.progress import Progress
from foveal.verbs._results import Result


def serve(
    bundle: Annotated[Path, "Bundle: folder made by `foveal fit`, or hub:owner/name."],
    *,
    port: Annotated[int, "Port to listen on; 0 for any that is free."] = 8000,
    host: Annotated[str, "Address to listen on; 0.0.0.0 for all of this machine's."] = "127.0.0.1",
    workers: Annotated[int, "Processes."] = 1,
    threads: Annotated[int | None, "Threads of a process, one core each; default: the cores shared out."] = None,
    token: Annotated[str | None, "Refuse requests without this bearer token; default: $FOVEAL_TOKEN, if set."] = None,
    page: Annotated[bool, "Show a page to try the model at /."] = True,
    max_body_mb: Annotated[float, "Largest body of a request, in megabytes."] = 16.0,
    max_megapixels: Annotated[float, "Largest image."] = 50.0,
    max_images: Annotated[int, "Images in one request."] = 32,
    max_requests: Annotated[int, "Requests that are answered at once; more are told to come again."] = 64,
    queue: Annotated[int, "Images that wait; more are told to come again."] = 256,
    body_seconds: Annotated[float, "For a body to arrive."] = 30.0,
    request_seconds: Annotated[float, "For an answer."] = 30.0,
    batch: Annotated[int, "Images that a thread runs at once, at most."] = 8,
    wait_ms: Annotated[float, "How long a batch that is not full waits for more images."] = 2.0,
    progress: Progress | None = None,
) -> Result:
    """Answer over HTTP with the exported model, images of all requests batched, until stopped.

    POST /predict and /explain, GET /model, /health, /metrics and /openapi.json, and a page at /.

    Example: foveal serve runs/digits --port 8000
    """
    from foveal.core.bundle import open_bundle
    from foveal.core.errors import UsageError
    from foveal.core.threads import cpu_threads
    from foveal.ship.hub import own_copy
    from foveal.ship.serve.limits import Limits, Settings
    from foveal.ship.serve.run import bind, require, run

    progress = progress or Progress()
    require(page)
    if workers < 1:
        raise UsageError(f"--workers {workers}: expected 1 or more")
    limits = Limits(max_body_mb, max_megapixels, max_images, max_requests, queue, body_seconds, request_seconds)
    token = token or os.environ.get("FOVEAL_TOKEN") or None
    threads = threads if threads is not None else max(1, cpu_threads() // workers)
    bundle = own_copy(bundle, progress)
    settings = Settings(bundle, threads, batch, wait_ms, page, token, limits)
    open_bundle(bundle)
    with bind(host, port) as listener:
        if not (bundle / "model.onnx").is_file():
            progress.say(f"{bundle} has no model.onnx: exporting it first")
            export_apart(bundle)
        address, port = listener.getsockname()[:2]
        url = f"http://{f'[{address}]' if ':' in address else address}:{port}"
        progress.say(f"serving {bundle} on {url}: {workers} processes, {threads} threads each; Ctrl-C stops")
        if token is None and address not in ("127.0.0.1", "::1"):
            progress.say("whoever reaches this address may ask: set --token")
        run(settings, listener, workers)
    return Result({"bundle": str(bundle), "url": url}, lambda done: f"stopped serving {done['bundle']}")


def export_apart(bundle: Path) -> None:
    """Export in a process of its own: the exporter's memory is not the server's.

    Raises:
        FovealError: as `foveal export`.
    """
    from foveal.core.errors import FovealError

    command = [sys.executable, "-m", "foveal", "export", str(bundle), "--to", "onnx"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("foveal: ")]
        raise FovealError(said[-1].removeprefix("foveal: ") if said else done.stderr)
