"""Tables of images with points, and every way they can be wrong."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from foveal.core.errors import DataError
from foveal.data.photos import warped
from foveal.data.points import in_memory, open_points, split_points, survey


@pytest.fixture
def table(tmp_path: Path):
    """Write pictures of 60 x 40 pixels and a CSV of these lines; returns the path of the CSV."""

    def write(header: str, *lines: str, size: tuple[int, int] = (60, 40)) -> Path:
        for row, line in enumerate(lines):
            name = line.split(",")[0]
            rng = np.random.default_rng(row)
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize(size).save(tmp_path / name)
        path = tmp_path / "points.csv"
        path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
        return path

    return write


def test_numbered_columns(table):
    points = open_points(table("image,x1,y1,x2,y2", "a.png,1,2,3.5,4.25", "b.png,5,6,7,8"))
    assert points.names == ("1", "2")
    assert points.images.ids == ["a.png", "b.png"]
    assert points.xy.tolist() == [[[1, 2], [3.5, 4.25]], [[5, 6], [7, 8]]]
    assert points.known.all()
    assert points.flip is None


def test_named_columns_say_their_twins_and_what_is_labelled(table):
    points = open_points(
        table(
            "image,left_eye_x,left_eye_y,left_eye_v,nose_x,nose_y,right_eye_x,right_eye_y,split",
            "a.png,1,2,1,3,4,5,6,train",
            "b.png,,,0,3,4,5,6,test",
        )
    )
    assert points.names == ("left_eye", "nose", "right_eye")
    assert points.flip == (2, 1, 0)
    assert points.known.tolist() == [[True, True, True], [False, True, True]]
    assert points.xy[1, 0].tolist() == [0, 0]
    assert points.images.splits is not None
    assert points.images.splits.tolist() == ["train", "test"]


def test_a_flip_column(table):
    assert open_points(table("image,x1,y1,x2,y2,flip", "a.png,1,2,3,4,2 1")).flip == (1, 0)
    with pytest.raises(DataError, match=r"flip is \[1, 1\], expected the numbers 1 to 2"):
        open_points(table("image,x1,y1,x2,y2,flip", "a.png,1,2,3,4,1 1"))
    with pytest.raises(DataError, match="flip differs between rows"):
        open_points(table("image,x1,y1,x2,y2,flip", "a.png,1,2,3,4,2 1", "b.png,1,2,3,4,1 2"))


def test_parquet_with_paths_and_with_bytes(tmp_path: Path, table):
    table("image,x1,y1", "a.png,1,2", "b.png,3,4")
    pq.write_table(pa.table({"image": ["a.png", "b.png"], "x1": [1.0, 3.0], "y1": [2.0, 4.0]}), tmp_path / "p.parquet")
    by_path = open_points(tmp_path / "p.parquet")
    held = [{"bytes": (tmp_path / name).read_bytes(), "path": name} for name in ("a.png", "b.png")]
    pq.write_table(pa.table({"image": held, "x1": [1.0, 3.0], "y1": [2.0, 4.0]}), tmp_path / "q.parquet")
    by_bytes = open_points(tmp_path / "q.parquet")
    for points in (by_path, by_bytes):
        assert points.xy[:, 0].tolist() == [[1, 2], [3, 4]]
        assert points.images.image(1).size == (60, 40)
        assert points.images.ids == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("header", "line", "message"),
    [
        ("image,label", "a.png,cat", r"has no points \(columns: image, label\): expected columns image and x1,y1"),
        ("file,x1,y1", "a.png,1,2", "has no column image"),
        ("image,x1", "a.png,1", "has a column x1 but no y1"),
        ("image,x1,y1", "a.png,1,nan", "row 1: y1 is 'nan', expected a number: .* needs 0 in a column v1"),
        ("image,x1,y1", "a.png,,2", "row 1: x1 is '', expected a number"),
        ("image,nose_x,nose_y", "a.png,inf,2", "nose_x is 'inf', expected a number: .* nose_v"),
        ("image,x1,y1", "a.png,1,left", "row 1: y1 is 'left', expected a number"),
        ("image,x1,y1,v1", "a.png,1,2,0", "none of its 1 images can be used .*no point is labelled"),
        ("image,x1,y1,split", "a.png,1,2,later", "split 'later': expected train, val or test"),
    ],
)
def test_tables_that_cannot_be_used(table, header: str, line: str, message: str):
    with pytest.raises(DataError, match=message):
        open_points(table(header, line))


def test_files_that_are_no_tables(tmp_path: Path):
    with pytest.raises(DataError, match=r"is not a file: landmarks come as a .csv or .parquet table"):
        open_points(tmp_path)
    (tmp_path / "points.txt").write_text("image")
    with pytest.raises(DataError, match=r"neither .csv nor .parquet"):
        open_points(tmp_path / "points.txt")
    (tmp_path / "none.csv").write_text("image,x1,y1\nmissing.png,1,2\n")
    with pytest.raises(DataError, match="none of its 1 images exist"):
        open_points(tmp_path / "none.csv")


def test_rows_and_columns_given_for_x_and_y_are_noticed(table):
    points = open_points(table("image,x1,y1,x2,y2", "a.png,10,55,20,5", "b.png,12,50,22,4"))
    with pytest.raises(DataError, match=r"a.png is at x=10, y=55, outside of its 60 x 40 pixels .*swap the columns"):
        survey(points)
    good, _ = survey(open_points(table("image,x1,y1,x2,y2", "a.png,55,10,5,20", "b.png,50,12,4,22")))
    assert len(good) == 2


def test_images_that_show_none_of_their_points_are_set_aside(table, tmp_path: Path):
    path = table("image,x1,y1", "a.png,100,2", "b.png,3,4", "c.png,3,4")
    (tmp_path / "c.png").write_bytes(b"no image")
    points, scan = survey(open_points(path))
    assert points.images.ids == ["b.png"]
    assert len(scan) == 1
    reasons = dict(points.images.set_aside)
    assert reasons["a.png"] == "every point lies outside of the image"
    assert "not an image" in reasons["c.png"]
    with pytest.raises(DataError, match=r"none of its 1 images can be used .*\(0, 0\) the centre of its top left one"):
        survey(open_points(table("image,x1,y1", "a.png,100,2")))


def test_splits_by_seed_keep_groups_and_given_ones():
    points = in_memory(*warped(40, 16, 0))
    groups = np.repeat(np.arange(20), 2)
    splits = split_points(points, groups, 0)
    assert (splits[::2] == splits[1::2]).all()
    assert {name: int((splits == name).sum()) for name in ("train", "val", "test")} == {
        "train": 28, "val": 4, "test": 8
    }  # fmt: skip
    assert (split_points(points, groups, 0) == splits).all()
    assert (split_points(points, groups, 1) != splits).any()
    with pytest.raises(DataError, match="has 1 distinct images"):
        split_points(points, np.zeros(40, int), 0)
