"""Stratified splits that keep near-duplicates on one side.

Iterative stratification (Sechidis, Tsoumakas, Vlahavas 2011) over groups instead of images: what many groups with the
same labels can share out evenly is shared out at once; the few left over go one by one, those of the rarest label
first, to the part that lacks that label most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from foveal.core.errors import DataError, UsageError
from foveal.core.seeds import generator


def make_split(
    labels: np.ndarray,
    groups: np.ndarray,
    seed: int,
    test: float = 0.25,
    val: float = 0.1,
    classes: Sequence[str] | None = None,
) -> np.ndarray:
    """'train', 'val' or 'test' for each image.

    Args:
        labels: int64 [n], or uint8 [n, C] zeros and ones.
        groups: int64 [n]; images of one group stay on one side.
        test, val: fractions of all images; each class has at least one group in 'test' (if above 0), two outside.
        classes: names for messages.

    Raises:
        DataError: fewer than two classes, or a class with too few distinct images.
        UsageError: fractions that leave nothing to train on.
    """
    if test < 0 or val < 0 or test + val >= 1:
        raise UsageError(f"test={test}, val={val}: expected fractions from 0 that leave some images to train on")
    stock = enough(labels, groups, classes, test)
    parts = stock.share(np.array([1 - test - val, val, test]), seed)
    stock.repair(parts, [(0, 2 if test else 1), (2, 1)] if test else [(0, 1)])
    return np.array(["train", "val", "test"])[parts[stock.group_of]]


def enough(labels: np.ndarray, groups: np.ndarray, classes: Sequence[str] | None = None, test: float = 0.25) -> Stock:
    """What `make_split` has to share out.

    Raises:
        DataError: fewer than two classes, or a class with too few distinct images.
    """
    stock = Stock.of(labels, groups, classes)
    if labels.ndim == 1 and stock.groups_with.astype(bool).sum() < 2:
        only = name_of(int(labels[0]), classes) if len(labels) else "none"
        raise DataError(f"all {len(labels)} images are of class {only}: expected at least two classes")
    stock.require(3 if test else 1, "2 to train on and 1 to test" if test else "to train on", classes)
    return stock


def folds(
    labels: np.ndarray, groups: np.ndarray, k: int, seed: int, classes: Sequence[str] | None = None
) -> np.ndarray:
    """Fold 0 .. k-1 of each image, for cross-validation; int64 [n].

    Every class is in at least two folds, so that it can be learnt whichever fold is left out.

    Raises:
        DataError: a class with one distinct image.
        UsageError: fewer than two folds.
    """
    if k < 2:
        raise UsageError(f"{k} folds: expected at least 2")
    stock = Stock.of(labels, groups, classes)
    stock.require(2, "one to learn from when the other is held out", classes)
    parts = stock.share(np.full(k, 1 / k), seed)
    stock.spread(parts)
    return parts[stock.group_of].astype(np.int64)


def name_of(index: int, classes: Sequence[str] | None) -> str:
    return classes[index] if classes is not None and index < len(classes) else str(index)


@dataclass(frozen=True)
class Stock:
    """Groups and the labels in them: entry e says that group `group[e]` has `count[e]` images with label `label[e]`.

    Entries are sorted by group, then rarest label first; `start` [G + 1] delimits groups. `images` and `groups_with`
    count by label.
    """

    group_of: np.ndarray
    group: np.ndarray
    label: np.ndarray
    count: np.ndarray
    start: np.ndarray
    size: np.ndarray
    images: np.ndarray
    groups_with: np.ndarray

    @staticmethod
    def of(labels: np.ndarray, groups: np.ndarray, classes: Sequence[str] | None) -> Stock:
        _, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
        group_of = np.argsort(np.argsort(first))[group_of]  # numbered as they appear: group ids do not matter
        if labels.ndim == 1:
            image, label = np.arange(len(labels)), labels
            width = max(int(labels.max(initial=-1)) + 1, len(classes or ()))
        else:
            image, label = np.nonzero(labels)
            width = labels.shape[1]
        key, count = np.unique(group_of[image] * max(width, 1) + label, return_counts=True)
        group, label = np.divmod(key, max(width, 1))
        total, groups_with = len(first), np.bincount(label, minlength=width)
        rarest_first = np.lexsort((groups_with[label], group))
        label, count = label[rarest_first], count[rarest_first]
        return Stock(
            group_of,
            group,
            label,
            count,
            np.searchsorted(group, np.arange(total + 1)),
            np.bincount(group_of, minlength=total),
            np.bincount(label, count, minlength=width).astype(np.int64),
            groups_with,
        )

    def require(self, least: int, why: str, classes: Sequence[str] | None) -> None:
        """Every label that occurs does so in at least `least` groups."""
        poor = np.flatnonzero((self.groups_with < least) & ((self.images > 0) | (classes is not None)))
        if not len(poor):
            return
        index = int(poor[0])
        images, distinct = int(self.images[index]), int(self.groups_with[index])
        has = f"{images} image{'s' if images != 1 else ''}"
        if distinct < images:
            has += f" of which {distinct} {'is' if distinct == 1 else 'are'} distinct, the others near-duplicates"
        more = f" ({len(poor) - 1} more classes like it)" if len(poor) > 1 else ""
        raise DataError(
            f"class {name_of(index, classes)} has {has}; at least {least} needed ({why}){more}: "
            "add images or remove the class"
        )

    def share(self, fractions: np.ndarray, seed: int) -> np.ndarray:
        """Part of each group, so that every label is spread over the parts as `fractions` say."""
        rng = generator(seed, "split")
        total, parts = len(self.size), len(fractions)
        shuffled = rng.permutation(total)
        kind = self._kinds()[shuffled]
        order = shuffled[np.argsort(kind, kind="stable")]
        _, begins, sizes = np.unique(np.sort(kind), return_index=True, return_counts=True)
        rank = np.arange(total) - np.repeat(begins, sizes)
        # Of m groups of one kind, part s gets floor(m * fraction); the rest is left for the next step.
        ends = np.floor(sizes[:, None] * fractions + 1e-9).astype(np.int64).cumsum(axis=1)
        part = (rank[:, None] >= np.repeat(ends, sizes, axis=0)).sum(axis=1)
        chosen = np.empty(total, np.int64)
        chosen[order] = part
        self._share_rest(chosen, order[part == parts], fractions, rng)
        return chosen

    def _kinds(self) -> np.ndarray:
        """A number per group [G], equal for groups with equal labels and counts."""
        mixed = (self.label.astype(np.uint64) + 1) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(32)
        sums = np.zeros(len(self.size), np.uint64)
        np.add.at(sums, self.group, mixed * self.count.astype(np.uint64))
        return sums + self.size.astype(np.uint64)

    def _share_rest(
        self, chosen: np.ndarray, rest: np.ndarray, fractions: np.ndarray, rng: np.random.Generator
    ) -> None:
        parts = len(fractions)
        settled = chosen < parts
        settled[rest] = False
        of_entry = settled[self.group]
        have = np.zeros((len(self.images), parts))
        np.add.at(have, (self.label[of_entry], chosen[self.group[of_entry]]), self.count[of_entry])
        want = (self.images[:, None] * fractions - have).tolist()
        room = (len(self.group_of) * fractions - np.bincount(chosen[settled], self.size[settled], parts)).tolist()

        rarest = np.full(len(self.size), len(self.group_of) + 1)
        np.minimum.at(rarest, self.group, self.groups_with[self.label])
        rest = rest[np.lexsort((rng.random(len(rest)), -self.size[rest], rarest[rest]))]
        label, count, start, size = self.label.tolist(), self.count.tolist(), self.start.tolist(), self.size.tolist()
        open_parts = np.flatnonzero(fractions > 0).tolist()
        tie = rng.permutation(parts).tolist()
        for group in rest.tolist():
            entries = range(start[group], start[group + 1])
            rare = want[label[entries[0]]] if len(entries) else room
            second = want[label[entries[1]]] if len(entries) > 1 else room
            part = max(open_parts, key=lambda s: (rare[s], second[s], room[s], tie[s]))
            chosen[group] = part
            room[part] -= size[group]
            for entry in entries:
                want[label[entry]][part] -= count[entry]

    def _table(self, parts: np.ndarray, width: int) -> np.ndarray:
        """Groups with each label in each part: [C, parts]."""
        table = np.zeros((len(self.images), width), np.int64)
        np.add.at(table, (self.label, parts[self.group]), 1)
        return table

    def repair(self, parts: np.ndarray, least: Sequence[tuple[int, int]]) -> None:
        """Move groups until every label has its least number of groups in the parts named, where that is possible."""
        table = self._table(parts, 3)
        floor = np.zeros(3, np.int64)
        for part, number in least:
            floor[part] = number
        for part, _ in least:
            for label in np.flatnonzero((table[:, part] < floor[part]) & (self.groups_with > 0)).tolist():
                self._bring(label, part, parts, table, floor)

    def spread(self, parts: np.ndarray) -> None:
        """Move a group of every label that has all of its groups in one fold."""
        table = self._table(parts, int(parts.max(initial=0)) + 1)
        floor = np.zeros(table.shape[1], np.int64)
        for label in np.flatnonzero((table.max(axis=1) == self.groups_with) & (self.groups_with > 1)).tolist():
            crowded = int(table[label].argmax())
            if table[label, crowded] == self.groups_with[label]:
                others = table.sum(axis=0)
                others[crowded] = np.iinfo(np.int64).max
                target = int(others.argmin())
                floor[target] = 1
                self._bring(label, target, parts, table, floor)
                floor[target] = 0

    def _bring(self, label: int, part: int, parts: np.ndarray, table: np.ndarray, floor: np.ndarray) -> None:
        """Move the smallest groups with `label` into `part` that no label of theirs misses where they are."""
        candidates = self.group[self.label == label]
        for group in candidates[np.argsort(self.size[candidates], kind="stable")].tolist():
            if table[label, part] >= floor[part]:
                return
            origin = int(parts[group])
            own = self.label[self.start[group] : self.start[group + 1]]
            if origin != part and (table[own, origin] > floor[origin]).all():
                parts[group] = part
                table[own, origin] -= 1
                table[own, part] += 1
