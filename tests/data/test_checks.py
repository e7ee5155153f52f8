from __future__ import annotations

import numpy as np
import pytest

from foveal.data.checks import Forest, check, close_pairs, near_duplicate_groups
from foveal.data.dataset import Dataset, Memory
from foveal.data.scan import SCAN


def hashes(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, (n, 4), dtype=np.uint64)


def flip(value: np.ndarray, bits: int, seed: int = 0) -> np.ndarray:
    """The same hash [4] with so many bits changed."""
    changed = np.unpackbits(value.view(np.uint8))
    changed[np.random.default_rng(seed).permutation(256)[:bits]] ^= 1
    return np.packbits(changed).view(np.uint64)


def at_cosine(row: np.ndarray, cosine: float, seed: int = 0) -> np.ndarray:
    other = np.random.default_rng(seed).standard_normal(len(row))
    unit = row / np.linalg.norm(row)
    other -= (other @ unit) * unit
    other /= np.linalg.norm(other)
    return 3 * (cosine * unit + np.sqrt(1 - cosine**2) * other)


def make(n: int, classes: tuple[str, ...] = ("a", "b"), labels=None, task="single-label", set_aside=()) -> Dataset:
    labels = np.arange(n) % len(classes) if labels is None else np.asarray(labels)
    return Dataset("d", [f"{row}.png" for row in range(n)], labels, classes, task, None, Memory([]), set_aside)


def scanned(n: int, seed: int = 0) -> np.ndarray:
    table = np.zeros(n, SCAN)
    table["ok"], table["width"], table["height"], table["mean"], table["std"] = 1, 300, 200, 120, 40
    table["phash"] = hashes(n, seed)
    return table


@pytest.mark.parametrize("radius", [2, 16, 24])
def test_close_pairs_are_all_pairs_within_the_radius(radius):
    base = hashes(40)
    near = np.stack([flip(base[row % 40], row % 30, row) for row in range(300)])
    everything = np.concatenate([base, near])
    apart = np.bitwise_count(everything[:, None] ^ everything[None]).sum(axis=2)
    expected = {(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(apart <= radius, 1)), strict=True)}
    found, pairs = set(), 0
    for left, right, bits in close_pairs(everything, radius):
        assert (apart[left, right] == bits).all()
        found |= {(min(i, j), max(i, j)) for i, j in zip(left.tolist(), right.tolist(), strict=True)}
        assert len(set(zip(left.tolist(), right.tolist(), strict=True))) == len(left)
        pairs += len(left)
    assert found == expected
    assert pairs == len(expected)


def test_forest_agrees_with_a_naive_union():
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 300, 180), rng.integers(0, 300, 180)
    forest, naive = Forest(300), np.arange(300)
    for batch in np.array_split(np.arange(180), 4):
        forest.join(left[batch], right[batch])
    for a, b in zip(left, right, strict=True):
        naive[naive == naive[b]] = naive[a]
    assert ((forest.root[:, None] == forest.root[None]) == (naive[:, None] == naive[None])).all()
    assert (forest.root <= np.arange(300)).all()


def test_exact_copies_always_group():
    phash, X = hashes(50), np.random.default_rng(1).standard_normal((50, 8))
    copies = np.array([0, 7, 7, 49, 0, 0])
    groups = near_duplicate_groups(np.concatenate([phash, phash[copies]]), np.concatenate([X, X[copies]]))
    assert (groups[50:] == groups[copies]).all()
    assert len(np.unique(groups)) == 50
    assert (near_duplicate_groups(np.concatenate([phash, phash[copies]])) == groups).all()


def test_groups_are_numbered_as_they_appear():
    phash = hashes(3)
    assert near_duplicate_groups(phash[[2, 0, 2, 1, 0]]).tolist() == [0, 1, 0, 2, 1]
    assert near_duplicate_groups(phash[:0]).tolist() == []


@pytest.mark.parametrize(
    ("bits", "cosine", "together"),
    [
        (16, 0.7, True),
        (16, 0.3, False),
        (18, 0.9, False),
        (24, 0.98, True),
        (26, 0.999, False),
        (0, 0.3, False),
        (16, None, True),
        (18, None, False),
    ],
)
def test_hash_first_then_features(bits, cosine, together):
    one = hashes(1)[0]
    phash = np.stack([one, flip(one, bits)])
    X = None
    if cosine is not None:
        row = np.random.default_rng(2).standard_normal(64)
        X = np.stack([row, at_cosine(row, cosine)]).astype(np.float32)
    assert (len(np.unique(near_duplicate_groups(phash, X))) == 1) is together


def test_groups_do_not_depend_on_order():
    base = hashes(60)
    phash = np.concatenate([base, np.stack([flip(base[row % 20], 10, row) for row in range(40)])])
    groups = near_duplicate_groups(phash)
    order = np.random.default_rng(3).permutation(100)
    shuffled = near_duplicate_groups(phash[order])
    assert ((groups[order][:, None] == groups[order][None]) == (shuffled[:, None] == shuffled[None])).all()


def test_memory_mapped_features(tmp_path):
    phash = np.concatenate([hashes(30), hashes(30)[:5]])
    X = np.random.default_rng(0).standard_normal((35, 16)).astype(np.float32)
    X[30:] = X[:5]
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    assert (near_duplicate_groups(phash, mapped) == near_duplicate_groups(phash, X)).all()


def test_fifty_thousand_images():
    phash = hashes(50_000)
    phash[1000:1100] = phash[:100]
    groups = near_duplicate_groups(phash)
    assert len(np.unique(groups)) == 49_900


def test_a_pile_of_blank_pictures_is_no_trap():
    phash = np.zeros((20_000, 4), np.uint64)
    X = np.random.default_rng(0).standard_normal((20_000, 16)).astype(np.float32) + 4
    assert len(np.unique(near_duplicate_groups(phash, X))) == 1


def test_equal_hashes_of_different_pictures_stay_apart():
    X = np.random.default_rng(0).standard_normal((600, 16)).astype(np.float32)
    cosines = (X @ X.T) / np.outer(np.linalg.norm(X, axis=1), np.linalg.norm(X, axis=1))
    groups = near_duplicate_groups(np.zeros((600, 4), np.uint64), X)
    assert (groups[:, None] == groups[None])[cosines >= 0.6001].all()
    X = np.eye(12, dtype=np.float32)
    assert len(np.unique(near_duplicate_groups(np.zeros((12, 4), np.uint64), X))) == 12


def test_nothing_found_in_clean_data():
    found = check(make(40), scanned(40), np.arange(40))
    assert not any(found.values())


def test_corrupt_images_are_named():
    dataset = make(40, set_aside=(("x.jpg", "truncated"),))
    assert check(dataset, scanned(40), np.arange(40))["corrupt"] == [
        {"images": ["x.jpg"], "message": "x.jpg: truncated"}
    ]


def test_copies_leaks_and_conflicts():
    table = scanned(40)
    table["phash"][1] = table["phash"][3]
    groups = np.arange(40)
    groups[3] = groups[1]
    groups[10] = groups[11] = groups[12]
    splits = np.array(["train"] * 11 + ["test"] * 29)
    found = check(make(40), table, groups, splits=splits)
    assert found["duplicate"] == [{"images": ["1.png", "3.png"], "message": "2 images show the same: 1.png, 3.png"}]
    assert found["near_duplicate"][0]["images"] == ["10.png", "11.png", "12.png"]
    assert found["leak"] == [
        {"images": ["10.png", "11.png", "12.png"], "message": "copies in test and train: 10.png, 11.png, 12.png"}
    ]
    assert [item["message"] for item in found["conflicting_label"]] == [
        "nearly the same with different labels: 10.png (a), 11.png (b), 12.png (a)"
    ]


def test_equal_hashes_with_other_features_are_near_not_exact():
    table = scanned(40)
    table["phash"][1] = table["phash"][0]
    X = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    X[1] = at_cosine(X[0], 0.95)
    groups = near_duplicate_groups(table["phash"], X)
    found = check(make(40), table, groups, X)
    assert found["duplicate"] == []
    assert found["near_duplicate"][0]["images"] == ["0.png", "1.png"]


def test_suspicious_labels_find_those_that_were_swapped():
    rng = np.random.default_rng(0)
    truth = np.arange(300) % 3
    given = truth.copy()
    swapped = rng.permutation(300)[:12]
    given[swapped] = (given[swapped] + 1) % 3
    logits = 7 * np.eye(3)[truth] + rng.standard_normal((300, 3))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    probabilities[7] = np.nan
    dataset = make(300, ("ant", "bee", "cat"), given)
    listed = check(dataset, scanned(300), np.arange(300), probabilities=probabilities)["suspicious_label"]
    named = {int(item["images"][0].removesuffix(".png")) for item in listed}
    assert named <= set(swapped.tolist())
    assert len(named) >= 10
    sureness = [item["probability"] for item in listed]
    assert sureness == sorted(sureness, reverse=True)
    row = int(listed[0]["images"][0].removesuffix(".png"))
    names = dataset.classes
    assert listed[0]["message"].startswith(
        f"{row}.png is labelled {names[given[row]]} but looks like {names[truth[row]]}"
    )


def test_suspicious_labels_of_several():
    truth = np.zeros((60, 2), np.uint8)
    truth[::2, 0] = truth[::3, 1] = 1
    given = truth.copy()
    given[4, 0], given[5, 1] = 0, 1
    probabilities = np.where(truth, 0.97, 0.03)
    dataset = make(60, ("red", "round"), given, "multi-label")
    listed = check(dataset, scanned(60), np.arange(60), probabilities=probabilities)["suspicious_label"]
    assert sorted(item["message"] for item in listed) == [
        "4.png is not labelled red but looks like it (probability 0.97)",
        "5.png is labelled round but does not look like it (probability 0.97)",
    ]


def test_class_sizes():
    dataset = make(226, ("a", "b", "c", "d"), [0] * 200 + [1] * 20 + [2] * 6)
    splits = np.array(["train"] * 220 + ["test"] * 6)
    found = check(dataset, scanned(226), np.arange(226), splits=splits)
    assert [item["message"].split()[1] for item in found["imbalance"]] == ["b", "c", "d"]
    assert [item["message"] for item in found["few_images"]] == [
        "class c has 6 distinct images: add some",
        "class d has 0 distinct images: add some",
    ]
    assert {item["message"] for item in found["missing_class"]} == {
        "class a has no image in test",
        "class b has no image in test",
        "class c has no image in train",
    }


def test_picture_sizes():
    table = scanned(40)
    table["width"][1], table["height"][1] = 20, 24
    table["width"][2] = 2000
    table["width"][3], table["height"][3] = 6000, 4000
    table["std"][4] = 0.2
    found = check(make(40), table, np.arange(40))
    assert [item["images"] for item in found["tiny"]] == [["1.png"]]
    assert [item["images"] for item in found["odd_size"]] == [["2.png"], ["3.png"]]
    assert [item["images"] for item in found["blank"]] == [["4.png"]]


def test_data_of_tiny_pictures_gets_one_line():
    table = scanned(40)
    table["width"] = table["height"] = 8
    found = check(make(40), table, np.arange(40))
    assert [item["images"] for item in found["tiny"]] == [[]]
    assert "much enlarged" in found["tiny"][0]["message"]
