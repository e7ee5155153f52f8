"""Greedy covers: every item is within a radius of one that stays, and no two that stay are within it.

Items are taken in order; the first that is left stays, and what lies within the radius of it goes. The result is
that of the plain double loop, whatever distance and however it is searched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

BLOCK = 1024
"""Items that are compared with one another before the rest is compared with those that stay."""
CELLS = 1 << 22
"""Distances held at once."""


class Distance(ABC):
    """Distances between items by number. Subclasses say them, and search faster where they can."""

    @abstractmethod
    def __call__(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Numbers [a] and [b] -> distances [a, b], at least 0."""

    def first_within(self, centres: np.ndarray, rows: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
        """For each row [b], the position of the first centre [a] within the radius (-1: none), and its distance."""
        place, apart = np.full(len(rows), -1, np.int64), np.zeros(len(rows), np.float32)
        if not len(centres):
            return place, apart
        step = max(1, CELLS // len(centres))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            distances = self(centres, rows[part])
            first = (distances <= radius).argmax(axis=0)
            found = distances[first, np.arange(len(first))]
            place[part] = np.where(found <= radius, first, -1)
            apart[part] = np.where(found <= radius, found, 0)
        return place, apart


@dataclass(frozen=True)
class Hamming(Distance):
    """Bits in which 64-bit codes differ."""

    codes: np.ndarray
    """uint64 [n]."""

    def __call__(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.bitwise_count(self.codes[left][:, None] ^ self.codes[right])

    def first_within(self, centres: np.ndarray, rows: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
        """Multi-index hashing (Norouzi, Punjani, Fleet 2012) where it is less work than all distances.

        Codes at most r bits apart agree on one of r + 1 bands of bits, so only those centres that share a band with a
        row are compared with it.
        """
        place, apart = np.full(len(rows), -1, np.int64), np.zeros(len(rows), np.float32)
        bands = bands_of(int(radius) + 1)
        wanted = self.codes[centres]
        orders = [np.argsort(wanted & band, kind="stable") for band in bands]
        step = 8 * BLOCK
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            codes = self.codes[rows[part]]
            ranges = []
            for band, order in zip(bands, orders, strict=True):
                keys, own = (wanted & band)[order], codes & band
                ranges.append((np.searchsorted(keys, own, "left"), np.searchsorted(keys, own, "right")))
            if 4 * sum(int((last - first).sum()) for first, last in ranges) > len(centres) * len(codes):
                place[part], apart[part] = super().first_within(centres, rows[part], radius)
                continue
            best = np.full(len(codes), len(centres))
            for order, (first, last) in zip(orders, ranges, strict=True):
                count = last - first
                row = np.repeat(np.arange(len(codes)), count)
                centre = order[np.arange(len(row)) + np.repeat(first - np.cumsum(count) + count, count)]
                near = np.bitwise_count(wanted[centre] ^ codes[row]) <= radius
                np.minimum.at(best, row[near], centre[near])
            hit = np.flatnonzero(best < len(centres))
            place[start + hit] = best[hit]
            apart[start + hit] = np.bitwise_count(wanted[best[hit]] ^ codes[hit])
        return place, apart


def bands_of(count: int) -> np.ndarray:
    """Masks uint64 [count] that share out the 64 bits in turns."""
    bits = np.uint64(1) << np.arange(64, dtype=np.uint64)
    return np.array([np.bitwise_or.reduce(bits[start::count], initial=np.uint64(0)) for start in range(count)])


@dataclass(frozen=True)
class Cosine(Distance):
    """Hundredths of the cosine distance, 100 (1 - cos)."""

    features: np.ndarray
    """float32 [n, D], rows of length 1."""

    def __call__(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return (100 * (1 - self.features[left] @ self.features[right].T)).clip(0)


@dataclass(frozen=True)
class Steps(Distance):
    """How many places apart items are in their order."""

    place: np.ndarray
    """int64 [n]."""

    def __call__(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.abs(self.place[left][:, None] - self.place[right])


def greedy_cover(distance: Distance, items: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Exemplar of each item [m] (its own number where it stays) and the distance to it, float32 [m].

    Args:
        items: numbers int64 [m], in the order in which they may stay.
        radius: at least 0; items at exactly this distance go.
    """
    exemplar, apart = items.copy(), np.zeros(len(items), np.float32)
    left = np.arange(len(items))
    while len(left):
        block, left = left[:BLOCK], left[BLOCK:]
        stay: list[int] = []
        among = distance(items[block], items[block])
        near, waiting = among <= radius, np.ones(len(block), bool)
        for first in range(len(block)):
            if waiting[first]:
                stay.append(int(block[first]))
                go = near[first] & waiting
                exemplar[block[go]], apart[block[go]] = items[block[first]], among[first, go]
                apart[block[first]] = 0
                waiting &= ~go
                waiting[: first + 1] = False
        centres = items[stay]
        place, found = distance.first_within(centres, items[left], radius)
        hit = place >= 0
        exemplar[left[hit]], apart[left[hit]] = centres[place[hit]], found[hit]
        left = left[~hit]
    return exemplar, apart


def grouped_cover(distance: Distance, groups: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """`greedy_cover` of each group by itself: (exemplar int64 [n], distance float32 [n]).

    Args:
        groups: int64 [n]; the order of their numbers does not matter.
    """
    exemplar, apart = np.arange(len(groups)), np.zeros(len(groups), np.float32)
    order = np.argsort(groups, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        exemplar[members], apart[members] = greedy_cover(distance, members, radius)
    return exemplar, apart


def pairs_within(distance: Distance, items: np.ndarray, radius: float) -> int:
    """How many pairs of items [m] are within the radius."""
    total, step = 0, max(1, CELLS // max(1, len(items)))
    for start in range(0, len(items), step):
        total += int((distance(items[start : start + step], items) <= radius).sum())
    return (total - len(items)) // 2
