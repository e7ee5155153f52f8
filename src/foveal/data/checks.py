"""What is wrong with a data set before anything is trained on it; and which images are copies of one another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

SAME = (16, 0.6)
"""A copy: perceptual hashes (256 bits) at most 16 bits apart, features (where given) at least this cosine.

Halving or JPEG at quality 75 moves up to 14 bits in 95 of 100 photos, and features to a cosine of 0.7. Of the 50 cells
that sample:elpv shows twice, in focus and out of focus, 49 are within 16 bits; no pair of sample:textile is within 70.
"""
ALIKE = (24, 0.97)
"""Nearly a copy, such as a picture shifted by a hundredth: further apart in bits, but not in features."""


def near_duplicate_groups(phash: np.ndarray, X: np.ndarray | None = None) -> np.ndarray:
    """A group number for each image, int64 [n]: equal for images that are copies or near-copies of one another.

    Pairs close in perceptual hash are confirmed by the cosine of their features (SAME, ALIKE); without features SAME
    decides by the hash alone. Groups are chains of such pairs, numbered in the order of their first images.

    Args:
        phash: uint64 [n, 4] (`SCAN["phash"]`), or any number of 64-bit words.
        X: float [n, D] features, may be memory-mapped; rows are read as needed.
    """
    phash = np.ascontiguousarray(phash, dtype=np.uint64).reshape(len(phash), -1)
    first, copy_of = exact_copies(phash, X)
    groups = Forest(len(first))
    for left, right, apart in close_pairs(phash[first], SAME[0] if X is None else ALIKE[0]):
        new = groups.root[left] != groups.root[right]
        if X is not None:
            left, right, apart = left[new], right[new], apart[new]
            alike = cosine(X, first[left], first[right])
            new = (alike >= ALIKE[1]) | ((apart <= SAME[0]) & (alike >= SAME[1]))
        groups.join(left[new], right[new])
    _, seen, number = np.unique(groups.root[copy_of], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(seen))[number].astype(np.int64)


def exact_copies(phash: np.ndarray, X: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
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
    """Batches of (left, right, bits apart) of all pairs of hashes [n, words] at most `radius` bits apart.

    Multi-index hashing (Norouzi, Punjani, Fleet 2012): cut the bits into radius + 1 chunks; hashes within the radius
    agree on at least one. Sorted by that chunk, candidates are neighbours. A pair may come up more than once.
    """
    n, words = hashes.shape
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    for chunk_bits in np.array_split(np.arange(64 * words), radius + 1):
        packed = np.packbits(bits[:, chunk_bits], axis=1)
        chunk = np.zeros(n, np.uint64)
        for column in packed.T:
            chunk = (chunk << np.uint64(8)) | column
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
            if len(near):
                yield order[near], order[near + distance], apart
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
