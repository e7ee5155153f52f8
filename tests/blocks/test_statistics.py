"""Streaming statistics equal those of all rows at once, in any split and order."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.blocks.statistics import CHUNK, ClassMoments, check_rows, class_moments
from foveal.core.errors import DataError


def rows(n: int = 60, width: int = 5, classes: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, width, generator=generator, dtype=torch.float64) * 3 + 7
    y = torch.arange(n) % classes
    return X, y, torch.rand(n, generator=generator, dtype=torch.float64) + 0.5


def naive(X, y, weights, classes):
    weight, mean, variance = [], [], []
    for c in range(classes):
        x, w = X[y == c], weights[y == c][:, None]
        weight.append(w.sum())
        mean.append((w * x).sum(0) / w.sum())
        variance.append((w * (x - mean[-1]) ** 2).sum(0) / w.sum())
    return ClassMoments(torch.stack(weight), torch.stack(mean), torch.stack(variance))


def same(a: ClassMoments, b: ClassMoments, rtol: float = 1e-10) -> bool:
    pairs = ((a.weight, b.weight), (a.mean, b.mean), (a.variance, b.variance))
    return all(torch.allclose(left, right, rtol=rtol, atol=1e-300) for left, right in pairs)


def test_equals_a_loop_over_classes():
    X, y, w = rows()
    before = X.clone()
    assert same(class_moments(X, y, w, 3), naive(X, y, w, 3))
    assert torch.equal(X, before)


def test_chunks_do_not_show():
    X, y, w = rows(n=2 * CHUNK + 77)
    assert same(class_moments(X, y, w, 3), naive(X, y, w, 3))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=4), st.permutations(range(60)))
def test_any_split_and_order_merges_to_the_same(cuts: list[int], order: list[int]):
    X, y, w = rows()
    X, y, w = X[order], y[order], w[order]
    edges = [0, *sorted(cuts), 60]
    blocks = [class_moments(X[a:b], y[a:b], w[a:b], 3) for a, b in pairwise(edges) if b > a]
    total = blocks[-1]
    for block in reversed(blocks[:-1]):
        total = block.merge(total)
    assert same(total, naive(X, y, w, 3))


def test_merge_is_commutative_and_keeps_a_class_that_one_block_lacks():
    X, y, w = rows()
    first, second = class_moments(X[y < 2], y[y < 2], w[y < 2], 3), class_moments(X[y == 2], y[y == 2], w[y == 2], 3)
    assert float(first.weight[2]) == 0.0
    assert same(first.merge(second), second.merge(first))
    assert same(first.merge(second), naive(X, y, w, 3))


def test_float32_far_from_zero_keeps_its_variance():
    X = (torch.randn(5000, 3, generator=torch.Generator().manual_seed(1)) + 1e4).float()
    expected = X.double().var(0, correction=0)
    assert torch.allclose(class_moments(X).variance[0], expected, rtol=1e-10)
    naive32 = (X * X).mean(0) - X.mean(0) ** 2
    assert not torch.allclose(naive32.double(), expected, rtol=0.5), "this data would not catch the naive formula"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X, y, w: (X[:5], y, w), "disagree"),
        (lambda X, y, w: (X[0], y, w), "disagree"),
        (lambda X, y, w: (X.where(X < 9, torch.nan), y, w), "NaN or infinity"),
        (lambda X, y, w: (X, y, w * 0), "weights must be positive"),
        (lambda X, y, w: (X, y * 0, w), "at least two"),
        (lambda X, y, w: (X, y * 2, w), "class 1 has no image"),
        (lambda X, y, w: (X, y - 1, w), "the smallest is -1"),
        (lambda X, y, w: (X[:0], y[:0], w[:0]), "disagree"),
    ],
)
def test_bad_rows_are_refused_with_what_to_do(change, message: str):
    X, y, w = change(*rows())
    with pytest.raises(DataError, match=message):
        check_rows(X, y, w)


def test_several_labels_need_a_method_that_takes_them():
    X, y, w = rows()
    several = torch.nn.functional.one_hot(y, 3)
    assert check_rows(X, several, w) == 3
    with pytest.raises(DataError, match="several labels per image"):
        check_rows(X, several, w, several=False)
