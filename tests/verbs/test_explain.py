"""`foveal explain`: a folder of maps that a person can look at and judge."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import foveal
from foveal.cli.main import main
from foveal.core.errors import DataError, UsageError

LIGHT = "sobol-attribution:grid=3,points=4"


@pytest.fixture
def bundle(colours: foveal.Bundle) -> Path:
    return colours.path


def test_every_image_gets_a_picture_an_array_and_a_row(bundle: Path, photos: Path, tmp_path: Path):
    out = tmp_path / "maps"
    given = [photos / "red" / "00.jpg", photos / "blue" / "00.jpg", photos / "blue" / "01.jpg"]
    result = foveal.explain(bundle, given, method=LIGHT, out=out)
    assert {file.name for file in out.iterdir()} == {
        "00.png", "00.npy", "00-2.png", "00-2.npy", "01.png", "01.npy", "index.html", "explanations.json",
    }  # fmt: skip
    for name in ("00", "00-2", "01"):
        map = np.load(out / f"{name}.npy", allow_pickle=False)
        assert map.dtype == np.float32
        assert map.shape == (90, 110)
        assert np.isfinite(map).all()
        with Image.open(out / f"{name}.png") as picture:
            assert picture.size == (110, 90)
    rows = json.loads((out / "explanations.json").read_text(encoding="utf-8"))["images"]
    assert rows == result["images"]
    assert [row["map"] for row in rows] == ["00.png", "00-2.png", "01.png"]
    for row in rows:
        assert row["target"] == row["label"]
        assert 0 <= row["scores"]["map"]["deletion"] <= 1
        assert {"image", "unknown", "target_probability", "notes", "seconds"} <= row.keys()
    page = (out / "index.html").read_text(encoding="utf-8")
    assert str(photos.parent) not in page, "the page says where on this machine things lie"
    assert all(row["map"] in page for row in rows)
    assert "cells at random" in page
    assert f"{rows[0]['scores']['map']['deletion']:.3f}" in page


def test_the_same_command_again_and_a_folder_of_something_else(bundle: Path, photos: Path, tmp_path: Path):
    image = photos / "red" / "00.jpg"
    first = foveal.explain(bundle, [image], method="eigen-cam", out=tmp_path / "maps", score=False)
    before = (tmp_path / "maps" / "00.npy").read_bytes()
    again = foveal.explain(bundle, [image], method="eigen-cam", out=tmp_path / "maps", score=False)
    assert (tmp_path / "maps" / "00.npy").read_bytes() == before
    assert again["images"][0]["map"] == first["images"][0]["map"]
    with pytest.raises(UsageError, match="holds no explanations: choose another --out"):
        foveal.explain(bundle, [image], out=photos)


def test_names_that_are_taken_or_strange(bundle: Path, photos: Path, tmp_path: Path):
    content = (photos / "red" / "00.jpg").read_bytes()
    names = ["index.jpg", "Index.png", "a b#1?.jpg", "é.jpg"]
    for name in names:
        (tmp_path / name).write_bytes(content)
    out = tmp_path / "maps"
    result = foveal.explain(bundle, [tmp_path / name for name in names], method="eigen-cam", out=out, score=False)
    assert [row["map"] for row in result["images"]] == ["index-2.png", "Index-3.png", "a b#1?.png", "é.png"]
    assert all((out / row["map"]).is_file() for row in result["images"])
    assert "a%20b%231%3F.png" in (out / "index.html").read_text(encoding="utf-8")


def test_what_cannot_be_read_is_told_and_the_rest_explained(bundle: Path, photos: Path, tmp_path: Path):
    (tmp_path / "bad.jpg").write_text("no image")
    both = [tmp_path / "bad.jpg", photos / "red" / "00.jpg"]
    result = foveal.explain(bundle, both, method="eigen-cam", out=tmp_path / "maps", score=False)
    assert "error" in result["images"][0]
    assert "cannot be read" in result.to_text()
    assert "Cannot be read" in (tmp_path / "maps" / "index.html").read_text(encoding="utf-8")
    with pytest.raises(DataError, match="none of the 1 images can be decoded"):
        foveal.explain(bundle, [tmp_path / "bad.jpg"], method="eigen-cam", out=tmp_path / "none")


def test_on_the_command_line(
    bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    command = ["explain", bundle, photos / "red" / "00.jpg", "--method", LIGHT, "--target", "blue", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["foveal", *map(str, command), "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    row = json.loads(capsys.readouterr().out)["images"][0]
    assert (row["label"], row["target"]) == ("red", "blue")
    for wrong, message in (
        (["--method", "linear"], "linear is a method of family adapt"),
        (["--method", "sobol-attribution:points=5"], "points=5: expected a power of two, such as 4"),
        (["--method", "eigen-cam:layer=nowhere"], "no layer 'nowhere'"),
        (["--target", "purple"], "no class 'purple'"),
    ):
        given = ["explain", bundle, photos / "red" / "00.jpg", "--out", tmp_path / "x", *wrong]
        monkeypatch.setattr(sys, "argv", ["foveal", *map(str, given)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        assert stopped.value.code == 2
        assert message in captured.err
        assert captured.out == ""
