"""Bars and lines on stderr, in a terminal; lines alone elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from foveal.core.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


class TerminalProgress(Progress):
    def __init__(self) -> None:
        self.bars: Bars | None = None
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> TerminalProgress:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bars:
            self.bars.stop()

    def start(self) -> Bars:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        from foveal.cli.rate import Rate

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Rate(),
            TimeRemainingColumn(),
        )
        bars = Bars(*columns, console=Console(stderr=True))
        bars.start()
        return bars

    def update(self, stage: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        self.bars = self.bars or self.start()
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(stage, total=total)
        self.bars.update(self.tasks[stage], completed=done, total=total)

    def say(self, text: str) -> None:
        if self.bars:
            self.bars.console.print(text, markup=False, highlight=False)
        else:
            sys.stderr.write(text + "\n")
