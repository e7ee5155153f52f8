"""How much one request may ask for, and the settings of a server."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from foveal.core.errors import UsageError

HEAD_BYTES = 32 * 1024
"""Of a request line and its headers."""
HEAD_SECONDS = 10.0
"""In which a request line and its headers must arrive."""
CONNECTIONS = 512
"""Open at once, per process."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for, and what a process takes on at once. All are positive.

    At most `requests` bodies of `body_mb` and one decoded image of `megapixels` per thread are held in memory.
    """

    body_mb: float = 16.0
    """Megabytes (10^6 bytes) of a body."""
    megapixels: float = 50.0
    """Of one image, read from its header."""
    images: int = 32
    """In one request."""
    requests: int = 64
    """Asking for an answer at once."""
    queue: int = 256
    """Images that wait for a free thread."""
    body_seconds: float = 30.0
    """From the headers to the last byte of the body."""
    request_seconds: float = 30.0
    """From the last byte of the body to the answer."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not 0 < value < float("inf"):
                raise UsageError(f"limit {each.name} = {value}: expected a positive number")
        if self.images > self.queue:
            raise UsageError(f"{self.images} images in a request do not fit a queue of {self.queue}: raise the queue")

    @property
    def body_bytes(self) -> int:
        return int(self.body_mb * 1e6)

    @property
    def pixels(self) -> int:
        return int(self.megapixels * 1e6)


@dataclass(frozen=True)
class Settings:
    """What one process of a server needs to know; plain data, as it is handed to every process."""

    bundle: Path
    threads: int = 1
    """Each takes images from the queue, decodes them and runs them on one core."""
    batch: int = 8
    """Images that one thread runs at once, at most."""
    wait_ms: float = 2.0
    """How long a batch that is not full waits for more images."""
    page: bool = True
    token: str | None = field(default=None, repr=False)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in ("threads", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)}: expected 1 or more")
        if not 0 <= self.wait_ms <= 1000:
            raise UsageError(f"a wait of {self.wait_ms} ms: expected 0 to 1000")
        if self.token is not None and (not self.token.strip() or not self.token.isascii()):
            raise UsageError("the token is empty or not ASCII: expected letters and digits, the longer the better")
