"""Dynamic batching: images of all requests wait in one bounded queue, and threads take what is there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Condition, Lock, Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

Square = NDArray[np.uint8]
Answers = tuple[NDArray[np.float32], NDArray[np.float32]]


class QueueFull(Exception):
    """The images of a request do not fit."""


@dataclass(frozen=True, slots=True)
class Job:
    data: bytes
    future: Future[tuple[NDArray[np.float32], float]]


class Batcher:
    """Encoded images -> (probabilities [C], unknown score), some of them at once.

    Each thread takes up to `batch` images, decodes them and runs them, on one core: decoding in one thread runs
    beside the model in another. A batch that is not full waits for more images, at most `wait` seconds.
    """

    def __init__(
        self,
        prepare: Callable[[bytes], Square],
        run: Callable[[Square], Answers],
        *,
        threads: int,
        batch: int,
        wait: float,
        capacity: int,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
        depth: Callable[[int], None] = lambda waiting: None,
    ) -> None:
        """
        Args:
            prepare: an encoded image -> uint8 [S, S, 3]; what it raises becomes that image's own error.
            run: uint8 [B, S, S, 3] -> answers; called from all threads.
            capacity: images that may wait.
            observe: told the size of each batch and the seconds it ran.
            depth: told how many images wait, whenever that changes.
        """
        self.prepare, self.run, self.batch, self.wait, self.capacity = prepare, run, batch, wait, capacity
        self.observe, self.depth = observe, depth
        self._waiting: deque[Job] = deque()
        self._changed = Condition()
        self._turn = Lock()
        self._closed = False
        self._threads = [Thread(target=self._work, name=f"foveal-batch-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, images: Sequence[bytes]) -> list[Future[tuple[NDArray[np.float32], float]]]:
        """Queue all images or none; one future each. A cancelled future's image is not computed.

        Raises:
            QueueFull: they do not fit.
        """
        jobs = [Job(data, Future()) for data in images]
        with self._changed:
            if self._closed or len(self._waiting) + len(jobs) > self.capacity:
                raise QueueFull
            self._waiting.extend(jobs)
            self.depth(len(self._waiting))
            self._changed.notify_all()
        return [job.future for job in jobs]

    @property
    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Finish what waits, and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while jobs := self._take():
            self._answer([job for job in jobs if job.future.set_running_or_notify_cancel()])

    def _take(self) -> list[Job]:
        """The next batch; empty when closed and nothing is left. One thread at a time gathers."""
        with self._turn, self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self.wait and len(self._waiting) < self.batch and not self._closed:
                self._changed.wait_for(lambda: self._closed or len(self._waiting) >= self.batch, self.wait)
            jobs = [self._waiting.popleft() for _ in range(min(self.batch, len(self._waiting)))]
            self.depth(len(self._waiting))
            return jobs

    def _answer(self, jobs: list[Job]) -> None:
        squares: list[Square] = []
        decoded: list[Job] = []
        for job in jobs:
            try:
                squares.append(self.prepare(job.data))
                decoded.append(job)
            except Exception as error:
                job.future.set_exception(error)
        if not decoded:
            return
        start = time.perf_counter()
        try:
            probabilities, scores = self.run(np.stack(squares))
        except Exception as error:
            for job in decoded:
                job.future.set_exception(error)
            return
        self.observe(len(decoded), time.perf_counter() - start)
        for job, row, score in zip(decoded, probabilities, scores, strict=True):
            job.future.set_result((row, float(score)))


def outcome(future: Future[Any]) -> Any:
    """The result of a finished future, or what was raised."""
    return future.exception() or future.result()
