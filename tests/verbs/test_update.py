"""`foveal update`: new classes join, old scores stay, and the new Bundle is one like any other."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

import foveal
from foveal.backbones.adapter import load_backbone, normalise
from foveal.cli.main import main
from foveal.core.errors import BundleError, DataError, UsageError
from foveal.data.images import to_pixels
from foveal.data.memory import read_exemplars
from foveal.ship import beside
from foveal.verbs import _shrunk

LIGHT = "dytox:epochs=20,balance=5,width=32,lr=0.003,batch_size=8"


@pytest.fixture(scope="module")
def place(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("updates")


@pytest.fixture(scope="module")
def backbone(place: Path) -> str:
    torch.manual_seed(0)
    net = load_backbone("test_efficientnet", pretrained=False)
    save_torch(
        {name: tensor.contiguous() for name, tensor in net.model.state_dict().items()}, place / "net.safetensors"
    )
    return f"test_efficientnet@{place / 'net.safetensors'}"


@pytest.fixture(scope="module")
def old_data(photos: Path, place: Path) -> Path:
    for name in ("red", "green"):
        shutil.copytree(photos / name, place / "old" / name)
    return place / "old"


@pytest.fixture(scope="module")
def new_data(photos: Path, place: Path) -> Path:
    """One class: colours of blue."""
    shutil.copytree(photos / "blue", place / "new" / "blue")
    return place / "new"


@pytest.fixture(scope="module")
def more_data(place: Path) -> Path:
    """Two classes: yellow and cyan blocks."""
    rng = np.random.default_rng(5)
    for name, channels in (("yellow", (0, 1)), ("cyan", (1, 2))):
        (place / "more" / name).mkdir(parents=True)
        for index in range(14):
            blocks = rng.integers(0, 120, (9, 11, 3), dtype=np.uint8)
            blocks[..., channels] += rng.integers(60, 130, dtype=np.uint8)
            Image.fromarray(blocks).resize((110, 90)).save(place / "more" / name / f"{index}.png")
    return place / "more"


@pytest.fixture(scope="module")
def bundle(old_data: Path, backbone: str, place: Path) -> foveal.Bundle:
    return foveal.fit(str(old_data), method="linear", backbone=backbone, out=place / "two", offline=True)


@pytest.fixture(scope="module")
def updated(bundle: foveal.Bundle, new_data: Path, place: Path) -> foveal.Bundle:
    return foveal.update(bundle.path, str(new_data), method=LIGHT, memory=8, out=place / "three")


@pytest.fixture(scope="module")
def twice(updated: foveal.Bundle, more_data: Path, old_data: Path, place: Path) -> foveal.Bundle:
    """Updated again, from the memory alone: the data it was fitted on are out of the way."""
    aside = old_data.rename(old_data.with_name("aside"))
    try:
        return foveal.update(updated.path, str(more_data), method=LIGHT, memory=8, out=place / "five")
    finally:
        aside.rename(old_data)


def logits(bundle: foveal.Bundle, folder: Path) -> torch.Tensor:
    files = sorted(folder.rglob("*.*g"))[:6]
    pixels = np.stack([to_pixels(Image.open(file).convert("RGB"), bundle.preprocessing) for file in files])
    with torch.no_grad():
        return bundle.model.classifier(normalise(torch.from_numpy(pixels), bundle.preprocessing))


def test_old_scores_do_not_move_by_a_bit(
    bundle: foveal.Bundle, updated: foveal.Bundle, twice: foveal.Bundle, old_data: Path, new_data: Path
):
    assert updated.classes == (*bundle.classes, "blue")
    assert twice.classes == (*bundle.classes, "blue", "cyan", "yellow")
    for folder in (old_data, new_data):
        first, second, third = (foveal.load(each.path) for each in (bundle, updated, twice))
        assert torch.equal(logits(second, folder)[:, :2], logits(first, folder))
        assert torch.equal(logits(third, folder)[:, :3], logits(second, folder))
    for each in (updated, twice):
        moved = each.metrics["update"]["moved"]
        assert moved["equal"]
        assert moved["moved"] == 0.0
        assert moved["n"] > 0
        assert "equal bit by bit" in (each.path / "report.html").read_text(encoding="utf-8")
    assert updated.manifest["parent"] == bundle.fingerprint
    assert twice.manifest["parent"] == updated.fingerprint


def test_new_classes_are_learnt_beside_the_old(updated: foveal.Bundle, twice: foveal.Bundle):
    told = updated.metrics["update"]
    assert told["old_before"] == 1.0
    assert told["old_after"] >= 0.8
    assert told["new_after"] >= 0.8
    assert [row["new"] for row in told["per_class"]] == [False, False, True]
    assert told["forgetting"] == pytest.approx(
        np.mean([row["before"] - row["after"] for row in told["per_class"] if not row["new"]])
    )
    assert twice.metrics["update"]["new_after"] >= 0.5


def test_it_is_a_bundle_like_any_other(updated: foveal.Bundle, new_data: Path, old_data: Path):
    rows = foveal.load(updated.path).predict(new_data)
    assert sum(row["label"] == "blue" for row in rows) > len(rows) / 2
    assert foveal.evaluate(updated.path, str(old_data))["accuracy"]["value"] > 0.8
    onnx = foveal.export(updated.path)
    assert onnx is not None
    assert (updated.path / "model.onnx").is_file()


def test_it_is_shrunk_on_images_of_all_its_classes(
    updated: foveal.Bundle, photos: Path, place: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_shrunk, "timed_beside", partial(beside.timed_beside, seconds=0.02))
    with pytest.raises(UsageError, match="was updated, so that no one data set holds its images: name labelled images"):
        foveal.shrink(updated.path, method="powerquant", out=place / "x")
    made = foveal.shrink(
        updated.path, method="powerquant:bits=8", data=str(photos), out=place / "small", max_drop=1.0, offline=True
    )
    assert made["sides"]["after"]["bytes"] < made["sides"]["before"]["bytes"]
    small = foveal.load(place / "small")
    assert [step["name"] for step in small.manifest["steps"]] == ["dytox", "powerquant"]
    assert small.classes == updated.classes
    assert small.manifest["parent"] == updated.fingerprint
    before, after = ([row["top"][0][0] for row in each.predict(photos)] for each in (updated, small))
    assert np.mean([one == other for one, other in zip(before, after, strict=True)]) > 0.9
    assert foveal.export(place / "small", images=photos / "red")["max_abs_difference"] < 1e-4


def test_the_memory_is_within_budget_and_comes_with_the_bundle(updated: foveal.Bundle, twice: foveal.Bundle):
    for each in (updated, twice):
        memory = each.memory
        assert memory is not None
        assert memory.counts() == each.manifest["memory"]["images"]
        assert all(1 <= count <= 8 for count in memory.counts().values())
        assert set(memory.learn.ids).isdisjoint(memory.held.ids)
        assert memory.learn.image(0).size == (110, 90)
    first, second = updated.memory, twice.memory
    assert first is not None
    assert second is not None
    kept = {first.learn.read(row) for row in range(len(first.learn))}
    assert kept == {second.learn.read(row) for row in range(len(second.learn)) if second.learn.labels[row] < 3}


def test_a_strangers_memory_is_refused_when_it_is_damaged(updated: foveal.Bundle, tmp_path: Path):
    shutil.copytree(updated.path, tmp_path / "copy")
    file = tmp_path / "copy" / "memory.safetensors"
    tensors, copied = load_file(file), foveal.load(tmp_path / "copy")
    for wrong in (
        {"ends": tensors["ends"] + 5},
        {"label": tensors["label"] + 100},
        {"held": tensors["held"][:-1]},
        {"bytes": tensors["bytes"].astype(np.float32)},
    ):
        save_file({**tensors, **wrong}, file, {"ids": json.dumps([f"{i}.jpg" for i in range(len(tensors["ends"]))])})
        with pytest.raises(BundleError, match="was edited or is damaged: give old images with --old"):
            copied.memory  # noqa: B018
        with pytest.raises(BundleError, match="cannot be read"):
            read_exemplars(file, updated.classes)
    file.unlink()
    assert foveal.load(tmp_path / "copy").memory is None


def test_the_same_command_again_does_nothing(updated: foveal.Bundle, bundle: foveal.Bundle, new_data: Path):
    before = (updated.path / "model.safetensors").stat().st_mtime_ns
    again = foveal.update(bundle.path, str(new_data), method=LIGHT, memory=8, out=updated.path)
    assert again.path == updated.path
    assert (updated.path / "model.safetensors").stat().st_mtime_ns == before


def test_what_is_refused(
    bundle: foveal.Bundle, updated: foveal.Bundle, photos: Path, new_data: Path, old_data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    with pytest.raises(DataError, match=r"classes that the Bundle knows already \(green, red\): leave them out"):
        foveal.update(bundle.path, str(photos), out=tmp_path / "x")
    with pytest.raises(UsageError, match="--memory 1: expected at least 2 images a class"):
        foveal.update(bundle.path, str(new_data), memory=1, out=tmp_path / "x")
    with pytest.raises(UsageError, match="linear is a method of family adapt: expected one that adds classes, dytox"):
        foveal.update(bundle.path, str(new_data), method="linear", out=tmp_path / "x")
    aside = old_data.rename(old_data.with_name("gone"))
    try:
        with pytest.raises(UsageError, match="keeps no images of its classes, and the data it was fitted on"):
            foveal.update(bundle.path, str(new_data), method=LIGHT, out=tmp_path / "x")
    finally:
        aside.rename(old_data)
    monkeypatch.setattr(
        sys, "argv", ["foveal", "update", str(bundle.path), str(new_data), "--method", "dytox:width=33"]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "width=33: input should be a multiple of 32" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
