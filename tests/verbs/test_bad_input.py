"""Bad input: exit code 2, one line that says what came, what was expected, what to do; nothing lost."""

import json
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import foveal
from foveal.cli.main import main
from foveal.core.bundle import write_json
from foveal.core.errors import BackboneError, DataError, UsageError


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cache: Path) -> Callable[..., str]:
    """Run a command that must fail with exit code 2; gives its one line."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["foveal", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        assert stopped.value.code == 2, captured.err
        assert captured.out == ""
        lines = [line for line in captured.err.splitlines() if line.startswith("foveal: ")]
        assert len(lines) == 1
        assert "Traceback" not in captured.err
        return lines[0]

    return run


def classes_of(root: Path, photos: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for file in sorted((photos / name).iterdir())[:count]:
            shutil.copy(file, root / name)
    return root


def bomb() -> bytes:
    """A PNG header that announces 30,000 x 30,000 pixels, and a little data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1_000_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "command",
    [
        ("predict", "runs/x", ""),
        ("predict", "", "photo.png"),
        ("predict", "runs/x", "photo.png", ""),
        ("fit", ""),
        ("index", "photos", "--out", ""),
        ("search", "library", "--text", ""),
        ("update", "runs/x", "new", "--old", ""),
        ("serve", "runs/x", "--token", ""),
    ],
)
def test_what_is_empty_is_not_the_folder_here(command: tuple[str, ...], say: Callable[..., str]):
    assert "it is empty: give a value (for the folder you are in, write .), or leave it out" in say(*command)


def test_every_verb_refuses_an_empty_path(say: Callable[..., str]):
    """Whatever a verb takes first is a path or a name; those of the Python API are its signature's."""
    import inspect

    from foveal import VERBS

    asked = 0
    for verb in VERBS:
        parameters = [
            p for p in inspect.signature(getattr(foveal, verb)).parameters.values() if p.kind != p.KEYWORD_ONLY
        ]
        if parameters:
            said = say(verb, *[""] * len(parameters))
            assert f"'{parameters[0].name.upper()}" in said
            assert "it is empty" in said
            asked += 1
    assert asked > 15


def test_a_path_that_is_not_there(say: Callable[..., str]):
    assert "nowhere" in say("fit", "nowhere/")


def test_an_empty_folder(say: Callable[..., str], tmp_path: Path):
    assert "no image" in say("fit", tmp_path).lower()


def test_one_class(say: Callable[..., str], tmp_path: Path, photos: Path):
    message = say("fit", classes_of(tmp_path / "d", photos, {"red": 8}))
    assert "class" in message
    assert "red" in message


def test_a_class_with_one_image(say: Callable[..., str], tmp_path: Path, photos: Path):
    message = say("fit", classes_of(tmp_path / "d", photos, {"red": 8, "blue": 1}))
    assert "blue" in message
    assert "1 image" in message


@pytest.mark.parametrize(
    "content", [b"", b"hello", bomb(), b"\xff\xd8\xff\xe0" + b"\0" * 50], ids=["empty", "text", "bomb", "cut"]
)
def test_all_files_corrupt(say: Callable[..., str], tmp_path: Path, content: bytes):
    for name in ("a", "b"):
        (tmp_path / "d" / name).mkdir(parents=True)
        for index in range(4):
            (tmp_path / "d" / name / f"{index}.png").write_bytes(content)
    assert "none of the 8 images" in say("fit", tmp_path / "d")


def test_some_files_corrupt_are_set_aside_and_named(tmp_path: Path, photos: Path, cache: Path):
    place = classes_of(tmp_path / "d", photos, {"red": 8, "blue": 8})
    good = (photos / "red" / "09.jpg").read_bytes()
    wrong = {"bomb.png": bomb(), "truncated.jpg": good[: len(good) // 2], "text.jpg": b"hello", "empty.png": b""}
    for name, content in wrong.items():
        (place / "red" / name).write_bytes(content)
    bundle = foveal.fit(place, method="linear", out=tmp_path / "b")
    named = {Path(name).name for name, _ in bundle.manifest["data"]["set_aside"]}
    assert named == set(wrong)
    report = (bundle.path / "report.html").read_text(encoding="utf-8")
    assert all(name in report for name in wrong)


def test_a_symlink_loop_and_odd_file_names(tmp_path: Path, photos: Path, cache: Path):
    place = classes_of(tmp_path / "d", photos, {"red": 8, "blue": 8})
    (place / "red" / "loop").symlink_to(place, target_is_directory=True)
    odd = bytes(place / "blue") + b"/caf\xe9 \xff.jpg"
    with open(odd, "wb") as file:
        file.write((photos / "blue" / "09.jpg").read_bytes())
    bundle = foveal.fit(place, method="linear", out=tmp_path / "b")
    assert bundle.manifest["data"]["images"] == 17
    rows = bundle.predict(place / "blue")
    assert len(json.dumps(rows)) > 0
    assert len(rows) == 9


def test_a_csv_that_names_missing_files(say: Callable[..., str], tmp_path: Path, photos: Path):
    table = tmp_path / "labels.csv"
    table.write_text("image,label\nnot-there.jpg,a\nnor-this.jpg,b\n")
    message = say("fit", table)
    assert "not-there.jpg" in message or "2" in message


def test_a_csv_without_the_columns(say: Callable[..., str], tmp_path: Path):
    table = tmp_path / "labels.csv"
    table.write_text("file,class\na.jpg,a\n")
    message = say("fit", table)
    assert "image" in message
    assert "label" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method", "liner"], "did you mean linear"),
        (["--method", "linear:c=-3,zz=1"], "zz: unknown"),
        (["--method", "linear:c"], "key=value"),
        (["--backbone", "tf_efficientnet_light0"], "did you mean"),
        (["--backbone", "no-such-file.safetensors"], "no-such-file.safetensors"),
        (["--budget", "soon"], "expected a time such as 90s, 10m or 2h"),
        (["--device", "tpu"], "expected auto, cpu or cuda"),
        (["--seed", "one"], "valid integer"),
        (["--class-weights", "some"], "expected auto or none"),
        (["--nonsense"], "No such option"),
    ],
)
def test_options_that_cannot_be_used(
    say: Callable[..., str], photos: Path, tmp_path: Path, arguments: list[str], expected: str
):
    assert expected in say("fit", photos, "--out", tmp_path / "b", *arguments)
    assert not (tmp_path / "b").exists()


def test_weights_with_a_wrong_shape(say: Callable[..., str], photos: Path, tmp_path: Path):
    import timm

    weights = timm.create_model("test_resnet", pretrained=False).state_dict()
    name = next(iter(weights))
    weights[name] = weights[name][:1].clone()
    save_file(weights, tmp_path / "w.safetensors")
    message = say("fit", photos, "--backbone", f"test_resnet@{tmp_path / 'w.safetensors'}", "--out", tmp_path / "b")
    assert name in message
    assert "expected" in message


def test_a_pickle_is_not_loaded(say: Callable[..., str], photos: Path, tmp_path: Path):
    import os
    import pickle

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    (tmp_path / "w.pth").write_bytes(pickle.dumps(Attack()))
    say("fit", photos, "--backbone", f"test_resnet@{tmp_path / 'w.pth'}", "--out", tmp_path / "b")
    assert not (tmp_path / "owned").exists()


def test_weights_that_are_only_on_the_hub_without_network(say: Callable[..., str], photos: Path, tmp_path: Path):
    message = say("fit", photos, "--backbone", "resnet18", "--offline", "--out", tmp_path / "b")
    assert "resnet18" in message
    assert "offline" in message


@pytest.fixture(scope="module")
def good(photos: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foveal.fit(photos, method="linear", out=tmp_path_factory.mktemp("good") / "b").path


def test_a_bundle_that_is_none(say: Callable[..., str], photos: Path):
    assert "is not a Bundle" in say("predict", photos, photos)


def test_a_bundle_with_a_missing_file(say: Callable[..., str], good: Path, photos: Path, tmp_path: Path):
    broken = shutil.copytree(good, tmp_path / "b")
    (broken / "calibration.json").unlink()
    assert "lacks calibration.json" in say("predict", broken, photos)


def test_a_bundle_with_edited_weights(say: Callable[..., str], good: Path, photos: Path, tmp_path: Path):
    broken = shutil.copytree(good, tmp_path / "b")
    content = bytearray((broken / "model.safetensors").read_bytes())
    content[-3] ^= 255
    (broken / "model.safetensors").write_bytes(content)
    assert "model.safetensors in Bundle" in say("evaluate", broken, photos)


def test_a_bundle_whose_weights_do_not_fit(say: Callable[..., str], good: Path, photos: Path, tmp_path: Path):
    from foveal.core.bundle import sha256

    broken = shutil.copytree(good, tmp_path / "b")
    weights = load_file(broken / "model.safetensors")
    weights["classifier.head.weight"] = weights["classifier.head.weight"][:, :7].clone()
    save_file(weights, broken / "model.safetensors")
    manifest = json.loads((broken / "bundle.json").read_text())
    manifest["sha256"]["model.safetensors"] = sha256(broken / "model.safetensors")
    write_json(broken / "bundle.json", manifest)
    assert "do not fit" in say("predict", broken, photos)


def test_a_bundle_of_a_newer_format(say: Callable[..., str], good: Path, photos: Path, tmp_path: Path):
    broken = shutil.copytree(good, tmp_path / "b")
    manifest = json.loads((broken / "bundle.json").read_text())
    write_json(broken / "bundle.json", {**manifest, "format": 99})
    assert "pip install --upgrade foveal" in say("predict", broken, photos)


def test_images_that_are_not_there(say: Callable[..., str], good: Path, tmp_path: Path):
    assert "nothing.jpg" in say("predict", good, tmp_path / "nothing.jpg")


def test_classes_the_bundle_does_not_know(say: Callable[..., str], good: Path, photos: Path, tmp_path: Path):
    place = classes_of(tmp_path / "d", photos, {"red": 4})
    shutil.copytree(photos / "blue", place / "violet")
    message = say("evaluate", good, place)
    assert "violet" in message
    assert "blue, green, red" in message


def test_export_to_another_format(say: Callable[..., str], good: Path):
    assert "expected onnx" in say("export", good, "--to", "coreml")


def test_a_large_image_is_answered(good: Path, tmp_path: Path):
    Image.fromarray(np.zeros((1500, 4000, 3), np.uint8)).save(tmp_path / "wide.png")
    row = foveal.load(good).predict(tmp_path / "wide.png")[0]
    assert row["label"] in ("blue", "green", "red")


def test_folders_may_be_plain_strings(
    colours: foveal.Bundle, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each verb gets past its folders, with --out and without, to what is wrong with the rest."""
    monkeypatch.chdir(tmp_path)
    bundle, data, image = str(colours.path), str(photos), str(photos / "red" / "00.jpg")
    for out in ({}, {"out": "somewhere"}):
        with pytest.raises(UsageError, match="at least 2"):
            foveal.audit(bundle, data, images=1, **out)
        with pytest.raises(DataError, match="knows already"):
            foveal.update(bundle, data, **out)
        with pytest.raises(BackboneError, match="plain ViT"):
            foveal.shrink(bundle, method="expedit", **out)
        with pytest.raises(BackboneError, match="no-such-model"):
            foveal.edit(image, to="a cat", model="no-such-model", **out)
    with pytest.raises(UsageError, match="--labels"):
        foveal.predict("zero-shot", image)
