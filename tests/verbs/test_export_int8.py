"""foveal export --int8 on real files: what is kept, what is recorded, what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import foveal
from foveal.backbones.adapter import load_backbone
from foveal.cli.main import main
from foveal.core.errors import FovealError, UsageError
from foveal.ship import variants
from foveal.ship.runtime import open_runtime


@pytest.fixture(scope="module")
def fitted(photos: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    torch.manual_seed(0)
    weights = load_backbone("test_resnet", pretrained=False).model.state_dict()
    save_file({name: value.clone() for name, value in weights.items()}, folder / "weights.safetensors")
    backbone = f"test_resnet@{folder / 'weights.safetensors'}"
    shutil.copytree(photos, folder / "photos")
    foveal.fit(folder / "photos", method="linear", backbone=backbone, out=folder / "run")
    return folder


@pytest.fixture
def run(fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(variants, "ROUNDS", (2, 2))
    return Path(shutil.copytree(fitted / "run", tmp_path / "run"))


def test_an_accepted_int8_model_is_kept_and_recorded(run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(variants, "FASTER", 0.0)
    made = foveal.export(run, int8=True, require=True, max_drop=1.0)
    recorded = json.loads((run / "cost.json").read_text())["onnx"]
    assert recorded["variants"] == made["variants"]
    assert recorded["max_abs_difference"] <= 1e-4
    int8 = next(row for row in recorded["variants"] if row["name"] == "int8")
    assert int8["accepted"]
    assert int8["bytes"] == (run / "model.int8.onnx").stat().st_size
    assert "training images of photos" in recorded["calibrated_on"]
    assert "test images of photos, which the fit did not see" in recorded["judged_on"]
    assert recorded["chosen"] in made.to_text()
    for page in ("report.html", "README.md"):
        content = (run / page).read_text(encoding="utf-8")
        assert f"{recorded['chosen']} (chosen)" in content
        assert all(row["reason"].split(";")[0] in content for row in recorded["variants"])
    runtime = open_runtime(run)
    assert (runtime.variant, runtime.note) == (recorded["chosen"], "")
    image = np.asarray(Image.open(next(photos.rglob("*.jpg"))))[None]
    session = onnxruntime.InferenceSession(str(run / "model.int8.onnx"))
    probabilities, score = session.run(None, {"image": image})
    assert np.asarray(probabilities).shape == (1, 3)
    assert np.isfinite(np.asarray(score)).all()
    assert foveal.load(run).classes == ("blue", "green", "red")

    foveal.export(run)
    assert not (run / "model.int8.onnx").exists()
    assert "chosen" not in json.loads((run / "cost.json").read_text())["onnx"]
    for page in ("report.html", "README.md"):
        content = (run / page).read_text(encoding="utf-8")
        assert "(chosen)" not in content
        assert content.count("answers as the torch model") == 1


def test_a_slower_int8_model_is_not_kept(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(variants, "FASTER", 1000.0)
    made = foveal.export(run, int8=True, max_drop=1.0)
    assert made["chosen"] == "fp32"
    assert "not 1000.00 times as fast as fp32" in made.to_text()
    assert not (run / "model.int8.onnx").exists()
    with pytest.raises(FovealError, match=r"no int8 variant .* model\.onnx stays .*not 1000"):
        foveal.export(run, int8=True, max_drop=1.0, require=True)
    assert onnx.load(run / "model.onnx").metadata_props
    assert json.loads((run / "cost.json").read_text())["onnx"]["chosen"] == "fp32"
    assert open_runtime(run).variant == "fp32"


def test_other_labelled_images_can_be_named(run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(variants, "FASTER", 0.0)
    made = foveal.export(run, int8=True, data=str(photos), max_drop=1.0)
    assert "given with --data" in made["judged_on"]


def test_changed_images_are_refused(fitted: Path, run: Path):
    picture = next((fitted / "photos").rglob("*.jpg"))
    content = picture.read_bytes()
    picture.unlink()
    try:
        with pytest.raises(UsageError, match="have changed"):
            foveal.export(run, int8=True)
    finally:
        picture.write_bytes(content)
    assert (run / "model.onnx").exists()


def test_images_of_other_classes_are_refused(run: Path):
    with pytest.raises(UsageError, match="use data of its task and classes"):
        foveal.export(run, int8=True, data="sample:digits")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--require"], "--require belongs to --int8"),
        (["--int8", "--max-drop", "2"], "expected a number from 0 to 1"),
        (["--data", "sample:digits"], "--data belongs to --int8"),
    ],
)
def test_options_that_do_not_fit(fitted: Path, capsys, monkeypatch, options: list[str], said: str):
    monkeypatch.setattr("sys.argv", ["foveal", "export", str(fitted / "run"), *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
