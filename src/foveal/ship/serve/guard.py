"""What stands before every route: token, size and time of bodies, requests at once, metrics, headers."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foveal.ship.serve.limits import HEAD_BYTES, Settings
from foveal.ship.serve.metrics import Metrics
from foveal.ship.serve.refusal import Busy, Refused, error

OPEN = frozenset({"/health", "/health/live", "/health/ready"})
"""Answered without a token: an orchestrator's probes have none, and learn nothing else."""
WORK = frozenset({"/predict", "/explain"})
DRAIN_SECONDS = 2.0
"""How long the rest of a refused body is read and thrown away, so that the client comes to read why."""
BYTES_DRAINED = 64_000_000
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'"
)
"""Of the page: a browser fetches nothing from anywhere else for it."""


class Guard:
    """ASGI application in front of another.

    Args:
        app: what answers.
        route: path -> label of metrics; 'page' for whatever belongs to the page.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, route: Callable[[str], str]) -> None:
        self.app, self.limits, self.metrics, self.route = app, settings.limits, metrics, route
        self.token = settings.token.encode() if settings.token else None
        self.working = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, route = time.perf_counter(), self.route(scope["path"])
        exchange = Exchange(Headers(scope=scope), receive, send, self.limits.body_bytes, self.limits.body_seconds)
        exchange.page = route == "page"
        works = scope["path"] in WORK
        self.working += works
        self.metrics.started(works)
        try:
            self.admit(scope, exchange, works)
            await self.app(scope, exchange.receive, exchange.send)
        except Refused as refused:
            if not exchange.status:
                await error(refused.status_code, refused.detail, refused.headers)(
                    scope, exchange.receive, exchange.send
                )
        except ClientDisconnect:
            pass
        finally:
            self.working -= works
            self.metrics.finished(works, route, exchange.status, time.perf_counter() - start)

    def admit(self, scope: Scope, exchange: Exchange, works: bool) -> None:
        """Refuse by what the head of a request says already."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope["raw_path"]) > HEAD_BYTES:
            raise Refused(431, f"a head of more than {HEAD_BYTES} bytes")
        if scope["path"] not in OPEN and not self.allowed(exchange.headers.get("authorization", "")):
            scheme = 'Basic realm="foveal"' if exchange.page else "Bearer"
            raise Refused(401, "expected the header 'Authorization: Bearer TOKEN'", {"www-authenticate": scheme})
        if works and self.working > self.limits.requests:
            raise Busy(f"{self.limits.requests} requests are being answered already: ask again later")
        length = exchange.headers.get("content-length", "0")
        if not length.isdigit():
            raise Refused(400, "the Content-Length is not a number")
        if int(length) > self.limits.body_bytes:
            raise exchange.too_large()

    def allowed(self, authorization: str) -> bool:
        """Bearer TOKEN; or Basic with the token as password, which is what a browser's own dialog sends."""
        if self.token is None:
            return True
        scheme, _, given = authorization.strip().partition(" ")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given.strip(), validate=True).decode("latin-1").partition(":")[2]
            except (binascii.Error, ValueError):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self.token)


class Exchange:
    """One request and its answer: counts and times the body, and closes what was not read to its end."""

    def __init__(self, headers: Headers, receive: Receive, send: Send, most: int, seconds: float) -> None:
        self.headers, self._receive, self._send, self.most, self.seconds = headers, receive, send, most, seconds
        self.deadline = asyncio.get_running_loop().time() + seconds
        self.received, self.status, self.page = 0, 0, False
        self.whole = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers

    async def receive(self) -> Message:
        if self.whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self._receive()
        except TimeoutError:
            raise Refused(408, f"the body took longer than {self.seconds:g} seconds to arrive") from None
        if message["type"] == "http.request":
            self.received += len(message.get("body", b""))
            self.whole = not message.get("more_body", False)
            if self.received > self.most:
                raise self.too_large()
        return message

    def too_large(self) -> Refused:
        return Refused(413, f"a body of more than {self.most / 1e6:g} MB: send fewer or smaller images")

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
            if self.page:
                headers += [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
            if not self.whole:
                headers.append((b"connection", b"close"))
            await self._send({**message, "headers": headers})
        elif self.whole or message.get("more_body", False):
            await self._send(message)
        else:
            await self._send({**message, "more_body": True})
            await self.drain()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def drain(self) -> None:
        """Read on for a moment: a client that is still sending sees a closed connection and not the answer."""
        if "expect" in self.headers:
            return
        left = BYTES_DRAINED
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        break
        except TimeoutError:
            pass
