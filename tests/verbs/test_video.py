import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import foveal
from foveal.cli.main import main
from foveal.core.errors import BundleError, DataError, FovealError, UsageError
from foveal.data.clips import segments
from foveal.data.images import to_pixels
from foveal.features.clips import normalised

METHOD = "gsf-xvit:frames=4,epochs=2,batch_size=4,augment=none"


def clip(right: bool, colour: int, seed: int) -> list[Image.Image]:
    """A bright square that goes one way, seven frames of 40 x 32 pixels."""
    rng = np.random.default_rng(seed)
    ground, y = rng.integers(0, 60, (32, 40, 3), dtype=np.uint8), int(rng.integers(2, 18))
    pictures = []
    for place in range(7) if right else reversed(range(7)):
        picture = ground.copy()
        picture[y : y + 12, 4 * place : 4 * place + 12, colour] = 250
        pictures.append(Image.fromarray(picture))
    return pictures


def write(folder: Path, pictures: list[Image.Image]) -> None:
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")


def encode(path: Path, pictures: list[Image.Image]) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 40, 32, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("video") / "moves"
    for name, right in (("left", False), ("right", True)):
        for number in range(8):
            write(root / name / f"clip{number}", clip(right, number % 3, number))
        encode(root / name / "film.mp4", clip(right, 1, 50))
    (root / "left" / "broken.mp4").write_bytes(b"nothing")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    import timm

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "small.safetensors"
    model = timm.create_model("test_resnet", num_classes=0)
    save_file(model.state_dict(), file)
    return f"test_resnet@{file}"


@pytest.fixture(scope="module")
def bundle(data: Path, weights: str, cache: Path, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("runs") / "moves"
    return foveal.fit(str(data), task="video", method=METHOD, backbone=weights, out=out, offline=True)


def test_the_bundle(bundle, data: Path):
    held = {file.name for file in bundle.path.iterdir()}
    assert held == {
        "bundle.json", "model.safetensors", "calibration.json", "metrics.json", "cost.json", "report.html", "README.md",
    }  # fmt: skip
    assert not bundle.path.with_name("moves.work").exists()
    assert bundle.manifest["data"]["clips"] == 18
    assert [name for name, _ in bundle.manifest["data"]["set_aside"]] == ["left/broken.mp4"]
    assert set(bundle.metrics["references"]) == {"majority", "shuffled"}
    assert (
        bundle.metrics["accuracy"]["low"] <= bundle.metrics["accuracy"]["value"] <= bundle.metrics["accuracy"]["high"]
    )
    assert len(bundle.metrics["history"]) == 2
    assert bundle.cost["frames"] == 4
    page = (bundle.path / "report.html").read_text()
    assert "test_resnet@small.safetensors" in page
    assert str(data.parent.parent) not in page, "the page says where on this machine things lie"
    assert page.count("data:image/jpeg") >= bundle.metrics["n"]
    assert "frames in any order" in page
    card = (bundle.path / "README.md").read_text()
    assert "video-classification" in card
    assert "balanced accuracy" in bundle.to_text()


def test_predict_answers_as_the_model_does(bundle, data: Path):
    opened = foveal.load(bundle.path)
    rows = opened.predict([data / "left" / "clip0", data / "left" / "film.mp4", data / "left" / "broken.mp4"])
    assert [Path(row["clip"]).name for row in rows] == ["clip0", "film.mp4", "broken.mp4"]
    assert rows[2]["label"] is None
    assert "not a video" in rows[2]["error"]
    for row in rows[:2]:
        assert row["label"] in ("left", "right")
        assert sum(p for _, p in row["top"]) == pytest.approx(1, abs=1e-5)
    pictures = [Image.open(data / "left" / "clip0" / f"{number}.png") for number in segments(7, 4)]
    shown = normalised(
        np.stack([to_pixels(picture, opened.preprocessing) for picture in pictures])[None], opened.preprocessing
    )
    with torch.no_grad():
        probabilities, _ = opened.model(shown)
    assert dict(rows[0]["top"])["left"] == pytest.approx(float(probabilities[0, 0]), abs=1e-5)
    assert len(opened.predict(data)) == 19


def test_exported_it_takes_whole_frames(bundle, data: Path, tmp_path: Path):
    import onnxruntime

    shutil.copytree(bundle.path, tmp_path / "copy")
    record = foveal.export(tmp_path / "copy").to_dict()
    assert record["max_abs_difference"] < 1e-4
    assert (record["images"], record["checked"]) == (8, "clips")
    session = onnxruntime.InferenceSession(record["path"], providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    assert (json.loads(told["classes"]), told["frames"], told["task"]) == (["left", "right"], "4", "video")
    names = [data / "left" / "clip0", data / "right" / "clip3", data / "right" / "clip5"]
    clips = np.stack([[np.asarray(Image.open(name / f"{at}.png")) for at in segments(7, 4)] for name in names])
    probabilities, scores = session.run(["probabilities", "unknown_score"], {"clips": clips})
    threshold = float(told["unknown_threshold"])
    for row, said, score in zip(bundle.predict(names), np.asarray(probabilities), np.asarray(scores), strict=True):
        assert dict(row["top"])["left"] == pytest.approx(float(said[0]), abs=1e-4)
        assert row["unknown"] == (float(score) > threshold)
    with pytest.raises(UsageError, match=r"none.mp4.*name others with --images"):
        foveal.export(tmp_path / "copy", images=data / "none.mp4")
    assert (tmp_path / "copy" / "model.onnx").is_file(), "a refused export took the one before it away"


def test_the_command_line(bundle, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    asked = ["foveal", "predict", str(bundle.path), str(data / "right" / "clip1")]
    monkeypatch.setattr(sys, "argv", [*asked, "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    (row,) = json.loads(capsys.readouterr().out)
    assert row["clip"].endswith("clip1")
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit):
        main()
    assert row["label"] in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*asked[:3], str(data / "none.mp4")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "expected a video file or a folder of frames" in capsys.readouterr().err


def test_the_same_command_again_is_done_and_another_is_refused(bundle, data: Path, weights: str):
    again = foveal.fit(str(data), task="video", method=METHOD, backbone=weights, out=bundle.path, offline=True)
    assert again.manifest == bundle.manifest
    with pytest.raises(UsageError, match="holds the Bundle of another command"):
        foveal.fit(str(data), task="video", method=METHOD, backbone=weights, out=bundle.path, seed=1, offline=True)


def test_bad_input(bundle, data: Path, weights: str, photos: Path, tmp_path: Path):
    with pytest.raises(DataError, match="a clip in each"):
        foveal.fit(str(photos), task="video", method=METHOD, backbone=weights, out=tmp_path / "a", offline=True)
    with pytest.raises(FovealError, match="linear does"):
        foveal.fit(str(data), task="video", method="linear", backbone=weights, out=tmp_path / "b", offline=True)
    few = tmp_path / "few"
    for name in ("a", "b"):
        write(few / name / "0", clip(True, 0, 1))
    with pytest.raises(DataError, match="class a has 1 image"):
        foveal.fit(str(few), task="video", method=METHOD, backbone=weights, out=tmp_path / "c", offline=True)
    assert not list(tmp_path.glob("?.work"))
    with pytest.raises(DataError, match="no clip"):
        bundle.predict(tmp_path / "none.mp4")
    with pytest.raises(DataError, match="none of the 1 clips can be decoded"):
        bundle.predict(data / "left" / "broken.mp4")


def test_an_edited_bundle_is_refused(bundle, data: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["classes"] = ["left", "right", "up"]
    (copy / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="do not fit its bundle"):
        foveal.load(copy).predict(data / "left" / "clip0")
