"""What is wrong with a data set before anything is trained on it; and which images are copies of one another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from foveal.data.dataset import Dataset

SAME = (16, 0.6)
"""A copy: perceptual hashes (256 bits) at most 16 bits apart, features (where given) at least this cosine.

Halving or JPEG at quality 75 moves up to 14 bits in 95 of 100 photos, and features to a cosine of 0.7. Of the 50 cells
that sample:elpv shows twice, in focus and out of focus, 49 are within 16 bits; no pair of sample:textile is within 70.
"""
ALIKE = (24, 0.97)
"""Nearly a copy, such as a picture shifted by a hundredth: further apart in bits, but not in features."""


class Features(Protocol):
    """Features [n, D], in memory or on disk: rows are read as they are asked for."""

    def __getitem__(self, index: Any, /) -> Any: ...


def near_duplicate_groups(phash: np.ndarray, X: Features | None = None) -> np.ndarray:
    """A group number for each image, int64 [n]: equal for images that are copies or near-copies of one another.

    Pairs close in perceptual hash are confirmed by the cosine of their features (SAME, ALIKE); without features SAME
    decides by the hash alone. Groups are chains of such pairs, numbered in the order of their first images.

    Args:
        phash: uint64 [n, 4], the hashes of `scan`.
        X: float [n, D] features, may be memory-mapped; rows are read as needed.
    """
    if not len(phash):
        return np.zeros(0, np.int64)
    phash = np.ascontiguousarray(phash)
    first, copy_of = exact_copies(phash, X)
    hashes, groups = phash[first], Forest(len(first))

    def join(left: np.ndarray, right: np.ndarray, apart: np.ndarray) -> None:
        new = groups.root[left] != groups.root[right]
        left, right, apart = left[new], right[new], apart[new]
        if X is not None:
            alike = cosine(X, first[left], first[right])
            kept = (alike >= ALIKE[1]) | ((apart <= SAME[0]) & (alike >= SAME[1]))
            left, right = left[kept], right[kept]
        groups.join(left, right)

    # Pictures of one colour share a hash: those with like features are joined first, and one then stands for all.
    order = np.lexsort(hashes.T)
    equal = np.flatnonzero((hashes[order[:-1]] == hashes[order[1:]]).all(axis=1))
    join(order[equal], order[equal + 1], np.zeros(len(equal), np.int64))
    _, leaders = np.unique(np.column_stack([hashes, groups.root.astype(np.uint64)]), axis=0, return_index=True)
    for left, right, apart in close_pairs(hashes[leaders], SAME[0] if X is None else ALIKE[0]):
        join(leaders[left], leaders[right], apart)
    _, seen, number = np.unique(groups.root[copy_of], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(seen))[number].astype(np.int64)


def exact_copies(phash: np.ndarray, X: Features | None) -> tuple[np.ndarray, np.ndarray]:
    """(first [m], copy_of [n]): image i has the hash and, to the bit, the features of image first[copy_of[i]]."""
    words = np.dtype((np.void, phash.dtype.itemsize * phash.shape[1]))
    _, key, count = np.unique(phash.view(words)[:, 0], return_inverse=True, return_counts=True)
    if X is not None:
        known: dict[tuple[int, bytes], int] = {}
        for row in np.flatnonzero(count[key] > 1).tolist():
            features = hashlib.blake2b(X[row].tobytes(), digest_size=16).digest()
            key[row] = known.setdefault((int(key[row]), features), len(count) + row)
    _, first, copy_of = np.unique(key, return_index=True, return_inverse=True)
    return first, copy_of


def close_pairs(hashes: np.ndarray, radius: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of (left, right, bits apart): every pair of hashes [n, words] at most `radius` bits apart, once.

    Multi-index hashing (Norouzi, Punjani, Fleet 2012): deal the bits into radius + 1 chunks; hashes within the radius
    agree on at least one. Sorted by that chunk, candidates are neighbours. Bits are dealt by their entropy, so that no
    chunk is nearly constant where all pictures look alike.
    """
    n, words = hashes.shape
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    evenness = np.abs(bits.mean(axis=0) - 0.5)
    weights = np.uint64(1) << np.arange(64, dtype=np.uint64)
    dealt = [np.argsort(evenness, kind="stable")[start :: radius + 1][:64] for start in range(radius + 1)]
    chunks = np.stack([bits[:, chunk] @ weights[: len(chunk)] for chunk in dealt])
    for number, chunk in enumerate(chunks):
        order = np.argsort(chunk, kind="stable")
        chunk, ordered = chunk[order], hashes[order]
        alive, distance = np.arange(n), 1
        while len(alive):
            alive = alive[: np.searchsorted(alive, n - distance)]
            alive = alive[chunk[alive] == chunk[alive + distance]]
            near, apart = alive, np.zeros(len(alive), np.int64)
            for word in range(words):
                apart = apart + np.bitwise_count(ordered[near, word] ^ ordered[near + distance, word])
                kept = apart <= radius
                near, apart = near[kept], apart[kept]
            left, right = order[near], order[near + distance]
            new = (chunks[:number, left] != chunks[:number, right]).all(axis=0)
            if new.any():
                yield left[new], right[new], apart[new]
            distance += 1


def cosine(X: Features, left: np.ndarray, right: np.ndarray, block: int = 2048) -> np.ndarray:
    """Cosine of the rows left[i] and right[i] of X; rows are gathered a block at a time."""
    result = np.empty(len(left), np.float32)
    for start in range(0, len(left), block):
        a, b = (np.asarray(X[rows[start : start + block]], np.float32) for rows in (left, right))
        scale = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        result[start : start + block] = np.einsum("nd,nd->n", a, b) / np.maximum(scale, 1e-12)
    return result


class Forest:
    """Disjoint sets: `root[i]` is the smallest member of the set of i."""

    def __init__(self, n: int) -> None:
        self.root = np.arange(n)

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        """Unite the sets of left[i] and right[i], for every i; larger roots go under smaller ones."""
        while len(left):
            a, b = self.root[left], self.root[right]
            differ = a != b
            left, right = left[differ], right[differ]
            low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
            np.minimum.at(self.root, high, low)
            while True:
                shorter = self.root[self.root]
                if (shorter == self.root).all():
                    break
                self.root = shorter


Findings = dict[str, list[dict[str, Any]]]

TINY = 32
"""Pixels on the shorter side below which an image is called tiny."""
IMBALANCE = 10
"""A class is rare if the most frequent one has this many times its images."""
FEW = 10
"""Fewer distinct images than this say little about a class, balanced or not."""
SURE = 0.9
"""A label is also suspicious if every class but it shares less than 1 - SURE of the probability."""


def check(
    dataset: Dataset,
    scan: np.ndarray,
    groups: np.ndarray,
    X: Features | None = None,
    probabilities: np.ndarray | None = None,
    splits: np.ndarray | None = None,
) -> Findings:
    """Findings by kind; each has `images` (ids) and a `message`.

    Kinds: corrupt, duplicate (same picture, to the bit), near_duplicate, leak (copies in two splits), conflicting_label
    (copies with different labels), suspicious_label, imbalance, few_images, missing_class, tiny, odd_size, blank.

    Args:
        scan: SCAN records [n].
        groups: int64 [n], from `near_duplicate_groups`.
        X: features [n, D]; tell exact copies from near ones.
        probabilities: [n, C] from models that did not see the image; rows of NaN are left out.
        splits: 'train', 'val', 'test' per image, where the data say so.
    """
    return {
        "corrupt": [found([name], f"{name}: {reason}") for name, reason in dataset.set_aside],
        **copies(dataset, scan, groups, X, splits),
        "suspicious_label": [] if probabilities is None else suspicious_labels(dataset, probabilities),
        **class_sizes(dataset, groups, splits),
        **picture_sizes(dataset, scan),
    }


def found(images: Sequence[str], message: str) -> dict[str, Any]:
    return {"images": list(images), "message": message}


def few(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def labels_of(dataset: Dataset, row: int) -> str:
    if dataset.task == "single-label":
        return dataset.classes[int(dataset.labels[row])]
    return "|".join(dataset.classes[index] for index in np.flatnonzero(dataset.labels[row])) or "(none)"


def copies(
    dataset: Dataset, scan: np.ndarray, groups: np.ndarray, X: Features | None, splits: np.ndarray | None
) -> Findings:
    """Groups of copies: exact or near, on both sides of a split, with different labels."""
    result: Findings = {kind: [] for kind in ("duplicate", "near_duplicate", "leak", "conflicting_label")}
    _, exact = exact_copies(np.ascontiguousarray(scan["phash"]), X)
    order = np.argsort(groups, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        if len(rows) < 2:
            continue
        names = [dataset.ids[int(row)] for row in rows]
        kind, what = ("near_duplicate", "nearly the same") if np.ptp(exact[rows]) else ("duplicate", "the same")
        result[kind].append(found(names, f"{len(rows)} images show {what}: {few(names)}"))
        if splits is not None and len(sides := sorted({str(split) for split in splits[rows]})) > 1:
            result["leak"].append(found(names, f"copies in {' and '.join(sides)}: {few(names)}"))
        labels = [labels_of(dataset, int(row)) for row in rows]
        if len(set(labels)) > 1:
            listed = [f"{name} ({label})" for name, label in zip(names, labels, strict=True)]
            result["conflicting_label"].append(found(names, f"{what} with different labels: {few(listed)}"))
    return result


def suspicious_labels(dataset: Dataset, probabilities: np.ndarray) -> list[dict[str, Any]]:
    """Labels that held-out models contradict, most doubtful first.

    Confident learning (Northcutt, Jiang, Chuang 2021): the threshold of class j is the mean probability of j over
    images labelled j; an image labelled i is counted to the most probable class above its threshold, and is suspicious
    if that is not i and the model is SURE it is not i. With several labels per image, each label is such a question.
    """
    known = np.flatnonzero(np.isfinite(probabilities).all(axis=1))
    if dataset.task == "single-label":
        given = dataset.labels
        pairs = _doubts(probabilities[known], given[known])
        doubts = [(doubt, int(known[row]), int(given[known[row]]), other) for doubt, row, other in pairs]
    else:
        doubts = []
        for label in range(len(dataset.classes)):
            yes = probabilities[known, label]
            given = dataset.labels[known, label].astype(np.int64)
            for doubt, row, other in _doubts(np.stack([1 - yes, yes], axis=1), given):
                doubts.append((doubt, int(known[row]), label, label if other else -1))
    listed: list[dict[str, Any]] = []
    for doubt, row, label, other in sorted(doubts, reverse=True):
        name = dataset.ids[row]
        if dataset.task == "single-label":
            text = f"{name} is labelled {dataset.classes[label]} but looks like {dataset.classes[other]}"
        elif other < 0:
            text = f"{name} is labelled {dataset.classes[label]} but does not look like it"
        else:
            text = f"{name} is not labelled {dataset.classes[label]} but looks like it"
        listed.append({**found([name], f"{text} (probability {doubt:.2f})"), "probability": round(doubt, 4)})
    return listed


def _doubts(probabilities: np.ndarray, given: np.ndarray) -> list[tuple[float, int, int]]:
    """(probability of the other class, row, other class) of rows whose label confident learning contradicts."""
    rows, classes = np.arange(len(given)), probabilities.shape[1]
    own = probabilities[rows, given]
    counts = np.bincount(given, minlength=classes)
    threshold = np.bincount(given, own, classes) / np.maximum(counts, 1)
    threshold[counts == 0] = np.inf
    above = np.where(probabilities >= threshold, probabilities, -1.0)
    other = above.argmax(axis=1)
    doubtful = np.flatnonzero((above[rows, other] >= 0) & (other != given) & (own < 1 - SURE))
    return [(float(probabilities[row, other[row]]), int(row), int(other[row])) for row in doubtful]


def class_sizes(dataset: Dataset, groups: np.ndarray, splits: np.ndarray | None) -> Findings:
    """Classes that are rare beside the others, small at all, or missing from a split."""
    labels = dataset.labels
    if dataset.task == "single-label":
        labels = labels[:, None] == np.arange(len(dataset.classes))
    counts = labels.astype(bool).sum(axis=0)
    result: Findings = {"imbalance": [], "few_images": [], "missing_class": []}
    for index, name in enumerate(dataset.classes):
        own = np.flatnonzero(labels[:, index])
        distinct = len(np.unique(groups[own]))
        if counts[index] * IMBALANCE <= counts.max():
            text = f"class {name} has {counts[index]} images, the most frequent {counts.max()}: keep class weights on"
            result["imbalance"].append(found([], text))
        if distinct < FEW:
            text = f"class {name} has {distinct} distinct image{'s' if distinct != 1 else ''}: add some"
            result["few_images"].append(found([dataset.ids[row] for row in own.tolist()], text))
        if splits is None or not len(own):
            continue
        for split in sorted(set(splits.tolist()) - set(splits[own].tolist())):
            result["missing_class"].append(found([], f"class {name} has no image in {split}"))
    return result


def picture_sizes(dataset: Dataset, scan: np.ndarray) -> Findings:
    """Pictures that are tiny, much longer than wide, far from the usual size, or of one colour."""
    result: Findings = {"tiny": [], "odd_size": [], "blank": []}
    if not len(scan):
        return result
    width, height = scan["width"].astype(float), scan["height"].astype(float)
    short, long = np.minimum(width, height), np.maximum(width, height)
    pixels = np.sqrt(width * height)
    usual = float(np.median(pixels))
    typical_tiny = np.median(short) < TINY
    for row in np.flatnonzero(short < TINY).tolist() if not typical_tiny else []:
        text = f"{dataset.ids[row]} has only {width[row]:.0f} x {height[row]:.0f} pixels"
        result["tiny"].append(found([dataset.ids[row]], text))
    if typical_tiny:
        text = f"half of the images are smaller than {TINY} pixels: a backbone sees them much enlarged"
        result["tiny"].append(found([], text))
    odd = (long > 4 * short) | (pixels > 8 * usual) | ((pixels * 8 < usual) & (short >= TINY))
    for row in np.flatnonzero(odd).tolist():
        text = (
            f"{dataset.ids[row]} has {width[row]:.0f} x {height[row]:.0f} pixels, most about {usual:.0f} x {usual:.0f}"
        )
        result["odd_size"].append(found([dataset.ids[row]], text))
    for row in np.flatnonzero(scan["std"] < 1.0).tolist():
        text = f"{dataset.ids[row]} is of one colour (grey {scan['mean'][row]:.0f}, spread {scan['std'][row]:.1f})"
        result["blank"].append(found([dataset.ids[row]], text))
    return result
