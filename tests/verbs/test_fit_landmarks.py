"""From a table of points to a Bundle that finds them, by the command line and in Python."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

import foveal
from foveal.core.errors import BundleError, DataError, UsageError
from foveal.data.geometry import fitted, moved
from foveal.data.photos import warped

METHOD = "subpixel-heatmap:epochs=2,batch_size=8,consistency=0,augment=none"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures and points.csv, which says their splits; one row names no picture."""
    folder = tmp_path_factory.mktemp("landmarks")
    images, xy = warped(24, 64, 0)
    lines = [",".join(["image", "split", *(f"{axis}{k + 1}" for k in range(10) for axis in "xy")])]
    for row in range(24):
        Image.fromarray(images[row]).resize((96, 64)).save(folder / f"{row}.png")
        places = moved(np.array([[1.5, 0, 0.25], [0, 1, 0], [0, 0, 1]]), xy[row])
        split = "train" if row < 14 else "val" if row < 18 else "test"
        lines.append(",".join([f"{row}.png", split, *(f"{value:.2f}" for value in places.reshape(-1))]))
    lines.append(lines[1].replace("0.png", "missing.png", 1))
    (folder / "points.csv").write_text("\n".join(lines) + "\n")
    return folder / "points.csv"


@pytest.fixture(scope="module")
def bundle(table: Path, tiny: str, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("bundles") / "points"
    return foveal.fit(str(table), task="landmarks", method=METHOD, backbone=tiny, out=out, offline=True)


def test_the_bundle_holds_what_it_measured(bundle: Any, table: Path, tiny: str):
    metrics = bundle.metrics
    assert metrics["n"] == 6
    assert metrics["split"] == "test"
    assert len(metrics["history"]) == 2
    assert metrics["history"][0]["val_nme"] > 0
    assert metrics["nme"]["low"] <= metrics["nme"]["value"] <= metrics["nme"]["high"]
    assert metrics["references"]["mean place"]["nme"]["value"] > 0
    assert bundle.manifest["task"] == "landmarks"
    assert bundle.manifest["data"]["set_aside"] == [["missing.png", "no such file"]]
    assert bundle.cost["macs"] > 0
    assert {"report.html", "README.md", "cost.json", "bundle.json"} <= {file.name for file in bundle.path.iterdir()}
    assert not bundle.path.with_name("points.work").exists()
    again = foveal.fit(str(table), task="landmarks", method=METHOD, backbone=tiny, out=bundle.path, offline=True)
    assert again.manifest == bundle.manifest, "the same command finds its Bundle there"


def test_points_come_in_pixels_of_the_image_whatever_its_size(bundle: Any, table: Path):
    photo = Image.open(table.parent / "20.png").convert("RGB")
    small = bundle.predict(photo)[0]
    large = bundle.predict(np.asarray(photo.resize((288, 192), Image.Resampling.BICUBIC)))[0]
    assert (small["width"], small["height"]) == (96, 64)
    assert len(small["points"]) == 10
    for near, far in zip(small["points"], large["points"], strict=True):
        assert far["name"] == near["name"]
        assert 0 <= near["score"] <= 1
        assert -0.5 <= near["x"] <= 95.5
    apart = [abs(far["x"] - (3 * near["x"] + 1)) for near, far in zip(small["points"], large["points"], strict=True)]
    assert np.median(apart) < 9, "three pixels of the small image"


def test_the_verb_predict(bundle: Any, table: Path, tmp_path: Path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    said = foveal.predict(bundle.path, [table.parent / "20.png", broken])
    rows = json.loads(json.dumps(said.to_dict(), allow_nan=False))
    assert "cannot be read" in said.to_text()
    assert rows[0]["points"] == bundle.predict(table.parent / "20.png")[0]["points"]
    assert rows[1]["points"] == []
    assert "not an image" in rows[1]["error"]


def test_lines_for_people(bundle: Any, table: Path):
    line = bundle.say(bundle.predict([table.parent / "20.png"]))
    assert "20.png  1 " in line
    assert "  10 " in line
    assert "NME" in bundle.to_text()
    assert bundle.to_dict()["metrics"]["n"] == 6


def test_the_exported_network_answers_as_the_bundle(bundle: Any, table: Path, tmp_path: Path):
    copied = tmp_path / "copy"
    shutil.copytree(bundle.path, copied)
    record = foveal.export(copied).to_dict()
    assert record["max_abs_difference"] < 0.05
    session = onnxruntime.InferenceSession(record["path"], providers=["CPUExecutionProvider"])
    photo = Image.open(table.parent / "20.png").convert("RGB")
    pixels, matrix = fitted(photo, bundle.preprocessing.size)
    points, scores, _ = session.run(None, {"squares": pixels[None]})
    back = moved(np.linalg.inv(matrix), np.asarray(points)[0].astype(np.float64))
    expected = bundle.predict(photo)[0]["points"]
    assert np.abs(back - [[each["x"], each["y"]] for each in expected]).max() < 0.05
    assert np.abs(np.asarray(scores)[0] - [each["score"] for each in expected]).max() < 1e-3


def test_what_is_refused(bundle: Any, table: Path, tiny: str, tmp_path: Path):
    def fit(method: str, data: Path = table, out: str = "out") -> None:
        foveal.fit(str(data), task="landmarks", method=method, backbone=tiny, out=tmp_path / out, offline=True)

    with pytest.raises(UsageError, match="window=4: expected an odd number"):
        fit("subpixel-heatmap:window=4")
    with pytest.raises(UsageError, match="flip=on needs to know which points are mirror twins"):
        fit("subpixel-heatmap:flip=on")
    with pytest.raises(UsageError):
        fit("linear")
    with pytest.raises(DataError, match=r"is not a file: landmarks come as a .csv or .parquet table"):
        fit(METHOD, table.parent)
    with pytest.raises(UsageError, match="holds the Bundle of another command"):
        foveal.fit(str(table), task="landmarks", method=METHOD, backbone=tiny, out=bundle.path, seed=1, offline=True)
    assert not (tmp_path / "out").exists()
    broken = tmp_path / "broken"
    shutil.copytree(bundle.path, broken)
    stored = json.loads((broken / "bundle.json").read_text())
    (broken / "bundle.json").write_text(json.dumps({**stored, "classes": []}))
    with pytest.raises(BundleError, match="classes: List should have at least 1 item"):
        foveal.load(broken)
    (broken / "bundle.json").write_text(json.dumps({**stored, "classes": ["one"]}))
    with pytest.raises(BundleError, match=r"do not fit its bundle.json"):
        foveal.load(broken).predict(table.parent / "20.png")
