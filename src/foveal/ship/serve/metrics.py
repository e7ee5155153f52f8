"""What Prometheus is told. With several processes each writes its numbers to a shared folder and any of them adds up.

The folder is `$PROMETHEUS_MULTIPROC_DIR`, set before a process of the server starts (see run.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foveal.core.bundle import running

FOLDER = "PROMETHEUS_MULTIPROC_DIR"

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """Counters of one server process."""

    def __init__(self, labels: dict[str, str]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.several = FOLDER in os.environ
        if self.several:
            forget_the_dead(Path(os.environ[FOLDER]))
        self.requests = Counter("foveal_requests", "Requests answered.", ["route", "status"], **own)
        self.seconds = Histogram(
            "foveal_request_seconds", "From the head of a request to its answer.", ["route"], buckets=SECONDS, **own
        )
        self.in_progress = Gauge(
            "foveal_requests_in_progress",
            "Requests for predictions and explanations that are being answered.",
            multiprocess_mode="livesum",
            **own,
        )
        self.depth = Gauge("foveal_queue_depth", "Images that wait for a thread.", multiprocess_mode="livesum", **own)
        self.batches = Histogram("foveal_batch_size", "Images that were run at once.", buckets=SIZES, **own)
        self.run_seconds = Histogram("foveal_run_seconds", "Of the model, per batch.", buckets=SECONDS, **own)
        self.images = Counter("foveal_images", "Images by their answer: known, unknown, unreadable.", ["answer"], **own)
        for kind in ("known", "unknown", "unreadable"):
            self.images.labels(kind)
        info = Gauge(
            "foveal_model_info", "1, labelled with what is served.", list(labels), multiprocess_mode="max", **own
        )
        info.labels(**labels).set(1)
        if not self.several:
            ProcessCollector(registry=self.registry)

    def started(self, works: bool) -> None:
        if works:
            self.in_progress.inc()

    def finished(self, works: bool, route: str, status: int, seconds: float) -> None:
        if works:
            self.in_progress.dec()
        self.requests.labels(route, str(status or "none")).inc()
        self.seconds.labels(route).observe(seconds)

    def ran(self, size: int, seconds: float) -> None:
        self.batches.observe(size)
        self.run_seconds.observe(seconds)

    def answered(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            kind = "unreadable" if "error" in row else "unknown" if row["unknown"] else "known"
            self.images.labels(kind).inc()

    def text(self) -> bytes:
        """In the text format, of all processes."""
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.multiprocess import MultiProcessCollector

        if not self.several:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def forget_the_dead(folder: Path) -> None:
    """Drop what processes that are gone were doing at their end; what they had counted stays."""
    for file in folder.glob("gauge_live*_*.db"):
        if not running(int(file.stem.rpartition("_")[2])):
            file.unlink(missing_ok=True)
