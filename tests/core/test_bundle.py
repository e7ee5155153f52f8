import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from foveal.core.bundle import FORMAT, atomic_folder, open_bundle, seal, write_json
from foveal.core.errors import BundleError, FovealError

MANIFEST = {
    "task": "single-label",
    "classes": ["a", "b"],
    "backbone": {
        "name": "resnet18",
        "arch": "resnet18",
        "args": {},
        "preprocessing": {
            "size": 8,
            "mean": [0.0, 0.0, 0.0],
            "std": [1.0, 1.0, 1.0],
            "interpolation": "bicubic",
            "crop": 1.0,
        },
        "width": 512,
        "origin": "random",
    },
    "method": {"name": "linear", "options": {}},
    "data": {"name": "d", "source": "d"},
    "why": "asked for",
    "request": {},
}


def make_bundle(folder: Path) -> Path:
    with atomic_folder(folder) as staging:
        (staging / "model.safetensors").write_bytes(b"weights")
        unknown = {"name": "energy", "threshold": 1.0}
        write_json(staging / "calibration.json", {"temperature": {"value": 1.0}, "unknown": unknown})
        write_json(staging / "metrics.json", {"split": "test", "n": 4})
        write_json(staging / "cost.json", {})
        seal(staging, MANIFEST)
    return folder


def test_what_was_written_is_read(tmp_path: Path):
    files = open_bundle(make_bundle(tmp_path / "b"))
    assert files.manifest["classes"] == ["a", "b"]
    assert files.metrics == {"split": "test", "n": 4}
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]


def test_replacing_leaves_only_the_new(tmp_path: Path):
    target = make_bundle(tmp_path / "b")
    (target / "old").write_text("old")
    make_bundle(target)
    assert not (target / "old").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]


def test_an_error_while_writing_leaves_the_old(tmp_path: Path):
    target = make_bundle(tmp_path / "b")
    with pytest.raises(ZeroDivisionError), atomic_folder(target) as staging:
        (staging / "half").write_text("half")
        raise ZeroDivisionError
    assert open_bundle(target).manifest["classes"] == ["a", "b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]


def test_no_space_left_is_one_clear_message(tmp_path: Path):
    with (
        pytest.raises(FovealError, match=r"no space left on the device.*free some space"),
        atomic_folder(tmp_path / "b"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def rewrite_for_ever(folder: Path) -> None:
    while True:
        make_bundle(folder)


def test_killed_at_any_moment_the_bundle_is_whole(tmp_path: Path):
    target = make_bundle(tmp_path / "b")
    context = multiprocessing.get_context("fork")
    for round_ in range(8):
        writer = context.Process(target=rewrite_for_ever, args=(target,))
        writer.start()
        time.sleep(0.02 + 0.007 * round_)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert open_bundle(target).manifest["classes"] == ["a", "b"]
    make_bundle(target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("name", ["bundle.json", "model.safetensors", "calibration.json", "metrics.json", "cost.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str):
    target = make_bundle(tmp_path / "b")
    (target / name).unlink()
    with pytest.raises(BundleError, match=f"lacks {name}"):
        open_bundle(target)


@pytest.mark.parametrize("name", ["model.safetensors", "calibration.json", "metrics.json"])
def test_an_edited_file_is_named(tmp_path: Path, name: str):
    target = make_bundle(tmp_path / "b")
    (target / name).write_text('{"accuracy": 1.0}')
    with pytest.raises(BundleError, match=f"{name} .* was edited"):
        open_bundle(target)


def test_a_newer_format_asks_for_an_upgrade(tmp_path: Path):
    target = make_bundle(tmp_path / "b")
    manifest = json.loads((target / "bundle.json").read_text())
    write_json(target / "bundle.json", {**manifest, "format": FORMAT + 1})
    with pytest.raises(BundleError, match=r"format 2, this foveal reads up to 1: pip install --upgrade"):
        open_bundle(target)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "unreadable JSON"),
        ("{", "unreadable JSON"),
        ("[" * 100_000, "too deep"),
        ('{"format": NaN}', "NaN is not a finite number"),
        ('{"format": 1e999}', "1e999 is not a finite number"),
        ("[]", r"bundle\.json in Bundle .* is not as foveal writes it"),
        ('{"format": "new"}', "format: Input should be a valid integer"),
    ],
)
def test_an_unreadable_manifest_is_one_clear_message(tmp_path: Path, content: str, said: str):
    target = make_bundle(tmp_path / "b")
    (target / "bundle.json").write_text(content)
    with pytest.raises(BundleError, match=said):
        open_bundle(target)


def test_left_overs_of_others_are_left_alone(tmp_path: Path):
    others = [tmp_path / name for name in (".b.mine.tmp", ".b.more.1.tmp", ".b.0123abcd.tmp")]
    for folder in others:
        folder.mkdir()
    (tmp_path / f".b.{2**22 + 1}.tmp").mkdir()
    make_bundle(tmp_path / "b")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*(each.name for each in others), "b"])


def test_a_folder_that_is_no_bundle(tmp_path: Path):
    with pytest.raises(BundleError, match="is not a Bundle"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="is not a Bundle"):
        open_bundle(tmp_path / "nowhere")
