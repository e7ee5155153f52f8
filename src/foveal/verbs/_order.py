"""What the fits of every task but classifying images share: what was asked, the training run, how the Bundle begins."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeVar

from torch import nn

from foveal.backbones.adapter import Backbone, load_backbone
from foveal.core import catalogue
from foveal.core.bundle import write_json
from foveal.core.errors import UsageError
from foveal.core.folders import claim
from foveal.core.method import Trained
from foveal.core.options import options_to_dict
from foveal.core.progress import Progress
from foveal.core.task import OtherTask
from foveal.ship.bundle import load
from foveal.train.events import TrainResult
from foveal.train.feed import Feed
from foveal.train.loop import train
from foveal.verbs._adapt import report_event
from foveal.verbs._prepare import source_of
from foveal.verbs._scratch import learnable, must_learn, random_backbone
from foveal.verbs._write import finished
from foveal.verbs.fit import ROOMS
from foveal.verbs.reproduce import versions

F = TypeVar("F", bound=Trained)


@dataclass
class Order:
    """`foveal fit DATA --task TASK`; see `foveal.verbs.fit.fit`."""

    data: str
    task: OtherTask
    method: str
    backbone: str
    out: Path
    seed: int
    budget: float | None
    device: str
    offline: bool
    scratch: bool
    progress: Progress
    start: float = field(default_factory=time.perf_counter)
    _lock: IO[bytes] | None = None
    _learnable: list[nn.Parameter] = field(default_factory=list[nn.Parameter])

    @cached_property
    def request(self) -> dict[str, Any]:
        """What must be equal for two commands to be the same."""
        asked = {"data": str(self.data), "task": self.task, "method": self.method}
        if self.task != "forecast":
            asked["backbone"] = self.backbone
        return {**asked, "seed": self.seed, **({"scratch": True} if self.scratch else {})}

    @property
    def work(self) -> Path:
        return self.out.with_name(self.out.name + ".work")

    def finished(self) -> bool:
        """Whether the Bundle of this very command is there.

        Raises:
            UsageError: --out holds something else.
        """
        done = finished(self.out, self.request)
        if done:
            self.progress.say(f"{self.out} already holds the Bundle of this very command")
        return done

    def chosen(self, family: type[F], otherwise: str) -> F:
        """The method, with its options.

        Args:
            otherwise: what a method of another family does not do.

        Raises:
            UsageError: it is of another family.
        """
        method = catalogue.create(self.method)
        if not isinstance(method, family):
            expected = ", ".join(catalogue.names(ROOMS[self.task]))
            raise UsageError(f"{method.name} {otherwise}: expected one of {expected}")
        return method

    def load_backbone(self) -> Backbone:
        if not self.scratch:
            return load_backbone(self.backbone, offline=self.offline)
        made = random_backbone(self.backbone, self.seed)
        self._learnable = learnable(made)
        return made

    def tell_set_aside(self, set_aside: Sequence[tuple[str, str]], what: str) -> None:
        if set_aside:
            name, reason = set_aside[0]
            self.progress.say(f"{len(set_aside)} {what} set aside (first: {name}: {reason})")

    def train(
        self,
        method: Trained,
        model: nn.Module,
        feed: Feed,
        validate: Callable[[Any], dict[str, float]] | None,
        *,
        main: bool = True,
    ) -> TrainResult:
        """Train from where a stopped run left off; its folder is this process's until it ends.

        Args:
            main: of several processes one claims the folder.

        Raises:
            UsageError: the method left random weights frozen.
        """
        must_learn(method, self._learnable)
        if main:
            self._lock = claim(self.work)
            write_json(self.work / "request.json", self.request)
        return train(
            method, model, feed, self.seed, recipe=method.recipe(), device=self.device, work=self.work,
            budget_s=self.budget, validate=validate,
            on_event=lambda event: report_event(event, method.name, self.progress),
        )  # fmt: skip

    def manifest(self, method: Trained, data: Mapping[str, Any], **own: Any) -> dict[str, Any]:
        """The content of bundle.json.

        Args:
            data: what it remembers of its data, beside where they came from.
            own: what it holds of this task alone.
        """
        return {
            "foveal": versions(),
            "task": self.task,
            **own,
            "method": {"name": method.name, "options": options_to_dict(method.options)},
            "why": "asked for",
            "seed": self.seed,
            "data": {"source": source_of(self.data), **data},
            "request": self.request,
            "parent": None,
            "seconds": round(time.perf_counter() - self.start, 2),
        }

    def close(self) -> Any:
        """The Bundle, opened, with nothing left of the run that made it."""
        shutil.rmtree(self.work, ignore_errors=True)
        return load(self.out)
