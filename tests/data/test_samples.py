from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from foveal.core.errors import DataError, MissingExtra
from foveal.data import samples
from foveal.data.checks import cosine
from foveal.data.open import open_dataset
from foveal.data.scan import scan


@pytest.mark.parametrize(
    ("name", "counts", "size"),
    [
        ("elpv", {"defective": 821, "functional": 1803}, (300, 300)),
        ("elpv-type", {"mono": 1074, "poly": 1550}, (300, 300)),
        ("textile", {"global": 500, "local": 500, "nominal": 1000}, (250, 250)),
        (
            "digits",
            {str(digit): count for digit, count in enumerate([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])},
            (32, 32),
        ),
    ],
)
def test_samples(name, counts, size):
    dataset = open_dataset(f"sample:{name}")
    assert dict(zip(dataset.classes, np.bincount(dataset.labels).tolist(), strict=True)) == counts
    assert len(set(dataset.ids)) == len(dataset) == sum(counts.values())
    assert dataset.image(0).size == dataset.image(len(dataset) - 1).size == size
    row = next(row for row in samples.samples() if row["name"] == name)
    assert row["images"] == len(dataset)
    assert row["classes"] == list(dataset.classes)
    assert row["installed"] is True
    assert row["licence"]


def test_elpv_labels_are_those_of_its_table():
    dataset = open_dataset("sample:elpv")
    types = open_dataset("sample:elpv-type")
    table = Path(dataset.source.root, "labels.csv").read_text().split()
    for row in (0, 3, 77, 1500, 2623):
        path, probability, kind = table[3 * row : 3 * row + 3]
        assert dataset.ids[row] == types.ids[row] == path
        assert dataset.classes[dataset.labels[row]] == ("defective" if float(probability) >= 0.5 else "functional")
        assert types.classes[types.labels[row]] == kind


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    images, target = load_digits(return_X_y=True)
    dataset = open_dataset("sample:digits")
    for row in (0, 1000, 1796):
        pixels = np.asarray(dataset.image(row))[::4, ::4, 0]
        assert (np.rint(images[row].reshape(8, 8) * 255 / 16) == pixels).all()
        assert dataset.classes[dataset.labels[row]] == str(target[row])


def test_no_sample_of_files_is_read_when_it_is_opened():
    tracemalloc.start()
    open_dataset("sample:elpv")
    open_dataset("sample:textile")
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()


def test_elpv_shows_fifty_cells_twice():
    """Cells 1735 to 1784 were photographed again as 2277 to 2326, out of focus."""
    dataset = open_dataset("sample:elpv")
    first = [dataset.ids.index(f"images/cell{number:04d}.png") for number in range(1735, 1784, 8)]
    hashes = np.stack([scan(dataset.image(row))["phash"] for row in [*first, *[row + 542 for row in first]]])
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(axis=2)
    pairs = np.arange(len(first))
    assert (apart[pairs, pairs + len(first)] <= 18).all()
    apart[pairs, pairs + len(first)] = apart[pairs + len(first), pairs] = 256
    np.fill_diagonal(apart, 256)
    assert apart.min() > 24


def test_textile_numbers_mean_nothing_across_classes():
    dataset = open_dataset("sample:textile")
    rows = [dataset.ids.index(f"{name}/textile_0007.jpg") for name in ("global", "local", "nominal")]
    pixels = np.stack([np.asarray(dataset.image(row), np.float32)[..., 0].ravel() for row in rows])
    pixels -= pixels.mean(axis=1, keepdims=True)
    assert cosine(pixels, np.array([0, 0, 1]), np.array([1, 2, 2])).max() < 0.25


def test_unknown_sample():
    with pytest.raises(DataError, match=r"sample:cats is unknown: expected one of sample:elpv, sample:elpv-type"):
        open_dataset("sample:cats")


def test_sample_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(samples, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"sample:elpv needs elpv-dataset.*pip install 'foveal\[samples\]'"):
        open_dataset("sample:elpv")
    assert not any(row["installed"] for row in samples.samples())
