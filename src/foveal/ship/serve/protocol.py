"""uvicorn's HTTP protocol with what it lacks: a limit of time and size for the head of a request.

Also ends the page's event streams when the server is told to stop, which would otherwise hold it open.
"""

from __future__ import annotations

import asyncio
from typing import Any

from foveal.ship.serve.limits import HEAD_BYTES, HEAD_SECONDS

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as Base
except ImportError:
    from uvicorn.protocols.http.h11_impl import H11Protocol as Base

STREAMS = "/gradio_api/"


class Protocol(Base):  # pyright: ignore[reportGeneralTypeIssues]
    """One connection."""

    deadline: asyncio.TimerHandle | None = None
    head = 0
    """Bytes of a head that is not complete."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.expect_head()

    def data_received(self, data: bytes) -> None:
        before, between = self.cycle, self.cycle is None or not self.cycle.more_body
        super().data_received(data)
        if self.cycle is not before:
            self.head_complete()
        elif between:
            self.head += len(data)
            if self.head > HEAD_BYTES:
                self.give_up("431 Request Header Fields Too Large", f"a head of more than {HEAD_BYTES} bytes")
            elif self.cycle is None or self.cycle.response_complete:
                self.expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self.head_complete()
        super().connection_lost(exc)

    def expect_head(self) -> None:
        if self.deadline is None:
            self.deadline = self.loop.call_later(HEAD_SECONDS, self.too_slow)

    def head_complete(self) -> None:
        self.head = 0
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def too_slow(self) -> None:
        if self.head:
            self.give_up("408 Request Timeout", f"the head took longer than {HEAD_SECONDS:g} seconds")
        elif not self.transport.is_closing():
            self.transport.close()

    def give_up(self, status: str, reason: str) -> None:
        self.head_complete()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            body = f'{{"error": "{reason}"}}'
            self.transport.write(
                f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
                f"connection: close\r\n\r\n{body}".encode()
            )
        self.transport.close()

    def shutdown(self) -> None:
        """Called for every connection when the server is told to stop."""
        cycle: Any = self.cycle
        super().shutdown()
        if cycle is not None and not cycle.response_complete:
            asked = cycle.scope
            if asked["method"] == "GET" and asked["path"].startswith(STREAMS):
                self.transport.close()
