from __future__ import annotations

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from foveal.core.errors import DataError
from foveal.data.open import open_dataset


@pytest.fixture
def table(image_folder):
    root = image_folder("a/1.png", "a/2.png", "b/3.png", "b/4.png")

    def write(text: str, name: str = "labels.csv", encoding: str = "utf-8"):
        (root / name).write_bytes(text.encode(encoding, "surrogateescape"))
        return root / name

    return write


def test_csv(table):
    path = table("image,label\nb/3.png,dog\na/1.png,cat\na/2.png, cat \n")
    dataset = open_dataset(path)
    assert dataset.name == "labels.csv"
    assert list(dataset.ids) == ["a/1.png", "a/2.png", "b/3.png"]
    assert dataset.classes == ("cat", "dog")
    assert dataset.labels.tolist() == [0, 0, 1]
    assert dataset.splits is None
    assert dataset.read(2) == (path.parent / "b/3.png").read_bytes()


def test_csv_as_spreadsheets_write_it(table):
    dataset = open_dataset(table('\ufeffid;Label;IMAGE\r\n1;cat;a/1.png\r\n2;"big; dog";b/3.png\r\n\r\n'))
    assert dataset.classes == ("big; dog", "cat")
    assert len(dataset) == 2


def test_csv_with_absolute_paths(table, tmp_path):
    root = tmp_path / "photos"
    dataset = open_dataset(table(f"image,label\n{root}/a/1.png,x\n{root}/b/3.png,y\n"))
    assert dataset.image(0).size == (40, 30)


def test_csv_splits(table):
    dataset = open_dataset(
        table("image,label,split\na/1.png,x,train\na/2.png,y,Validation\nb/3.png,x,test\nb/4.png,y,train\n")
    )
    assert dataset.splits.tolist() == ["train", "val", "test", "train"]


def test_csv_with_an_empty_split_column_is_unsplit(table):
    assert open_dataset(table("image,label,split\na/1.png,x,\nb/3.png,y,\n")).splits is None


def test_csv_of_several_labels(table):
    dataset = open_dataset(table("image,label\na/1.png,red|round\na/2.png,\nb/3.png,round\nb/4.png, red | old\n"))
    assert dataset.task == "multi-label"
    assert dataset.classes == ("old", "red", "round")
    assert dataset.labels.tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 1, 0]]
    assert dataset.labels.dtype == np.uint8


def test_csv_naming_a_missing_file(table):
    dataset = open_dataset(table("image,label\na/1.png,x\ngone.png,y\nb/3.png,y\na,y\n"))
    assert list(dataset.ids) == ["a/1.png", "b/3.png"]
    assert dataset.set_aside == (("gone.png", "no such file"), ("a", "no such file"))


def test_csv_naming_only_missing_files(table):
    with pytest.raises(DataError, match=r"none of its 2 images exist.*paths are relative to the table's folder"):
        open_dataset(table("image,label\nno/1.png,x\nno/2.png,y\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na/1.png,x\n", r"no column image \(columns: file, label\): expected columns image,label"),
        ("a/1.png\n", r"no column image and no column label"),
        ("", r"no column image and no column label"),
        ("image,label\n", "has no rows"),
        ("image,label\na/1.png,x\nb/3.png,\n", "line 3 has an empty label: fill it in or remove the line"),
        ("image,label\na/1.png,x\n,y\n", "line 3 names no image"),
        ("image,label\na/1.png\n", "line 2 has 1 fields"),
        ("image,label,split\na/1.png,x,train\nb/3.png,y,holdout\n", "line 3 has split 'holdout': expected train, val"),
        ("image,label,split\na/1.png,x,train\nb/3.png,y,\n", "line 3 has split ''"),
        ("image,label\na/1.png,x\na/1.png,y\n", r"names a/1.png twice with different labels.*line 2, line 3"),
        ("image,label,split\na/1.png,x,train\na/1.png,x,test\n", "twice with different labels or splits"),
        ('image,label\n"a/1.png,x\nb/3.png,y\n', "is not a CSV file"),
    ],
)
def test_csv_that_cannot_be_used(table, text, message):
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(table(text))
    assert "\n" not in str(caught.value)


def test_csv_naming_an_image_twice(table):
    dataset = open_dataset(table("image,label\na/1.png,x\nb/3.png,y\na/1.png,x\n"))
    assert len(dataset) == 2
    assert dataset.set_aside[0][1] == "named twice (line 2 and line 4)"


def test_csv_with_names_that_are_not_utf_8(table, tmp_path):
    data = (tmp_path / "photos/a/1.png").read_bytes()
    (tmp_path / "photos" / os.fsdecode(b"caf\xe9.png")).write_bytes(data)
    dataset = open_dataset(table("image,label\ncaf\udce9.png,\udce9\na/1.png,x\n"))
    assert dataset.read(1) == data
    assert list(dataset.ids) == ["a/1.png", "caf\\udce9.png"]
    assert dataset.classes == ("\\udce9", "x")


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_of_paths(image_folder):
    root = image_folder("a/1.png", "b/2.png", "b/3.png")
    path = write_parquet(
        root / "t.parquet",
        image=["b/2.png", "a/1.png", "gone.png"],
        label=["y", "x", "y"],
        split=["test", "train", "val"],
    )
    dataset = open_dataset(path)
    assert list(dataset.ids) == ["a/1.png", "b/2.png"]
    assert dataset.splits.tolist() == ["train", "test"]
    assert dataset.set_aside == (("gone.png", "no such file"),)


def test_parquet_of_bytes(tmp_path, picture, encoded):
    images = [encoded(picture(seed)) for seed in range(150)]
    path = write_parquet(tmp_path / "t.parquet", image=[*images, None], label=[seed % 3 for seed in range(151)])
    dataset = open_dataset(path)
    assert dataset.classes == ("0", "1", "2")
    assert [dataset.read(row) for row in (149, 0, 77)] == [images[row] for row in (149, 0, 77)]
    assert dataset.set_aside == (("t.parquet#000150", "no image in this row"),)


def test_parquet_as_hugging_face_writes_it(image_folder, picture, encoded):
    root = image_folder("a/1.png")
    table = pa.table(
        {
            "image": [{"bytes": encoded(picture(5)), "path": "five.png"}, {"bytes": None, "path": "a/1.png"}],
            "label": [1, 0],
        }
    )
    features = {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), root / "t.parquet")
    dataset = open_dataset(root / "t.parquet")
    assert dict(zip(dataset.ids, (dataset.classes[label] for label in dataset.labels), strict=True)) == {
        "five.png": "yes",
        "a/1.png": "no",
    }
    assert dataset.read(0) == (root / "a/1.png").read_bytes()
    assert dataset.read(1) == encoded(picture(5))


def test_parquet_of_label_lists(tmp_path, encoded, picture):
    path = write_parquet(tmp_path / "t.parquet", image=[encoded(picture(0))] * 2, label=[["a", "b"], []])
    dataset = open_dataset(path)
    assert dataset.task == "multi-label"
    assert dataset.labels.tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": ["a"], "label": [0.5]}, "column label has type double, expected text, whole numbers"),
        ({"image": [1], "label": ["a"]}, "column image has type int64, expected text"),
        ({"picture": ["a"], "label": ["a"]}, r"no column image \(columns: picture, label\)"),
        ({"image": ["a"], "label": pa.array([None], pa.string())}, "row 0 has an empty label"),
        ({"image": pa.array([None], pa.binary()), "label": ["a"]}, "none of its 1 rows holds an image"),
    ],
)
def test_parquet_that_cannot_be_used(image_folder, columns, message):
    root = image_folder("a")
    with pytest.raises(DataError, match=message):
        open_dataset(write_parquet(root / "t.parquet", **columns))


def test_a_text_called_parquet(tmp_path):
    (tmp_path / "t.parquet").write_text("image,label\n")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        open_dataset(tmp_path / "t.parquet")
