"""How many processors there are to compute with."""

from __future__ import annotations

import os


def cpu_threads() -> int:
    """Processors this process may use, or `OMP_NUM_THREADS` if that is fewer."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(available, int(limit))) if limit.isdigit() else available
