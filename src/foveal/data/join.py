"""Several data sets as one, images left where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from foveal.data.dataset import Dataset, Source, unique


@dataclass(frozen=True, eq=False)
class Several:
    """Image i is number `row[i]` of `sources[which[i]]`."""

    sources: Sequence[Source]
    which: np.ndarray
    row: np.ndarray

    def read(self, index: int) -> bytes:
        return self.sources[int(self.which[index])].read(int(self.row[index]))


def join(name: str, parts: Sequence[tuple[Dataset, str]], classes: Sequence[str]) -> Dataset:
    """Single-label data sets one after another, each with the split its images belong to.

    Args:
        parts: data sets whose classes are among `classes`; empty ones are fine.
        classes: of the whole, in their order.
    """
    place = {label: index for index, label in enumerate(classes)}
    sizes = [len(part) for part, _ in parts]
    labels = [np.array([place[part.classes[label]] for label in part.labels.tolist()], np.int64) for part, _ in parts]
    return Dataset(
        name,
        unique([image for part, _ in parts for image in part.ids]),
        np.concatenate(labels),
        tuple(classes),
        "single-label",
        np.repeat([split for _, split in parts], sizes),
        Several(
            [part.source for part, _ in parts],
            np.repeat(np.arange(len(parts)), sizes),
            np.concatenate([np.arange(size) for size in sizes]),
        ),
        tuple(item for part, _ in parts for item in part.set_aside),
    )
