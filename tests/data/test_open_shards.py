from __future__ import annotations

import io
import tarfile
import tracemalloc

import pytest

from foveal.core.errors import DataError
from foveal.data.open import open_dataset
from foveal.data.shards import expand


def write_tar(path, members: dict[str, bytes], mode: str = "w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_one_shard_with_every_kind_of_label(tmp_path, picture, encoded):
    images = {name: encoded(picture(seed)) for seed, name in enumerate("abcd")}
    path = write_tar(
        tmp_path / "data.tar",
        {
            "a.jpg": images["a"],
            "a.cls": b"3\n",
            "b.png": images["b"],
            "b.json": b'{"label": "dog", "id": 7}',
            "b.txt": b"a caption that is not the label",
            "dir.v1/c.x.png": images["c"],
            "dir.v1/c.txt": b"cat",
            "d.txt": b"cat",
            "d.PNG": images["d"],
            "lonely.png": images["a"],
            "readme.md": b"hello",
        },
    )
    dataset = open_dataset(path)
    labels = {name: dataset.classes[label] for name, label in zip(dataset.ids, dataset.labels, strict=True)}
    assert labels == {"a.jpg": "3", "b.png": "dog", "d.PNG": "cat", "dir.v1/c.x.png": "cat"}
    assert dataset.classes == ("3", "cat", "dog")
    assert dataset.read(list(dataset.ids).index("b.png")) == images["b"]
    assert dataset.set_aside[0][0] == "lonely.png"


def test_several_shards_by_a_pattern(tmp_path, picture, encoded):
    for shard in range(3):
        write_tar(
            tmp_path / f"s-{shard:03d}.tar",
            {f"x.{kind}": data for kind, data in (("png", encoded(picture(shard))), ("cls", b"%d" % (shard % 2)))},
        )
    dataset = open_dataset(f"{tmp_path}/s-{{000..002}}.tar")
    assert list(dataset.ids) == ["s-000.tar/x.png", "s-001.tar/x.png", "s-002.tar/x.png"]
    assert dataset.read(2) == encoded(picture(2))
    with pytest.raises(DataError, match=r"s-003.tar does not exist \(2 of 5 shards missing\)"):
        open_dataset(f"{tmp_path}/s-{{000..004}}.tar")


def test_several_labels(tmp_path, picture, encoded):
    image = encoded(picture(0))
    members = {"a.png": image, "a.json": b'{"label": ["x", "y"]}', "b.png": image, "b.json": b'{"label": []}'}
    dataset = open_dataset(write_tar(tmp_path / "d.tar", members))
    assert dataset.task == "multi-label"
    assert dataset.labels.tolist() == [[1, 1], [0, 0]]


def test_brace_patterns():
    assert expand("a-{08..11}-{x,y}.tar") == [f"a-{n}-{c}.tar" for n in ("08", "09", "10", "11") for c in "xy"]
    assert expand("plain.tar") == ["plain.tar"]
    for bad in ("s-{3..1}.tar", "s-{0..99999999999}.tar", "s-{abc}.tar"):
        with pytest.raises(DataError, match="expected"):
            expand(bad)


def test_names_that_would_leave_the_folder_are_only_names(tmp_path, picture, encoded):
    image = encoded(picture(0))
    members = {"../../evil.png": image, "../../evil.cls": b"0", "/etc/x.png": image, "/etc/x.cls": b"1"}
    dataset = open_dataset(write_tar(tmp_path / "d.tar", members))
    assert dataset.read(0) == dataset.read(1) == image
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.tar"]


def test_links_in_a_shard_are_not_followed(tmp_path, picture, encoded):
    path = write_tar(tmp_path / "d.tar", {"a.png": encoded(picture(0)), "a.cls": b"0", "b.cls": b"1"})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert list(open_dataset(path).ids) == ["a.png"]


def test_long_names(tmp_path, picture, encoded):
    name = "d/" * 60 + "n" * 180
    path = write_tar(tmp_path / "d.tar", {f"{name}.png": encoded(picture(0)), f"{name}.cls": b"0"})
    assert open_dataset(path).read(0) == encoded(picture(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"not a tar" * 200), "not a whole, uncompressed tar"),
        (lambda path: path.write_bytes(b""), "not a whole, uncompressed tar"),
        (lambda path: write_tar(path, {"a.png": b"x" * 5000, "a.cls": b"0"}, "w:gz"), "not a whole, uncompressed tar"),
        (lambda path: write_tar(path, {"a.txt": b"x"}), "holds no images: expected KEY.jpg beside KEY.cls"),
        (lambda path: write_tar(path, {"a.png": b"x"}), "holds 1 images without a label"),
    ],
)
def test_shards_that_cannot_be_used(tmp_path, make, message):
    make(tmp_path / "d.tar")
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path / "d.tar")


def test_a_shard_cut_short(tmp_path):
    path = write_tar(tmp_path / "d.tar", {"a.cls": b"0", "a.png": bytes(100_000)})
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(DataError, match="not a whole"):
        open_dataset(path)


def test_a_shard_that_changes_after_it_was_opened(tmp_path):
    path = write_tar(tmp_path / "d.tar", {"a.cls": b"0", "a.png": bytes(100_000)})
    dataset = open_dataset(path)
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(DataError, match="shorter than when it was opened"):
        dataset.read(0)


def test_indexing_reads_no_images(tmp_path):
    size, count = 200_000, 100
    members = {
        f"{index}.{kind}": data for index in range(count) for kind, data in (("png", bytes(size)), ("cls", b"0"))
    }
    path = write_tar(tmp_path / "d.tar", members)
    del members
    tracemalloc.start()
    dataset = open_dataset(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(dataset) == count
    assert peak < 5 * size
