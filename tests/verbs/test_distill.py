"""`foveal distill`: a teacher's Bundle and images in, an ordinary Bundle of the student out."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

import foveal
from foveal.cli.main import main
from foveal.core.bundle import sha256
from foveal.core.errors import BackboneError, DataError, UsageError

LIGHT = "srd-ossl:epochs=2,batch_size=16"
STUDENT = "test_efficientnet"


@pytest.fixture(scope="module")
def teacher(colours: foveal.Bundle) -> Path:
    return colours.path


@pytest.fixture(scope="module")
def others(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of nothing in particular, in grey and with transparency too, two that cannot be used, and no labels."""
    folder, rng = tmp_path_factory.mktemp("others"), np.random.default_rng(3)
    for index, mode in enumerate(["RGB", "L", "RGBA", "RGB"]):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).convert(mode).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def student(teacher: Path, photos: Path, others: Path, tmp_path_factory: pytest.TempPathFactory) -> foveal.Bundle:
    before = {file.name: sha256(file) for file in teacher.iterdir()}
    made = foveal.distill(
        teacher, photos, student=STUDENT, scratch=True, method=LIGHT, unlabelled=others, baseline=True,
        out=tmp_path_factory.mktemp("runs") / "student", offline=True,
    )  # fmt: skip
    assert {file.name: sha256(file) for file in teacher.iterdir()} == before, "the teacher's Bundle changed"
    return made


def test_teacher_student_and_labels_alone_side_by_side(student: foveal.Bundle, teacher: Path):
    record = student.metrics["distilled"]
    master, own, alone = record["rows"]
    assert [row["name"] for row in record["rows"]] == ["teacher", "student", "labels alone"]
    assert master["balanced_accuracy"] == foveal.load(teacher).metrics["balanced_accuracy"]
    assert own["balanced_accuracy"] == student.metrics["balanced_accuracy"]
    assert alone["balanced_accuracy"]["value"] is not None
    assert own["parameters"] == student.cost["parameters"]["total"]
    assert record["shares"]["parameters"] == pytest.approx(own["parameters"] / master["parameters"], abs=1e-4)
    assert record["unlabelled"] == 4
    page = (student.path / "report.html").read_text(encoding="utf-8")
    assert "Student and teacher" in page
    assert "4 images without labels joined training" in page
    manifest = student.manifest
    assert manifest["teacher"]["fingerprint"] == foveal.load(teacher).fingerprint
    assert manifest["seed"] == foveal.load(teacher).manifest["seed"]
    assert manifest["data"]["splits"] == foveal.load(teacher).manifest["data"]["splits"]


def test_the_student_is_an_ordinary_bundle(student: foveal.Bundle, photos: Path):
    names = {name.split(".")[1] for name in student.model.state_dict() if name.startswith("classifier.")}
    assert names == {"backbone", "head"}, "something of the pair was left in the student"
    image = photos / "red" / "00.jpg"
    (row,) = foveal.load(student.path).predict([image])
    assert row["label"] in student.classes
    foveal.export(student.path)
    session = onnxruntime.InferenceSession(student.path / "model.onnx")
    graph = {each.name for each in session.get_inputs()}
    with Image.open(image) as opened:
        probabilities, _ = session.run(None, {graph.pop(): np.asarray(opened)[None]})
    top = {name: float(p) for name, p in zip(student.classes, probabilities[0], strict=True)}
    assert top[row["label"]] == pytest.approx(row["probability"], abs=1e-4)


def test_the_same_command_again_is_finished_and_another_refused(
    student: foveal.Bundle, teacher: Path, photos: Path, others: Path
):
    written = (student.path / "bundle.json").stat().st_mtime_ns
    given = {"student": STUDENT, "scratch": True, "method": LIGHT, "unlabelled": others, "baseline": True}
    foveal.distill(teacher, photos, **given, out=student.path, offline=True)
    assert (student.path / "bundle.json").stat().st_mtime_ns == written
    with pytest.raises(UsageError, match="holds the Bundle of another command"):
        foveal.distill(teacher, photos, **{**given, "baseline": False}, out=student.path, offline=True)


def test_another_seed_is_told(teacher: Path, photos: Path, tmp_path: Path):
    made = foveal.distill(
        teacher, photos, student=STUDENT, scratch=True, method="srd-ossl:epochs=1", seed=5, out=tmp_path / "other",
        offline=True,
    )  # fmt: skip
    assert "learnt from some of these test images" in made.metrics["distilled"]["notes"][0]
    assert "Learnt from some of these" not in (made.path / "report.html").read_text(encoding="utf-8")
    assert "learnt from some of these test images" in (made.path / "report.html").read_text(encoding="utf-8")


def test_bad_input(teacher: Path, photos: Path, tmp_path: Path):
    def attempt(**given: object) -> None:
        usual = {"student": STUDENT, "scratch": True, "method": LIGHT, "out": tmp_path / "x", "offline": True}
        foveal.distill(teacher, photos, **{**usual, **given})  # type: ignore[arg-type]

    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images given"):
        attempt(unlabelled=tmp_path / "empty")
    with pytest.raises(DataError, match=r"unlabelled images can be used .*is one of the images to test on"):
        copy_of_tests(teacher, photos, tmp_path / "tests")
        attempt(unlabelled=tmp_path / "tests")
    with pytest.raises(UsageError, match="linear is a method of family adapt: expected one of srd-ossl"):
        attempt(method="linear")
    with pytest.raises(UsageError, match="compares equal numbers of steps: leave out --budget"):
        attempt(baseline=True, budget="5s")
    with pytest.raises(BackboneError, match="not on this machine, and foveal is offline"):
        attempt(student="resnet10t", scratch=False)
    with pytest.raises(UsageError, match="srd-ossl is a distill method: fit and compare take adapt methods"):
        foveal.fit(photos, method="srd-ossl", out=tmp_path / "x", offline=True)
    assert not (tmp_path / "x").exists()


def copy_of_tests(teacher: Path, photos: Path, folder: Path) -> None:
    from foveal.data.open import open_dataset
    from foveal.verbs._prepare import prepare

    prepared = prepare(photos, foveal.load(teacher).manifest["request"]["backbone"], offline=True)
    folder.mkdir()
    dataset = open_dataset(photos)
    for row in np.flatnonzero(prepared.splits(foveal.load(teacher).manifest["seed"]) == "test").tolist():
        (folder / f"{row}.jpg").write_bytes(dataset.read(row))


def test_on_the_command_line(
    teacher: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    command = ["distill", teacher, photos, "--student", STUDENT, "--scratch", "--method", "srd-ossl:epochs=1"]
    monkeypatch.setattr(
        sys, "argv", ["foveal", *map(str, command), "--out", str(tmp_path / "s"), "--offline", "--json"]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bundle"] == str(tmp_path / "s")
    assert [row["name"] for row in told["metrics"]["distilled"]["rows"]] == ["teacher", "student"]
