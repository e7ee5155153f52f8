"""The one form of every answer that is not a result: a status and `{"error": "..."}`."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response


class Refused(HTTPException):
    """A request that is answered with `status` and one line that says what came, what was expected, what to do."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, " ".join(message.split()), dict(headers or {}))


class Busy(Refused):
    """Nothing is wrong with the request; the server has too much to do."""

    def __init__(self, message: str) -> None:
        super().__init__(503, message, {"retry-after": "1"})


def error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps({"error": message}), status, headers, "application/json")


def refuse(_: Request, refusal: Exception) -> Response:
    """Exception handler of Refused and of what the router raises (404, 405)."""
    assert isinstance(refusal, HTTPException)
    return error(refusal.status_code, refusal.detail, refusal.headers)


def gone(_: Request, __: Exception) -> Response:
    """Exception handler of a client that hung up; nobody reads it, the metrics count it."""
    return error(499, "the client hung up")


def fault(_: Request, __: Exception) -> Response:
    """Exception handler of everything else: the traceback goes to the server's log and not to the client."""
    return error(500, "a fault of the server; its log says more")
