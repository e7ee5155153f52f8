"""The library: what is added is found, exactly or in cells; damage, other widths and missing extras are told."""

import sys
from pathlib import Path

import numpy as np
import pytest

from foveal.core.errors import BundleError, MissingExtra, UsageError
from foveal.ship import library as room
from foveal.ship.library import Library, Rows, create_library, open_library


def unit(n: int, width: int = 16, seed: int = 0) -> np.ndarray:
    X = np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)
    return X / np.linalg.norm(X, axis=1, keepdims=True)


def rows(X: np.ndarray, prefix: str = "i") -> Rows:
    n = len(X)
    ids = [f"{prefix}{row}" for row in range(n)]
    labels = [None if row % 3 == 0 else f"l{row % 3}" for row in range(n)]
    return Rows(ids, labels, [None] * n, [bytes([row % 256]) * 32 for row in range(n)], X)


def made(path: Path, X: np.ndarray) -> Library:
    library = create_library(path, {"width": X.shape[1], "sources": {}})
    library.add("here", rows(X))
    library.finish()
    return library


def test_the_nearest_by_a_loop(tmp_path: Path):
    X, queries = unit(200), unit(7, seed=1)
    made(tmp_path / "l", X)
    library = open_library(tmp_path / "l")
    found, similar = library.search(queries, 5)
    for query, numbers, values in zip(queries, found, similar, strict=True):
        scores = [float((query * x).sum()) for x in X]
        expected = sorted(range(200), key=lambda row: -scores[row])[:5]
        assert numbers.tolist() == expected
        assert np.allclose(values, [scores[row] for row in expected], atol=1e-5)
    told = library.rows([9, 3, 9, 4])
    assert [row["id"] for row in told] == ["i9", "i3", "i9", "i4"]
    assert [row["label"] for row in told] == [None, None, None, "l1"]
    assert told[0]["source"] == "here"


def test_added_later(tmp_path: Path):
    X = unit(30)
    library = made(tmp_path / "l", X[:20])
    library.search(X[:1], 3)
    library.add("o'hara", rows(X[20:], "j"))
    library.add("o'hara", rows(X[:0]))
    assert len(library) == 30
    assert library.names("o'hara") == {f"j{row}" for row in range(10)}
    found, _ = library.search(X[25:26], 1)
    assert library.rows(found[0].tolist())[0]["id"] == "j5"
    assert len(open_library(tmp_path / "l")) == 30
    assert np.allclose(np.concatenate(list(library.vectors(20))), X[20:])


def test_fewer_images_than_asked_for(tmp_path: Path):
    library = made(tmp_path / "l", unit(4))
    assert library.search(unit(2), 10)[0].shape == (2, 4)


def test_in_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "EXACT", 1000)
    centres = unit(50, 128)
    X = centres[np.arange(3000) % 50] + 0.5 * unit(3000, 128, seed=1)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    library = made(tmp_path / "l", X)
    assert library.engine == "approximate"
    assert library.about["indexed"] == 3000
    exact, _ = library.search(X[:50], 10, exact=True)
    library.add("more", rows(unit(20, 128, seed=3), "j"))
    library.finish()
    assert library.about["indexed"] == 3000  # too few to make it anew
    opened = open_library(tmp_path / "l")
    found, similar = opened.search(X[:50], 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)]) > 0.9
    assert (np.diff(similar, axis=1) <= 0).all()
    late, _ = opened.search(unit(20, 128, seed=3), 1)
    assert late[:, 0].tolist() == list(range(3000, 3020))
    (tmp_path / "l" / "search.faiss").write_bytes(b"nothing")
    with pytest.raises(BundleError, match=r"search.faiss is missing or damaged"):
        open_library(tmp_path / "l").search(X[:1], 1)


@pytest.mark.parametrize("width", [7, 10, 384])
def test_widths_of_the_codes(width: int):
    X = unit(2000, width)
    index = room.build_index(lambda: iter([X[:900], X[900:]]), 2000, width)
    similar, found = index.search(X[:50], 1)
    assert (similar[:, 0] > 0.97).mean() > 0.95
    assert (found[:, 0] == np.arange(50)).mean() > 0.8


def test_refusals(tmp_path: Path):
    library = made(tmp_path / "l", unit(4))
    with pytest.raises(UsageError, match=r"queries of shape \(1, 8\): this library holds vectors of 16 numbers"):
        library.search(unit(1, 8), 1)
    with pytest.raises(UsageError, match="holds 0 images"):
        create_library(tmp_path / "empty", {"width": 4}).search(unit(1, 4), 1)
    with pytest.raises(BundleError, match="is not a library"):
        open_library(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.jpg").touch()
    with pytest.raises(UsageError, match=r"holds photo.jpg and is no library"):
        create_library(tmp_path / "other", {"width": 4})
    (tmp_path / "l" / "library.json").write_text('{"format": 1}')
    with pytest.raises(BundleError, match=r"library.json is damaged"):
        open_library(tmp_path / "l")
    (tmp_path / "l" / "library.json").write_text('{"format": 2, "width": 16, "indexed": 0}')
    with pytest.raises(BundleError, match="has format 2"):
        open_library(tmp_path / "l")


def test_without_its_table(tmp_path: Path):
    made(tmp_path / "l", unit(4))
    (tmp_path / "l" / "images.lance").rename(tmp_path / "gone")
    with pytest.raises(BundleError, match=r"images.lance cannot be read"):
        open_library(tmp_path / "l")


@pytest.mark.parametrize(("name", "made_by"), [("lancedb", room.lancedb), ("faiss", room.faiss)])
def test_a_missing_extra(name: str, made_by, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"pip install 'foveal\[library\]'"):
        made_by()
