"""`foveal pretrain`: a folder of weights that `fit` starts from, with what is known of how they came about."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import foveal
from foveal.backbones.adapter import load_backbone
from foveal.backbones.weights import RECORD, TENSORS
from foveal.cli.main import main
from foveal.core.bundle import write_json
from foveal.core.errors import BackboneError, DataError, UsageError
from foveal.core.progress import Progress

METHOD = "spark:epochs=2,batch_size=16,decoder_width=32"
GIVEN: dict[str, Any] = {"method": METHOD, "backbone": "test_resnet", "scratch": True, "size": 64, "device": "cpu"}


@pytest.fixture(scope="module")
def made(photos: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("weights") / "made"
    foveal.pretrain(str(photos), out=out, offline=True, **GIVEN)
    return out


@pytest.fixture(scope="module")
def flat(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images, in the same order, in one folder without classes."""
    folder = tmp_path_factory.mktemp("flat")
    for file in sorted(photos.rglob("*.jpg")):
        shutil.copy(file, folder / f"{file.parent.name}-{file.name}")
    return folder


@pytest.fixture
def edited(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / "edited"))


def test_the_folder_says_what_the_weights_are(made: Path, photos: Path):
    assert {file.name for file in made.iterdir()} == {TENSORS, RECORD, "report.html"}
    record = json.loads((made / RECORD).read_text(encoding="utf-8"))
    assert record["backbone"]["arch"] == "test_resnet"
    assert record["backbone"]["preprocessing"]["size"] == 64
    assert record["method"]["name"] == "spark"
    assert record["method"]["options"]["epochs"] == 2
    assert record["parent"]["origin"] == "random"
    assert len(record["parent"]["fingerprint"]) == 32
    assert record["data"]["images"] == 48
    assert len(record["data"]["fingerprint"]) == 64
    assert [row["epoch"] for row in record["history"]] == [1, 2]
    for when in ("before", "after"):
        figures = record["probe"][when]
        assert figures["blank"] == pytest.approx(1, abs=0.01)
        assert 0 <= figures["neighbour_accuracy"] <= 1
        assert 1 <= figures["effective_rank"] <= 47
    assert record["probe"]["after"]["loss"] != record["probe"]["before"]["loss"]
    assert not [entry for entry in made.parent.iterdir() if entry.name != "made"], "something was left beside it"


def test_the_report_shows_the_curve_the_probe_and_pictures(made: Path):
    page = (made / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 3 * 6
    assert "what it painted" in page
    assert "labels told by ten nearest neighbours" in page
    assert 'aria-label="loss by epoch"' in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_the_backbone_opens_offline_at_its_size_and_others(made: Path):
    backbone = load_backbone(str(made), offline=True)
    stored = load_file(made / TENSORS)
    assert backbone.preprocessing.size == 64
    assert all(torch.equal(value, stored[name]) for name, value in backbone.model.state_dict().items())
    assert len(stored) == len(backbone.model.state_dict())
    larger = load_backbone(str(made), offline=True, size=96)
    assert larger.preprocessing.size == 96
    with torch.no_grad():
        assert larger.eval()(torch.zeros(1, 3, 96, 96)).shape == (1, backbone.width)
    assert load_backbone(str(made / TENSORS), offline=True).arch == "test_resnet"
    scratch = load_backbone(str(made), pretrained=False)
    assert not torch.equal(scratch.model.state_dict()["conv1.0.weight"], stored["conv1.0.weight"])


def test_fit_starts_from_it_and_the_bundle_needs_it_no_more(made: Path, photos: Path, tmp_path: Path):
    weights = Path(shutil.copytree(made, tmp_path / "weights"))
    bundle = foveal.fit(photos, method="linear", backbone=str(weights), out=tmp_path / "run", offline=True)
    assert bundle.manifest["backbone"]["arch"] == "test_resnet"
    assert bundle.manifest["backbone"]["preprocessing"]["size"] == 64
    shutil.rmtree(weights)
    again = foveal.load(tmp_path / "run")
    stored = load_file(made / TENSORS)
    held = load_file(tmp_path / "run" / "model.safetensors")
    name = "layer1.0.conv1.weight"
    assert any(key.endswith(name) and torch.equal(value, stored[name]) for key, value in held.items())
    assert foveal.predict(again.path, [photos / "red" / "00.jpg"])


def test_labels_are_not_learnt_from(made: Path, flat: Path, tmp_path: Path):
    result = foveal.pretrain(str(flat), out=tmp_path / "out", offline=True, **GIVEN)
    assert (tmp_path / "out" / TENSORS).read_bytes() == (made / TENSORS).read_bytes()
    assert result["probe"]["after"]["neighbour_accuracy"] is None
    assert "labels told" not in result.to_text()
    assert "labels told" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_test_images_are_left_out_and_unreadable_ones_set_aside(photos: Path, cache: Path, tmp_path: Path):
    for split, first, last in (("train", 0, 8), ("test", 8, 12)):
        for name in ("red", "blue"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for file in sorted((photos / name).iterdir())[first:last]:
                shutil.copy(file, tmp_path / "data" / split / name)
    (tmp_path / "data" / "train" / "red" / "broken.jpg").write_bytes(b"no picture")
    given = {**GIVEN, "method": "spark:epochs=1,batch_size=16,decoder_width=32"}
    result = foveal.pretrain(str(tmp_path / "data"), out=tmp_path / "out", offline=True, **given)
    assert result["data"]["images"] == 16
    ((name, reason),) = result["data"]["set_aside"]
    assert name.endswith("broken.jpg")
    assert "not an image" in reason


def test_folders_that_are_no_classes(photos: Path, cache: Path, tmp_path: Path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for file in sorted((photos / "red").iterdir())[:4]:
            shutil.copy(file, tmp_path / split / f"{split}-{file.name}")
    given = {**GIVEN, "method": "spark:epochs=1,batch_size=4,decoder_width=32"}
    result = foveal.pretrain(str(tmp_path), out=tmp_path / "out", offline=True, **given)
    assert result["data"]["images"] == 8


def test_a_killed_run_goes_on_to_the_same_bits(made: Path, photos: Path, tmp_path: Path):
    out = tmp_path / "killed"
    code = f"""
import os, signal, foveal
from foveal.core.progress import Progress
from foveal.train import loop
loop.SAVE_EVERY_S = 0.0
class Deadly(Progress):
    def update(self, stage, done, total):
        if stage == "training spark" and done == 5:
            os.kill(os.getpid(), signal.SIGKILL)
foveal.pretrain({str(photos)!r}, out={str(out)!r}, offline=True, progress=Deadly(), **{GIVEN!r})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    first: list[int] = []

    class Told(Progress):
        def update(self, stage: str, done: int, total: int) -> None:
            if stage == "training spark":
                first.append(done)

    foveal.pretrain(str(photos), out=out, offline=True, progress=Told(), **GIVEN)
    assert first[0] > 1, "it began anew"
    assert (out / TENSORS).read_bytes() == (made / TENSORS).read_bytes()
    assert {entry.name for entry in tmp_path.iterdir()} == {"killed"}


def test_the_same_command_again_another_and_a_folder_of_something_else(made: Path, photos: Path, tmp_path: Path):
    before = (made / RECORD).read_bytes()
    again = foveal.pretrain(str(photos), out=made, offline=True, **GIVEN)
    assert (made / RECORD).read_bytes() == before
    assert again["probe"] == json.loads(before)["probe"]
    with pytest.raises(UsageError, match=r"holds the weights of another command \(seed 0\): choose another --out"):
        foveal.pretrain(str(photos), out=made, offline=True, seed=1, **GIVEN)
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UsageError, match="holds no weights of foveal: choose another --out"):
        foveal.pretrain(str(photos), out=tmp_path, offline=True, **GIVEN)
    assert (tmp_path / "mine").read_text() == "x"


def test_a_budget_ends_it_early(photos: Path, cache: Path, tmp_path: Path):
    given = {**GIVEN, "method": "spark:epochs=500,batch_size=16,decoder_width=32"}
    result = foveal.pretrain(str(photos), out=tmp_path / "out", offline=True, budget="0.2s", **given)
    assert 0 < result["epochs"] < 500
    assert result["history"][-1]["epoch"] == pytest.approx(result["epochs"])


def test_json(made: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    flags = ["--method", METHOD, "--backbone", "test_resnet", "--scratch", "--size", "64", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["foveal", "pretrain", str(photos), *flags, "--out", str(made), "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert json.loads(capsys.readouterr().out)["method"]["name"] == "spark"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "linear"}, UsageError, "linear is of the family adapt: pretrain takes pretrain methods"),
        ({"method": "spark:ratio=1"}, UsageError, "ratio=1: input should be less than 1"),
        ({"method": "spark:ratio=0.9"}, UsageError, "leaves 0 of 4 cells active"),
        ({"size": 100}, UsageError, "100 is not a multiple of 32"),
        ({"backbone": "test_vit", "size": None}, BackboneError, "not a network of convolutions alone"),
        ({"budget": "soon"}, UsageError, "--budget soon: expected a time"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_read(
    photos: Path, cache: Path, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        foveal.pretrain(str(photos), out=tmp_path / "out", offline=True, **{**GIVEN, **change})
    assert not list(tmp_path.iterdir())


def test_too_few_images(photos: Path, cache: Path, tmp_path: Path):
    (tmp_path / "few").mkdir()
    shutil.copy(photos / "red" / "00.jpg", tmp_path / "few")
    (tmp_path / "few" / "b.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="1 images of few can be decoded: pretraining needs at least two"):
        foveal.pretrain(str(tmp_path / "few"), out=tmp_path / "out", offline=True, **GIVEN)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"holds no images|no images given"):
        foveal.pretrain(str(tmp_path / "none"), out=tmp_path / "out", offline=True, **GIVEN)


def test_spoilt_folders_are_refused(edited: Path):
    def refused(message: str) -> None:
        with pytest.raises(BackboneError, match=message):
            load_backbone(str(edited), offline=True)

    record = json.loads((edited / RECORD).read_text(encoding="utf-8"))
    tensors = load_file(edited / TENSORS)
    save_file({**tensors, "conv1.0.weight": tensors["conv1.0.weight"] + 1}, edited / TENSORS)
    refused("model.safetensors in .* was edited or is damaged")
    write_json(edited / RECORD, {**record, "format": 99})
    refused("have format 99, this foveal reads up to 1: pip install --upgrade foveal")
    write_json(edited / RECORD, {**record, "backbone": {**record["backbone"], "preprocessing": {"size": 10**9}}})
    refused("weights.json in .* is not as foveal writes it .*size")
    (edited / RECORD).write_text("{")
    refused("cannot be read")


def test_what_a_stranger_s_folder_says_reaches_timm_as_a_name_alone(edited: Path):
    record = json.loads((edited / RECORD).read_text(encoding="utf-8"))
    record["backbone"]["args"] = {"checkpoint_path": "/etc/passwd"}
    write_json(edited / RECORD, record)
    assert load_backbone(str(edited), offline=True).plan.args == {}
    record["backbone"]["arch"] = "hf-hub:owner/name"
    write_json(edited / RECORD, record)
    with pytest.raises(BackboneError, match="no backbone 'hf-hub:owner/name'"):
        load_backbone(str(edited), offline=True)


def test_probing_leaves_the_features_of_equal_weights_alone(made: Path, photos: Path, cache: Path, tmp_path: Path):
    """Training on from the folder: the parent is what the folder holds, and the rows before are its rows after."""
    given = {**GIVEN, "backbone": str(made), "scratch": False, "size": None}
    result = foveal.pretrain(str(photos), out=tmp_path / "on", offline=True, **given)
    before = json.loads((made / RECORD).read_text(encoding="utf-8"))
    assert result["parent"]["fingerprint"] == load_backbone(str(made)).fingerprint()
    assert result["probe"]["before"]["neighbour_accuracy"] == before["probe"]["after"]["neighbour_accuracy"]
    assert np.isclose(result["probe"]["before"]["effective_rank"], before["probe"]["after"]["effective_rank"])
