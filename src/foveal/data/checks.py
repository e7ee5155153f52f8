"""What is wrong with a data set before anything is trained on it; and which images are copies of one another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

HAMMING = 8
"""Perceptual hashes of copies differ in at most this many of 64 bits (measured: 8 after halving and JPEG at 40)."""
HAMMING_ALONE = 2
"""The same without features to confirm by."""
COSINE = 0.99
"""Features of copies point the same way at least this closely."""


def near_duplicate_groups(phash: np.ndarray, X: np.ndarray | None = None) -> np.ndarray:
    """A group number for each image, int64 [n]: equal for images that are copies or near-copies of one another.

    Pairs with perceptual hashes within HAMMING bits are near-copies if the cosine of their features is at least
    COSINE; without features, if the hashes are within HAMMING_ALONE bits. Groups are chains of such pairs, numbered
    by their first image.

    Args:
        phash: uint64 [n].
        X: float [n, D] features, may be memory-mapped; rows are read as needed.
    """
    n = len(phash)
    phash = np.ascontiguousarray(phash, dtype=np.uint64)
    first, copy_of = exact_copies(phash, X)
    groups = Forest(len(first))
    unique = phash[first]
    for left, right in close_pairs(unique, HAMMING_ALONE if X is None else HAMMING):
        new = groups.root[left] != groups.root[right]
        left, right = left[new], right[new]
        if X is not None and len(left):
            alike = cosine(X, first[left], first[right]) >= COSINE
            left, right = left[alike], right[alike]
        groups.join(left, right)
    root = groups.root[copy_of]
    _, seen, number = np.unique(root, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(seen)).astype(np.int64)[number] if n else np.zeros(0, np.int64)


def exact_copies(phash: np.ndarray, X: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(first [m], copy_of [n]): image i has the hash and, to the bit, the features of image first[copy_of[i]]."""
    if X is None:
        _, first, copy_of = np.unique(phash, return_index=True, return_inverse=True)
        return first, copy_of
    seen: dict[bytes, int] = {}
    first: list[int] = []
    copy_of = np.empty(len(phash), np.int64)
    for row, bits in enumerate(phash.tolist()):
        key = hashlib.blake2b(X[row].tobytes(), digest_size=16, salt=bits.to_bytes(8, "little")).digest()
        copy_of[row] = seen.setdefault(key, len(first))
        if copy_of[row] == len(first):
            first.append(row)
    return np.array(first, np.int64), copy_of


def close_pairs(hashes: np.ndarray, radius: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of index pairs (left, right) of hashes at most `radius` bits apart; each pair at least once.

    Multi-index hashing (Norouzi, Punjani, Fleet 2012): cut 64 bits into radius + 1 chunks; hashes within the radius
    agree on at least one. Sorted by that chunk, candidates are neighbours.
    """
    n = len(hashes)
    edges = np.linspace(0, 64, radius + 2).astype(np.uint64)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        chunk = (hashes >> low) & ((np.uint64(1) << (high - low)) - np.uint64(1))
        order = np.argsort(chunk, kind="stable")
        chunk, ordered = chunk[order], hashes[order]
        alive, distance = np.arange(n), 1
        while len(alive):
            alive = alive[: np.searchsorted(alive, n - distance)]
            alive = alive[chunk[alive] == chunk[alive + distance]]
            near = alive[np.bitwise_count(ordered[alive] ^ ordered[alive + distance]) <= radius]
            if len(near):
                yield order[near], order[near + distance]
            distance += 1


def cosine(X: np.ndarray, left: np.ndarray, right: np.ndarray, block: int = 2048) -> np.ndarray:
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
        """Unite the sets of left[i] and right[i], for every i, by hooking larger roots under smaller until none is left."""
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
