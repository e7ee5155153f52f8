"""The application: routes over a model and its queue, and the page beside them."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from foveal.core.bundle import open_bundle
from foveal.core.errors import DataError
from foveal.data.images import decode, to_pixels
from foveal.ship.answer import answer, unreadable
from foveal.ship.runtime import open_runtime
from foveal.ship.serve.batching import Batcher, QueueFull, Square
from foveal.ship.serve.bodies import described, read_images
from foveal.ship.serve.explain import DEFAULT, Explainer, methods
from foveal.ship.serve.guard import Guard
from foveal.ship.serve.limits import Settings
from foveal.ship.serve.metrics import Metrics
from foveal.ship.serve.refusal import Busy, Refused, fault, gone, refuse
from foveal.ship.serve.schemas import Health, HeatMap, Model, Problem, Row

VERSION = version("foveal")
MEASURED = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")
WORK_PROBLEMS = {400: "cannot be parsed", 408: "too slow", 413: "too large or too many", 415: "another type of body"}
WORK_PROBLEMS |= {422: "no image in it, or none that can be decoded", 503: "too much to do; Retry-After says when"}

HANDLERS: dict[Any, Any] = {HTTPException: refuse, ClientDisconnect: gone, Exception: fault}


class Service:
    """A model with its queue; what the routes and the page ask."""

    def __init__(self, settings: Settings) -> None:
        """
        Raises:
            BundleError: not a Bundle, or one without an exported model.
        """
        self.settings = settings
        self.files = open_bundle(settings.bundle)
        self.runtime = open_runtime(settings.bundle)
        self.backbone = self.files.manifest["backbone"]["name"].partition("@")[0]
        self.metrics = Metrics({"version": VERSION, "backbone": self.backbone, "precision": self.runtime.precision})
        self.explainer = Explainer(settings, self.runtime)
        self.batcher: Batcher | None = None

    def start(self) -> None:
        """Run the model once, and start the threads. May be called again after `close`."""
        self.explainer.start()
        size = self.runtime.preprocessing.size
        self.runtime(np.zeros((self.settings.batch, size, size, 3), np.uint8))
        self.batcher = Batcher(
            self.prepare,
            self.runtime,
            threads=self.settings.threads,
            batch=self.settings.batch,
            wait=self.settings.wait_ms / 1000,
            capacity=self.settings.limits.queue,
            observe=self.metrics.ran,
            depth=self.metrics.depth.set,
        )

    def close(self) -> None:
        self.explainer.close()
        if self.batcher:
            self.batcher.close()

    @property
    def ready(self) -> bool:
        return self.batcher is not None and self.batcher.alive

    def prepare(self, data: bytes) -> Square:
        return to_pixels(decode(data, self.settings.limits.pixels), self.runtime.preprocessing)

    def submit(self, images: Sequence[bytes]) -> list[Future[Any]]:
        """
        Raises:
            Busy: the queue is full, or the server is not ready.
        """
        try:
            if self.batcher is None:
                raise Busy("the model is being loaded: ask again in a moment")
            return self.batcher.submit(images)
        except QueueFull:
            raise Busy(f"the queue of {self.settings.limits.queue} images is full: ask again later") from None

    async def predict(self, images: Sequence[tuple[str, bytes]]) -> list[dict[str, Any]]:
        """One row per image, in order.

        Raises:
            Busy: the queue is full, or the answers take longer than allowed; then they are not computed.
            Refused: none of the images can be decoded.
        """
        seconds = self.settings.limits.request_seconds
        waiting = [asyncio.wrap_future(each) for each in self.submit([data for _, data in images])]
        try:
            async with asyncio.timeout(seconds):
                found = await asyncio.gather(*waiting, return_exceptions=True)
        except TimeoutError:
            raise Busy(f"no answer within {seconds:g} seconds: ask again later, or for fewer images") from None
        return self.rows([name for name, _ in images], found)

    def rows(self, names: Sequence[str], found: Sequence[Any]) -> list[dict[str, Any]]:
        """
        Args:
            found: of each image (probabilities, unknown score) or the error.

        Raises:
            Refused: all are errors of decoding. Any other error is raised as it is.
        """
        rows = [self.row(name, each) for name, each in zip(names, found, strict=True)]
        self.metrics.answered(rows)
        if all("error" in row for row in rows):
            which = f"{rows[0]['image']} cannot" if len(rows) == 1 else f"none of the {len(rows)} images can"
            raise Refused(422, f"{which} be decoded: {rows[0]['error']}")
        return rows

    def row(self, name: str, found: Any) -> dict[str, Any]:
        if isinstance(found, DataError):
            return unreadable(name, str(found))
        if isinstance(found, BaseException):
            raise found
        probabilities, score = found
        runtime = self.runtime
        return answer(
            name, probabilities, score, classes=runtime.classes, task=runtime.task, threshold=runtime.threshold
        )

    def describe(self) -> dict[str, Any]:
        """What GET /model answers; no path of this machine is in it."""
        manifest, runtime = self.files.manifest, self.runtime
        return {
            "name": self.settings.bundle.resolve().name,
            "foveal": VERSION,
            "task": runtime.task,
            "classes": list(runtime.classes),
            "backbone": self.backbone,
            "method": manifest["method"]["name"],
            "preprocessing": runtime.preprocessing.to_dict(),
            "engine": runtime.engine,
            "precision": runtime.precision,
            "threads": self.settings.threads,
            "limits": asdict(self.settings.limits),
            "explain": methods(),
            "metrics": {
                name: {key: entry.get(key) for key in ("value", "low", "high")}
                for name in MEASURED
                if (entry := self.files.metrics.get(name)) and entry.get("value") is not None
            },
        }


class Site:
    """The routes, and the page for every other path once it is built."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.api = api(service, self)
        self.paths = {route.path for route in self.api.routes}  # type: ignore[attr-defined]
        self.page: Any = None

    def route(self, path: str) -> str:
        """Label of metrics."""
        if path in self.paths:
            return path
        return "page" if self.service.settings.page else "other"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self.route(scope["path"]) != "page":
            await self.api(scope, receive, send)
        elif self.page is None:
            headers = {"retry-after": "1", "cache-control": "no-store"}
            await Response(LOADING, 503, headers, "text/html")(scope, receive, send)
        else:
            await self.page(scope, receive, send)

    async def open_page(self, stack: AsyncExitStack) -> None:
        """Build the page beside the running server: its toolkit takes seconds to import."""
        from foveal.ship.serve.page import build_page

        try:
            page = await asyncio.to_thread(build_page, self.service, asyncio.get_running_loop())
            await stack.enter_async_context(page.router.lifespan_context(page))
        except Exception:  # whatever its toolkit raises: the routes are not touched by it
            logging.getLogger(__name__).exception("the page cannot be shown")
            return
        self.page = page
        settle()


LOADING = """<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="1"><title>foveal</title>
<body style="font:1rem system-ui;display:grid;place-items:center;height:90vh;color:#555">The page is starting."""


def settle() -> None:
    """What is loaded now stays: the garbage collector need not look at it again while requests wait."""
    gc.collect()
    gc.freeze()


def build(settings: Settings) -> Guard:
    """The ASGI application of one server process."""
    service = Service(settings)
    site = Site(service)
    return Guard(site, settings, service.metrics, site.route)


def api(service: Service, site: Site) -> FastAPI:
    limits = service.settings.limits

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with AsyncExitStack() as stack:
            await asyncio.to_thread(service.start)
            stack.push_async_callback(asyncio.to_thread, service.close)
            settle()
            opening = asyncio.create_task(site.open_page(stack)) if service.settings.page else None
            yield
            if opening:
                opening.cancel()
                await asyncio.gather(opening, return_exceptions=True)

    app = FastAPI(
        title="foveal",
        version=VERSION,
        description=f"Answers of the model {service.settings.bundle.resolve().name}.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        exception_handlers=HANDLERS,
    )
    secured: dict[str, Any] = {"security": [{"token": []}]} if service.settings.token else {}
    denied = {401: "no token, or another"} if service.settings.token else {}

    @app.post(
        "/predict",
        response_model=list[Row],
        responses=problems(WORK_PROBLEMS | denied),
        openapi_extra={"requestBody": described(limits.images), **secured},
    )
    async def predict(request: Request) -> Response:
        """Label images. Of several images, one that cannot be decoded says so in its own row."""
        return as_json(await service.predict(await read_images(request, limits)))

    @app.post(
        "/explain",
        response_model=HeatMap,
        responses=problems(WORK_PROBLEMS | denied),
        openapi_extra={"requestBody": described(1), **secured},
    )
    async def explain(
        request: Request,
        method: Annotated[str, Query(description="NAME or NAME:key=value,... of an explain method.")] = DEFAULT,
        target: Annotated[str | None, Query(description="Class to explain; default: the most probable.")] = None,
    ) -> Response:
        """Which parts of one image speak for a class."""
        images = await read_images(request, limits)
        if len(images) > 1:
            raise Refused(413, f"{len(images)} images: one at a time is explained")
        return as_json(await service.explainer.explain(*images[0], method, target))

    @app.get("/model", response_model=Model, responses=problems(denied), openapi_extra=secured)
    async def model() -> Response:
        """What is served: classes, preprocessing, engine, limits, metrics."""
        return as_json(service.describe())

    @app.get("/health", response_model=Health, responses=problems({503: "not ready"}))
    @app.get("/health/ready", response_model=Health, responses=problems({503: "not ready"}))
    async def ready() -> Response:
        """Whether requests are answered."""
        if not service.ready:
            raise Busy("not ready")
        return as_json({"status": "ready"})

    @app.get("/health/live", response_model=Health)
    async def live() -> Response:
        """Whether the process runs."""
        return as_json({"status": "live"})

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **problems(denied)},
        openapi_extra=secured,
    )
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(
            await asyncio.to_thread(service.metrics.text), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    if service.settings.token:
        schemes = app.openapi().setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["token"] = {"type": "http", "scheme": "bearer"}
    return app


def problems(reasons: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem, "description": reason} for status, reason in reasons.items()}


def as_json(content: Any) -> Response:
    return Response(json.dumps(content, ensure_ascii=False, allow_nan=False), media_type="application/json")
