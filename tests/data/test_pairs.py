"""Tables of images with texts, and a world whose captions are exact."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from foveal.core.errors import DataError
from foveal.data.captioned import WORDS, digit_pairs
from foveal.data.pairs import open_pairs, split_pairs, survey


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(3):
        Image.new("RGB", (9, 9), (index * 80, 0, 0)).save(tmp_path / f"{index}.png")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "pairs.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_rows_of_one_image_become_one(folder: Path):
    pairs = open_pairs(write(folder, 'image,text\n0.png,"black, quite"\n1.png,dark red\n0.png,night\n0.png,night\n'))
    assert list(pairs.images.ids) == ["0.png", "1.png"]
    assert pairs.texts == (("black, quite", "night"), ("dark red",))
    assert pairs.subset(np.array([1])).texts == (("dark red",),)


def test_parquet_of_paths_and_of_bytes(folder: Path):
    columns = {"image": ["0.png", "1.png"], "text": ["black", "red"], "split": ["train", "test"]}
    pq.write_table(pa.table(columns), folder / "paths.parquet")
    data = [(folder / name).read_bytes() for name in columns["image"]]
    pq.write_table(pa.table({**columns, "image": data}), folder / "bytes.parquet")
    by_path, by_bytes = open_pairs(folder / "paths.parquet"), open_pairs(folder / "bytes.parquet")
    assert by_path.texts == by_bytes.texts == (("black",), ("red",))
    assert by_bytes.images.splits is not None
    assert by_bytes.images.splits.tolist() == ["train", "test"]
    assert by_bytes.images.read(1) == data[1] == by_path.images.read(1)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("image,label\n0.png,black\n", r"no column text \(columns: image, label\): expected columns image,text"),
        ("image,text\n0.png,\n", "line 2 has an empty text"),
        ("image,text\n,black\n", "line 2 names no image"),
        ("image,text\n0.png,black, and dark\n", "line 2 has 3 fields, expected 2: put quotes"),
        ("image,text\nx.png,black\n", "none of its 1 images exist"),
        ("image,text,split\n0.png,a,train\n0.png,b,test\n", "0.png in two splits"),
        ("image,text,split\n0.png,a,sometimes\n", "has split 'sometimes'"),
        ("image,text\n", "has no rows"),
    ],
)
def test_tables_that_cannot_be_used(folder: Path, table: str, said: str):
    with pytest.raises(DataError, match=said):
        open_pairs(write(folder, table))


def test_what_is_no_table(folder: Path):
    with pytest.raises(DataError, match=r"is not a file: pairs come as a \.csv or \.parquet table"):
        open_pairs(folder)
    with pytest.raises(DataError, match=r"neither \.csv nor \.parquet"):
        open_pairs(folder / "0.png")


def test_unreadable_images_are_set_aside(folder: Path):
    (folder / "1.png").write_bytes(b"no image")
    pairs, scan = survey(open_pairs(write(folder, "image,text\n0.png,a\n1.png,b\n2.png,c\n9.png,d\n")))
    assert pairs.texts == (("a",), ("c",))
    assert len(scan) == 2
    assert [name for name, _ in pairs.images.set_aside] == ["9.png", "1.png"]


def test_splits_keep_groups_together(folder: Path):
    pairs = digit_pairs(40, 5, 10, 0)
    given = split_pairs(pairs, np.arange(55), 0)
    assert [int((given == name).sum()) for name in ("train", "val", "test")] == [40, 5, 10]
    own = type(pairs)(pairs.images.__class__(**{**vars(pairs.images), "splits": None}), pairs.texts)
    groups = np.arange(55) // 5
    splits = split_pairs(own, groups, 0)
    assert set(splits) == {"train", "val", "test"}
    assert all(len(set(splits[groups == group])) == 1 for group in range(11))
    with pytest.raises(DataError, match="has 3 distinct images"):
        split_pairs(own, np.zeros(55, int) + np.arange(55) % 3, 0)


def test_captions_of_the_world_are_exact():
    pairs, again = digit_pairs(30, 5, 5, 3), digit_pairs(30, 5, 5, 3)
    assert pairs.texts == again.texts
    assert [pairs.images.read(row) for row in range(40)] == [again.images.read(row) for row in range(40)]
    assert digit_pairs(30, 5, 5, 4).texts != pairs.texts
    for (text,) in pairs.texts:
        left, right = text.split(" then ")
        assert left in WORDS
        assert right in WORDS
    swapped = [row for row, (text,) in enumerate(pairs.texts) if len(set(text.split(" then "))) == 2]
    pixels = np.asarray(pairs.images.image(swapped[0]))
    assert pixels.shape == (32, 32, 3)
    assert not np.array_equal(pixels[:, :16], pixels[:, 16:])
