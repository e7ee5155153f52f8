from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from foveal.core.errors import DataError
from foveal.data.dataset import MAX_BYTES, Dataset, Memory, read_file
from foveal.data.open import open_dataset, open_images


def test_class_folders(image_folder):
    root = image_folder("dog/2.png", "cat/1.jpg", "cat/deep/er/3.png", "Ant/4.png")
    dataset = open_dataset(root)
    assert dataset.name == "photos"
    assert dataset.classes == ("Ant", "cat", "dog")
    assert list(dataset.ids) == ["Ant/4.png", "cat/1.jpg", "cat/deep/er/3.png", "dog/2.png"]
    assert dataset.labels.tolist() == [0, 1, 1, 2]
    assert dataset.labels.dtype == np.int64
    assert dataset.splits is None
    assert dataset.task == "single-label"
    assert dataset.read(1) == (root / "cat/1.jpg").read_bytes()
    assert dataset.image(1).size == (40, 30)


def test_a_dataset_passes_through(image_folder):
    dataset = open_dataset(str(image_folder("a/1.png", "b/1.png")))
    assert open_dataset(dataset) is dataset


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Validation"])
def test_split_folders(image_folder, val):
    dataset = open_dataset(image_folder("train/a/1.png", "train/b/2.png", f"{val}/a/3.png", "test/b/4.png"))
    assert dataset.classes == ("a", "b")
    assert dict(zip(dataset.ids, dataset.splits, strict=True)) == {
        "test/b/4.png": "test",
        "train/a/1.png": "train",
        "train/b/2.png": "train",
        f"{val}/a/3.png": "val",
    }


def test_a_class_may_be_called_train(image_folder):
    dataset = open_dataset(image_folder("train/1.png", "bus/2.png", "train/old/3.png"))
    assert dataset.classes == ("bus", "train")
    assert dataset.splits is None


def test_splits_beside_class_folders_are_refused(image_folder):
    with pytest.raises(DataError, match=r"test, train beside cat: expected class folders, or only train/ val/ test/"):
        open_dataset(image_folder("train/a/1.png", "test/a/2.png", "cat/3.png"))


def test_splits_without_class_folders_are_refused(image_folder):
    with pytest.raises(DataError, match="without class folders: expected one folder per class"):
        open_dataset(image_folder("train/1.png", "test/2.png"))


def test_hidden_and_other_files(image_folder):
    root = image_folder("a/1.png", "b/2.png", ".git/3.png", "a/.hidden.png", "__MACOSX/a/4.png")
    (root / "a/notes.txt").write_text("hello")
    (root / "labels.csv").write_text("x")
    dataset = open_dataset(root)
    assert list(dataset.ids) == ["a/1.png", "b/2.png"]
    assert dataset.ignored == 2


def test_images_outside_class_folders_are_set_aside(image_folder):
    dataset = open_dataset(image_folder("a/1.png", "b/2.png", "stray.png"))
    assert dataset.set_aside == (("stray.png", "not in a class folder"),)
    assert len(dataset) == 2


def test_a_text_called_jpg_keeps_its_row_until_it_is_decoded(image_folder):
    root = image_folder("a/1.png", "b/2.png")
    (root / "b/0.jpg").write_text("no picture")
    dataset = open_dataset(root)
    with pytest.raises(DataError, match="not an image"):
        dataset.image(1)
    kept = dataset.drop({1: "not an image"})
    assert list(kept.ids) == ["a/1.png", "b/2.png"]
    assert kept.set_aside == (("b/0.jpg", "not an image"),)
    assert kept.read(1) == (root / "b/2.png").read_bytes()


def test_empty_folder(tmp_path):
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds no images \(1 other files\): expected one folder of images per class"):
        open_dataset(tmp_path)


def test_images_without_class_folders(image_folder):
    with pytest.raises(DataError, match="holds 2 images but no class folders"):
        open_dataset(image_folder("1.png", "2.png"))


@pytest.mark.parametrize("name", ["nothing/here", "photos.xyz", "nothing.csv"])
def test_what_does_not_exist(name, tmp_path):
    with pytest.raises(DataError, match="does not exist: expected a folder of class folders"):
        open_dataset(tmp_path / name)


def test_a_file_of_another_form(tmp_path):
    (tmp_path / "data.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match="not a form of DATA: expected a folder"):
        open_dataset(tmp_path / "data.xlsx")


def test_links_to_folders_are_followed_once_and_loops_end(image_folder, tmp_path):
    root = image_folder("a/1.png", "b/2.png")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "3.png").write_bytes((root / "a/1.png").read_bytes())
    (root / "a/loop").symlink_to(root, target_is_directory=True)
    (root / "b/self").symlink_to("self")
    (root / "b/up").symlink_to("..", target_is_directory=True)
    (root / "c").symlink_to(outside, target_is_directory=True)
    (outside / "back").symlink_to(root / "a", target_is_directory=True)
    dataset = open_dataset(root)
    assert list(dataset.ids) == ["a/1.png", "b/2.png", "c/3.png"]
    assert dataset.classes == ("a", "b", "c")


def test_broken_links_and_pipes(image_folder):
    root = image_folder("a/1.png", "b/2.png")
    (root / "a/gone.png").symlink_to("nowhere.png")
    os.mkfifo(root / "a/pipe.jpg")
    dataset = open_dataset(root)
    assert len(dataset) == 2
    assert [name for name, _ in dataset.set_aside] == ["a/gone.png", "a/pipe.jpg"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems store only names that are Unicode")
def test_names_that_are_not_utf_8(image_folder):
    root = image_folder("a/1.png", "b/2.png")
    data = (root / "a/1.png").read_bytes()
    (root / os.fsdecode(b"b/caf\xe9.png")).write_bytes(data)
    (root / os.fsdecode(b"\xff\xfe")).mkdir()
    (root / os.fsdecode(b"\xff\xfe/line\nend.png")).write_bytes(data)
    dataset = open_dataset(root)
    assert dataset.classes == ("\\udcff\\udcfe", "a", "b")
    assert sorted(dataset.ids) == ["\\udcff\\udcfe/line\\nend.png", "a/1.png", "b/2.png", "b/caf\\udce9.png"]
    json.dumps(list(dataset.ids), ensure_ascii=False).encode("utf-8")
    assert all(dataset.read(row) for row in range(4))


def test_order_does_not_depend_on_the_disk(image_folder, tmp_path):
    names = [f"{kind}/{index}.png" for kind in "ba" for index in (10, 2, 7)]
    first = open_dataset(image_folder(*names))
    again = tmp_path / "again"
    for name in reversed(names):
        (again / name).parent.mkdir(parents=True, exist_ok=True)
        (again / name).write_bytes((tmp_path / "photos" / name).read_bytes())
    assert list(open_dataset(again).ids) == list(first.ids) == sorted(names)


def test_subset_of_subset(image_folder):
    dataset = open_dataset(image_folder("train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png"))
    part = dataset.subset([3, 1, 0]).subset(np.array([True, False, True]))
    assert list(part.ids) == ["train/b/2.png", "test/a/3.png"]
    assert part.splits.tolist() == ["train", "test"]
    assert part.read(0) == dataset.read(3)
    assert part.labels.tolist() == [1, 0]
    assert len(dataset) == 4


def test_a_file_that_vanishes(image_folder):
    root = image_folder("a/1.png", "b/2.png")
    dataset = open_dataset(root)
    (root / "a/1.png").unlink()
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        dataset.read(0)


def test_a_file_beyond_all_bounds_is_not_read(tmp_path):
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(DataError, match="512 MiB: files up to 512 MiB"):
        read_file(str(tmp_path / "huge.png"))


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        read_file(str(tmp_path / "pipe"))


def test_many_threads_read_the_same(image_folder):
    dataset = open_dataset(image_folder(*[f"{kind}/{index}.png" for kind in "ab" for index in range(8)]))
    alone = [dataset.read(row) for row in range(16)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(dataset.read, list(range(16)) * 20)) == alone * 20


def test_labels_that_do_not_fit():
    with pytest.raises(DataError, match=r"labels have shape \(2,\), expected \(1,\)"):
        Dataset("x", ["a"], np.zeros(2, np.int64), ("c",), "single-label", None, Memory([b""]))


def test_open_images_mixes_files_and_folders(image_folder, encoded):
    root = image_folder("a/1.png", "a/2.jpg", "b/3.png")
    array = np.full((5, 6, 3), 9, np.uint8)
    grey = Image.new("L", (4, 3), 7)
    dataset = open_images([root / "b/3.png", str(root / "a"), array, grey, root / "gone.png"])
    assert list(dataset.ids) == [
        f"{root}/b/3.png",
        f"{root}/a/1.png",
        f"{root}/a/2.jpg",
        "image-0003",
        "image-0004",
        f"{root}/gone.png",
    ]
    assert dataset.classes == ()
    assert dataset.labels.tolist() == [0] * 6
    assert (np.asarray(dataset.image(3)) == array).all()
    assert np.asarray(dataset.image(4))[0, 0].tolist() == [7, 7, 7]
    assert dataset.read(1) == (root / "a/1.png").read_bytes()
    with pytest.raises(DataError, match="No such file"):
        dataset.read(5)


def test_open_images_given_one_file_twice(image_folder):
    path = image_folder("a/1.png") / "a/1.png"
    assert list(open_images([path, path]).ids) == [str(path), f"{path}#2"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "LAB", "HSV"])
def test_open_images_takes_any_mode_of_pil(mode):
    assert open_images([Image.new(mode, (6, 5))]).image(0).size == (6, 5)


def test_open_images_turns_an_opened_photo_upright(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, (40, 30)).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        given = open_images([opened, tmp_path / "turned.png"])
    assert given.image(0).size == (30, 40)
    assert (np.asarray(given.image(0)) == np.asarray(given.image(1))).all()


@pytest.mark.parametrize(
    "given", [np.zeros((4, 4, 3)), np.zeros((2, 3, 4, 4), np.uint8), np.zeros((0, 4), np.uint8), 7]
)
def test_open_images_refuses_what_is_no_image(given):
    with pytest.raises(DataError, match=r"expected a path, a PIL image or a uint8 array \[H, W, 3\]"):
        open_images([given])


def test_open_images_of_nothing(tmp_path):
    with pytest.raises(DataError, match="no images given: give image files"):
        open_images([])
    with pytest.raises(DataError, match="a folder without images"):
        open_images([tmp_path])
