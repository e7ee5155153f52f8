"""The main path on real files, in one process: fit, predict, evaluate, check, compare, export."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

import foveal
from foveal.core.errors import BackboneError, UsageError
from foveal.data.worlds import garbage

METRICS = {"accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece"}
FILES = {
    "model.safetensors",
    "bundle.json",
    "calibration.json",
    "metrics.json",
    "cost.json",
    "report.html",
    "README.md",
}


@pytest.fixture(scope="module")
def bundle(photos: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> foveal.Bundle:
    return foveal.fit(photos, out=tmp_path_factory.mktemp("runs") / "photos")


def test_fit_writes_the_whole_bundle(bundle: foveal.Bundle):
    assert {file.name for file in bundle.path.iterdir()} == FILES
    assert not bundle.path.with_name("photos.work").exists()
    assert bundle.classes == ("blue", "green", "red")
    assert bundle.metrics["balanced_accuracy"]["value"] > 0.9
    for name in METRICS:
        entry = bundle.metrics[name]
        assert entry["low"] <= entry["value"] <= entry["high"]
    assert set(bundle.metrics["references"]) == {"majority", "brightness"}
    assert bundle.metrics["references"]["majority"]["balanced_accuracy"]["value"] == pytest.approx(1 / 3)


def test_the_race_is_told(bundle: foveal.Bundle):
    contest = bundle.metrics["race"]
    assert {row["method"] for row in contest} >= {"linear", "nn-revisit", "gda-clip", "naive-bayes-probe"}
    best = max(row["balanced_accuracy"] for row in contest)
    won = next(row for row in contest if row["method"] == bundle.manifest["method"]["name"])
    assert won["balanced_accuracy"] == best
    assert "cross-validated" in bundle.manifest["why"]
    assert "cross-validated" in (bundle.path / "report.html").read_text(encoding="utf-8")


def test_predict_answers_and_says_unknown_for_garbage(bundle: foveal.Bundle, photos: Path, tmp_path: Path):
    rows = bundle.predict(photos)
    assert len(rows) == 48
    right = [row["label"] == Path(row["image"]).parent.name for row in rows]
    assert np.mean(right) > 0.9
    for row in rows:
        assert set(row) == {"image", "label", "probability", "unknown", "top"}
        assert row["top"][0] == [row["label"], row["probability"]]
        assert math.isclose(sum(p for _, p in row["top"]), 1, abs_tol=1e-5)
    assert np.mean([row["unknown"] for row in rows]) < 0.2
    strange = bundle.predict(list(garbage(20, 224, 99)))
    assert np.mean([row["unknown"] for row in strange]) > 0.5


def test_predict_takes_paths_arrays_and_images_alike(bundle: foveal.Bundle, photos: Path):
    path = photos / "red" / "00.jpg"
    picture = Image.open(path).convert("RGB")
    answers = [bundle.predict(each)[0]["probability"] for each in (path, str(path), picture, np.asarray(picture))]
    assert np.ptp(answers) < 1e-6


def test_a_file_that_is_no_image_is_told_and_the_rest_answered(bundle: foveal.Bundle, photos: Path, tmp_path: Path):
    (tmp_path / "bad.jpg").write_text("not an image")
    rows = bundle.predict([tmp_path / "bad.jpg", photos / "red" / "01.jpg"])
    assert rows[0]["label"] is None
    assert rows[0]["error"]
    assert rows[1]["label"] == "red"


def test_evaluate_measures_what_predict_answers(bundle: foveal.Bundle, photos: Path):
    measured = foveal.evaluate(bundle.path, str(photos))
    rows = bundle.predict(photos)
    right = np.mean([row["label"] == Path(row["image"]).parent.name for row in rows])
    assert measured["accuracy"]["value"] == pytest.approx(right)
    assert measured["n"] == 48


def test_the_same_command_gives_the_same_bundle(bundle: foveal.Bundle, photos: Path, tmp_path: Path):
    again = foveal.fit(photos, out=tmp_path / "again")
    assert (again.path / "model.safetensors").read_bytes() == (bundle.path / "model.safetensors").read_bytes()
    assert (again.path / "metrics.json").read_text() != ""
    for name in METRICS:
        assert again.metrics[name] == bundle.metrics[name]


def test_a_finished_bundle_is_kept_and_another_command_does_not_overwrite_it(bundle: foveal.Bundle, photos: Path):
    before = (bundle.path / "bundle.json").read_bytes()
    assert foveal.fit(photos, out=bundle.path).path == bundle.path
    with pytest.raises(UsageError, match=r"another command .*seed 0.* choose another --out"):
        foveal.fit(photos, out=bundle.path, seed=1)
    assert (bundle.path / "bundle.json").read_bytes() == before


def test_export_answers_as_predict(bundle: foveal.Bundle, photos: Path):
    record = foveal.export(bundle.path)
    assert record["max_abs_difference"] <= 1e-4
    assert foveal.load(bundle.path).cost["onnx"]["max_abs_difference"] == record["max_abs_difference"]
    session = onnxruntime.InferenceSession(str(bundle.path / "model.onnx"))
    for path in sorted(photos.glob("*/0[0-3].jpg")):
        pixels = np.asarray(Image.open(path).convert("RGB"))[None]
        probabilities = session.run(None, {session.get_inputs()[0].name: pixels})[0][0]
        row = bundle.predict(path)[0]
        assert bundle.classes[int(probabilities.argmax())] == row["label"]
        assert float(probabilities.max()) == pytest.approx(row["probability"], abs=1e-4)


def test_compare_has_a_row_per_method_and_seed_beside_the_references(photos: Path, cache: Path, tmp_path: Path):
    rows = foveal.compare(str(photos), methods="linear,nn-revisit:k=4", seeds=2, out=tmp_path / "c").to_dict()
    assert [(row["method"], row["seed"]) for row in rows] == [
        (name, seed) for name in ("linear", "nn-revisit:k=4", "majority", "brightness") for seed in (0, 1)
    ]
    fields = {"method", "seed", "split", "seconds", "trained_params", "total_params", "images_per_second"} | METRICS
    assert all(set(row) == fields for row in rows)
    assert {file.name for file in (tmp_path / "c").iterdir()} == {
        "comparison.json",
        "comparison.csv",
        "comparison.html",
    }
    with (tmp_path / "c" / "comparison.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == [row["method"] for row in rows]


def test_compare_leaves_out_what_the_backbone_cannot_do(photos: Path, cache: Path, tmp_path: Path):
    rows = foveal.compare(str(photos), methods="linear,vpt", out=tmp_path / "c").to_dict()
    assert [row["method"] for row in rows] == ["linear", "majority", "brightness"]
    with pytest.raises(BackboneError, match="VPT needs transformer blocks"):
        foveal.compare(str(photos), methods="vpt", out=tmp_path / "d")


def test_check_finds_what_is_wrong(photos: Path, cache: Path, tmp_path: Path):
    place = tmp_path / "wrong"
    for file in photos.glob("*/*.jpg"):
        target = place / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    (place / "red" / "copy.jpg").write_bytes((photos / "red" / "03.jpg").read_bytes())
    (place / "blue" / "conflict.jpg").write_bytes((photos / "green" / "04.jpg").read_bytes())
    (place / "red" / "text.jpg").write_text("hello")
    (place / "blue" / "cut.jpg").write_bytes((photos / "blue" / "00.jpg").read_bytes()[:700])
    findings = foveal.check(str(place))["findings"]
    named = {kind: {image for item in items for image in item["images"]} for kind, items in findings.items()}
    assert {"red/text.jpg", "blue/cut.jpg"} <= named["corrupt"]
    assert {"red/copy.jpg", "red/03.jpg"} <= named["duplicate"]
    assert {"blue/conflict.jpg", "green/04.jpg"} <= named["conflicting_label"]
    assert all(item["message"] for items in findings.values() for item in items)


def test_several_labels_per_image(photos: Path, cache: Path, tmp_path: Path):
    rows = [(file, file.parent.name) for file in sorted(photos.glob("*/*.jpg"))]
    table = tmp_path / "labels.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label"])
        writer.writerows((path, name if name == "red" else f"{name}|cold") for path, name in rows)
    bundle = foveal.fit(table, out=tmp_path / "multi")
    assert bundle.task == "multi-label"
    assert bundle.classes == ("blue", "cold", "green", "red")
    assert bundle.metrics["balanced_accuracy"]["value"] > 0.85
    answer = bundle.predict(photos / "blue" / "05.jpg")[0]
    assert answer["label"] == "blue|cold"
    assert foveal.export(bundle.path)["max_abs_difference"] <= 1e-4


def test_own_splits_are_kept(photos: Path, cache: Path, tmp_path: Path):
    for file in sorted(photos.glob("*/*.jpg")):
        split = "test" if int(file.stem) < 4 else "train"
        target = tmp_path / "split" / split / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    bundle = foveal.fit(tmp_path / "split", method="linear", out=tmp_path / "b")
    assert bundle.metrics["n"] == 12
    assert bundle.manifest["data"]["split_by"] == "the data"


def test_methods_samples_and_backbones_list_themselves():
    found = {row["name"]: row for row in foveal.methods().to_dict()}
    assert {"linear", "full", "lora", "nn-revisit", "gda-clip", "naive-bayes-probe", "attention-only", "vpt"} <= set(
        found
    )
    assert found["nn-revisit"]["arxiv"] == "2112.08459"
    assert {row["name"] for row in foveal.samples().to_dict()} == {"elpv", "elpv-type", "textile", "digits"}
    lite = foveal.backbones("tf_efficientnet_lite0").to_dict()[0]
    assert lite["weights"] == "package"


def test_no_connection_is_opened(photos: Path, tmp_path: Path):
    code = (
        "import socket\n"
        "def refuse(*_): raise AssertionError('a connection was opened')\n"
        "socket.socket.connect = socket.socket.connect_ex = refuse\n"
        "socket.getaddrinfo = refuse\n"
        "import foveal\n"
        f"photos, out = {str(photos)!r}, {str(tmp_path / 'b')!r}\n"
        "foveal.fit(photos, method='linear', out=out, offline=True).predict(photos)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_json_is_all_that_stands_on_stdout(bundle: foveal.Bundle, photos: Path):
    foveal_command = str(Path(sys.executable).parent / "foveal")
    done = subprocess.run(
        [foveal_command, "predict", str(bundle.path), str(photos / "red"), "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert len(json.loads(done.stdout)) == 16
