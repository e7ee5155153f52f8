from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.core.errors import DataError, UsageError
from foveal.data.split import folds, make_split


def sides(split, groups):
    return [set(split[groups == group]) for group in np.unique(groups)]


@st.composite
def single_label(draw):
    """Labels and groups: every class has at least three groups of its own, further groups may mix classes."""
    classes = draw(st.integers(2, 5))
    own = [(label, 1 + draw(st.integers(0, 2))) for label in range(classes) for _ in range(draw(st.integers(3, 12)))]
    labels = [label for label, size in own for _ in range(size)]
    groups = [group for group, (_, size) in enumerate(own) for _ in range(size)]
    for group in range(draw(st.integers(0, 4))):
        mixed = draw(st.lists(st.integers(0, classes - 1), min_size=2, max_size=4))
        labels += mixed
        groups += [len(own) + group] * len(mixed)
    order = draw(st.permutations(range(len(labels))))
    return np.array(labels)[order], np.array(groups)[order]


@settings(max_examples=60, deadline=None)
@given(single_label(), st.integers(0, 2**40))
def test_split_properties(data, seed):
    labels, groups = data
    split = make_split(labels, groups, seed)
    assert set(split) <= {"train", "val", "test"}
    assert all(len(side) == 1 for side in sides(split, groups))
    for label in np.unique(labels):
        assert (split[labels == label] == "test").any()
        outside = (labels == label) & (split != "test")
        assert len(np.unique(groups[outside])) >= 2
        assert (split[labels == label] == "train").any()
    assert (split == make_split(labels, groups, seed)).all()


@settings(max_examples=60, deadline=None)
@given(single_label(), st.integers(2, 6), st.integers(0, 2**40))
def test_fold_properties(data, k, seed):
    labels, groups = data
    fold = folds(labels, groups, k, seed)
    assert fold.dtype == np.int64
    assert fold.min() >= 0
    assert fold.max() < k
    assert all(len(side) == 1 for side in sides(fold, groups))
    for label in np.unique(labels):
        assert len(np.unique(fold[labels == label])) >= 2


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(20, 120), st.floats(0.1, 0.6), st.integers(0, 2**40))
def test_multi_label_split_properties(classes, n, density, seed):
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, classes)) < density).astype(np.uint8)
    labels[:3] = 1
    groups = np.concatenate([np.arange(10), rng.integers(0, n, n - 10) + n])
    split = make_split(labels, groups, seed)
    assert all(len(side) == 1 for side in sides(split, groups))
    for label in range(classes):
        own = labels[:, label] == 1
        assert (split[own] == "test").any()
        assert (split[own] == "train").any()


@pytest.mark.parametrize("counts", [[400, 400], [1000, 100, 20], [60] * 30])
def test_single_images_are_stratified_to_the_image(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    split = make_split(labels, np.arange(len(labels)), 3)
    for label, count in enumerate(counts):
        for part, fraction in (("test", 0.25), ("val", 0.1), ("train", 0.65)):
            assert abs((split[labels == label] == part).sum() - fraction * count) < 1


def test_groups_keep_the_fractions():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 5000)
    groups = rng.integers(0, 2000, 5000)
    split = make_split(labels, groups, 0)
    for part, fraction in (("test", 0.25), ("val", 0.1)):
        assert abs((split == part).mean() - fraction) < 0.01
        for label in range(10):
            assert abs((split[labels == label] == part).mean() - fraction) < 0.02


def test_many_labels_keep_the_fractions():
    rng = np.random.default_rng(0)
    labels = (rng.random((4000, 30)) < np.linspace(0.005, 0.5, 30)).astype(np.uint8)
    split = make_split(labels, np.arange(4000), 0)
    share = labels[split == "test"].sum(axis=0) / labels.sum(axis=0)
    assert np.abs(share - 0.25).max() < 0.03


def test_folds_are_even_and_stratified():
    labels = np.repeat([0, 1, 2], [100, 53, 12])
    fold = folds(labels, np.arange(165), 5, 0)
    for label in range(3):
        counts = np.bincount(fold[labels == label], minlength=5)
        assert np.ptp(counts) <= 1
    assert np.ptp(np.bincount(fold)) <= 2


def test_seeds_differ_and_names_of_groups_do_not_matter():
    labels = np.repeat([0, 1], 50)
    groups = np.arange(100) // 2
    split = make_split(labels, groups, 0)
    assert (split != make_split(labels, groups, 1)).any()
    assert (split == make_split(labels, 10**12 - 7 * groups, 0)).all()


def test_stored_order_does_not_leak_into_the_split():
    labels = np.repeat([0, 1], 500)
    where = np.flatnonzero(make_split(labels, np.arange(1000), 0) == "test")
    assert abs(np.median(where % 500) - 250) < 60
    assert np.ptp(where % 500) > 450


def test_without_a_test_part():
    labels = np.repeat([0, 1], [40, 1])
    split = make_split(labels, np.arange(41), 0, test=0.0, val=0.125)
    assert set(split) == {"train", "val"}
    assert split[40] == "train"
    assert (split == "val").sum() == 5


@pytest.mark.parametrize("images", [1, 2])
def test_a_class_with_too_few_images(images):
    labels = np.repeat([0, 1], [20, images])
    word = "image" if images == 1 else "images"
    message = f"class dog has {images} {word}; at least 3 needed .2 to train on and 1 to test.: add images or remove"
    with pytest.raises(DataError, match=message):
        make_split(labels, np.arange(len(labels)), 0, classes=("cat", "dog"))


def test_a_class_that_is_one_photo_many_times():
    labels = np.repeat([0, 1], [20, 6])
    groups = np.concatenate([np.arange(20), np.full(6, 99)])
    with pytest.raises(DataError, match="class 1 has 6 images of which 1 is distinct, the others near-duplicates"):
        make_split(labels, groups, 0)


def test_a_class_that_vanished():
    with pytest.raises(DataError, match="class owl has 0 images"):
        make_split(np.repeat([0, 1], 10), np.arange(20), 0, classes=("cat", "dog", "owl"))


@pytest.mark.parametrize(("labels", "message"), [([0] * 9, "all 9 images are of class cat"), ([], "all 0 images")])
def test_one_class(labels, message):
    with pytest.raises(DataError, match=f"{message}.*expected at least two classes"):
        make_split(np.array(labels, np.int64), np.arange(len(labels)), 0, classes=("cat",))


def test_folds_of_a_class_with_one_image():
    with pytest.raises(DataError, match=r"class b has 1 image; at least 2 needed \(one to learn from"):
        folds(np.array([0, 0, 0, 1]), np.arange(4), 2, 0, classes=("a", "b"))


def test_fractions_that_leave_nothing():
    with pytest.raises(UsageError, match=r"test=0.9, val=0.1"):
        make_split(np.array([0, 1]), np.arange(2), 0, test=0.9)
    with pytest.raises(UsageError, match="expected at least 2"):
        folds(np.array([0, 1]), np.arange(2), 1, 0)


def test_sixty_thousand_images_in_groups():
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 100, 60_000), rng.integers(0, 50_000, 60_000)
    split = make_split(labels, groups, 0)
    assert len(np.unique(np.stack([groups, split == "test"]), axis=1).T) == len(np.unique(groups))
    assert abs((split == "test").mean() - 0.25) < 0.01
