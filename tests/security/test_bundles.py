"""A Bundle from a stranger: whatever it says, it loads as a model or is refused; nothing else happens."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import foveal
from foveal.core.bundle import PROTECTED, read_json, sha256, write_json
from foveal.core.errors import FovealError


def seal_again(bundle: Path) -> None:
    """What an attacker does: hashes that fit the edited files."""
    manifest = read_json(bundle / "bundle.json")
    write_json(bundle / "bundle.json", {**manifest, "sha256": {name: sha256(bundle / name) for name in PROTECTED}})


def change(bundle: Path, file: str, path: str, value: Any) -> None:
    """Set `a.b.c` in one of its JSON files."""
    content = read_json(bundle / file)
    *way, last = path.split(".")
    place = content
    for key in way:
        place = place[key]
    place[last] = value
    (bundle / file).write_text(json.dumps(content), encoding="utf-8")
    seal_again(bundle) if file != "bundle.json" else None


def use(bundle: Path, photos: Path) -> list[dict[str, Any]]:
    return foveal.load(bundle).predict(sorted((photos / "red").iterdir())[:2])


ARCHITECTURES = [
    "hf-hub:evil/model",
    "hf_hub:evil/model",
    "local-dir:/tmp",
    "resnet18.evil/tag",
    "../resnet18",
    "",
    "x",
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_an_architecture_is_a_name_that_timm_knows(
    kind: str,
    arch: str,
    photos: Path,
    copy_of: Callable[[Path], Path],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
):
    import socket

    def refuse(*_: object) -> None:
        os._exit(98)  # the Hub's client would catch an exception

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    bundle = copy_of(request.getfixturevalue(kind))
    change(bundle, "bundle.json", "backbone.arch", arch)
    with pytest.raises(FovealError):
        foveal.load(bundle).model.classifier.backbone.model  # noqa: B018


@pytest.mark.parametrize(
    "args",
    [
        {"checkpoint_path": "MARK.pth"},
        {"pretrained": True},
        {"pretrained_cfg_overlay": {"file": "MARK.pth"}},
        {"pretrained_cfg": "x"},
        {"cache_dir": "MARK"},
        {"scriptable": True},
        {"features_only": True},
        {"depth": 10_000},
        {"act_layer": "os.system"},
        {"img_size": 100_000},
        {"img_size": [224, 224]},
    ],
    ids=lambda args: next(iter(args)),
)
def test_arguments_of_a_backbone_are_not_passed_on(
    args: dict[str, Any], trained: Path, mark: Path, payload: bytes, copy_of: Callable[[Path], Path]
):
    mark.with_suffix(".pth").write_bytes(payload)
    bundle = copy_of(trained)
    change(bundle, "bundle.json", "backbone.args", json.loads(json.dumps(args).replace("MARK", str(mark))))
    with pytest.raises(FovealError, match="backbone arguments"):
        foveal.load(bundle).model  # noqa: B018


def test_a_huge_architecture_for_a_small_file_is_refused_before_memory_is_taken(
    trained: Path, copy_of: Callable[[Path], Path]
):
    bundle = copy_of(trained)
    change(bundle, "bundle.json", "backbone.arch", "vit_giant_patch14_224")
    with pytest.raises(FovealError, match="vit_giant_patch14_224 holds 1,0"):
        foveal.load(bundle).model  # noqa: B018


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("bundle.json", "method.name", "../../../os"),
        ("bundle.json", "method.name", "os.system"),
        ("bundle.json", "method.name", ["linear"]),
        ("bundle.json", "method.options", {"c": "__import__('os')"}),
        ("bundle.json", "method.options", {"__class__": 1}),
        ("bundle.json", "task", "eval"),
        ("bundle.json", "classes", []),
        ("bundle.json", "classes", [1, 2, 3]),
        ("bundle.json", "classes", [str(number) for number in range(200_000)]),
        ("bundle.json", "backbone.preprocessing.size", 10**9),
        ("bundle.json", "backbone.preprocessing.size", True),
        ("bundle.json", "backbone.preprocessing.crop", 1e-9),
        ("bundle.json", "backbone.preprocessing.std", [0.0, 1.0, 1.0]),
        ("bundle.json", "backbone.preprocessing.mean", [1e308, 1.0]),
        ("bundle.json", "backbone.preprocessing.interpolation", "lanczos"),
        ("bundle.json", "backbone.width", 2**62),
        ("bundle.json", "backbone.width", 7),
        ("bundle.json", "backbone", None),
        ("bundle.json", "request", []),
        ("bundle.json", "format", -1),
        ("bundle.json", "sha256", {"../../../../../../etc/passwd": "0"}),
        ("bundle.json", "sha256", {}),
        ("calibration.json", "unknown.threshold", None),
        ("calibration.json", "unknown.threshold", "1"),
        ("calibration.json", "unknown.name", "__import__"),
        ("calibration.json", "unknown.name", 7),
        ("calibration.json", "temperature", 0),
        ("metrics.json", "accuracy", "1"),
        ("metrics.json", "accuracy", {"value": "high"}),
        ("metrics.json", "n", []),
    ],
)
def test_what_no_bundle_says_is_refused(
    file: str, path: str, value: Any, frozen: Path, photos: Path, copy_of: Callable[[Path], Path]
):
    bundle = copy_of(frozen)
    change(bundle, file, path, value)
    with pytest.raises(FovealError):
        use(bundle, photos)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000])
def test_numbers_that_are_none(number: str, frozen: Path, copy_of: Callable[[Path], Path]):
    bundle = copy_of(frozen)
    text = (bundle / "cost.json").read_text().rstrip().rstrip("}")
    (bundle / "cost.json").write_text(f'{text}, "more": {number}}}')
    with pytest.raises(FovealError, match=r"unreadable JSON"):
        foveal.load(bundle)


@pytest.mark.parametrize("file", ["bundle.json", "cost.json"])
@pytest.mark.parametrize("content", [b"[" * 10**6, b'{"a":' * 10**5, b" " * (64 * 2**20 + 1), b"\xff\xfe{}"])
def test_json_that_is_deep_large_or_no_text(file: str, content: bytes, frozen: Path, copy_of: Callable[[Path], Path]):
    bundle = copy_of(frozen)
    (bundle / file).write_bytes(content)
    with pytest.raises(FovealError, match=r"unreadable JSON"):
        foveal.load(bundle)


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", "fifo", "nowhere", "/etc/passwd", "."])
@pytest.mark.parametrize("file", ["model.safetensors", "metrics.json"])
def test_links_to_devices_and_other_files(
    target: str, file: str, frozen: Path, tmp_path: Path, copy_of: Callable[[Path], Path]
):
    bundle = copy_of(frozen)
    if target == "fifo":
        os.mkfifo(tmp_path / "fifo")
        target = str(tmp_path / "fifo")
    (bundle / file).unlink()
    (bundle / file).symlink_to(target)
    with pytest.raises(FovealError):
        foveal.load(bundle).model  # noqa: B018


HEADERS = {
    "length beyond the file": struct.pack("<Q", 2**63 - 1) + b"{}",
    "length of 99 MB": struct.pack("<Q", 99_000_000) + b"{}",
    "no header": b"\0" * 7,
    "not JSON": struct.pack("<Q", 4) + b"{{{{",
    "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "offsets beyond the file": {"temperature": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**40]}},
    "offsets that overlap": {
        "temperature": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "ood.x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    },
    "offsets backwards": {"temperature": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    "shape that overflows": {"temperature": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}},
    "negative shape": {"temperature": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    "unknown type": {"temperature": {"dtype": "object", "shape": [1], "data_offsets": [0, 4]}},
    "empty": {},
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_that_lie(name: str, frozen: Path, copy_of: Callable[[Path], Path]):
    made = HEADERS[name]
    if isinstance(made, dict):
        header = json.dumps(made).encode()
        made = struct.pack("<Q", len(header)) + header + b"\0" * 4
    bundle = copy_of(frozen)
    (bundle / "model.safetensors").write_bytes(made)
    seal_again(bundle)
    with pytest.raises(FovealError, match=r"do not fit its bundle\.json"):
        foveal.load(bundle).model  # noqa: B018


def test_a_pickle_in_the_place_of_weights(frozen: Path, mark: Path, payload: bytes, copy_of: Callable[[Path], Path]):
    bundle = copy_of(frozen)
    (bundle / "model.safetensors").write_bytes(payload)
    seal_again(bundle)
    with pytest.raises(FovealError, match=r"do not fit its bundle\.json"):
        foveal.load(bundle).model  # noqa: B018


WEIGHTS = {
    "temperature 0": lambda weights: weights | {"temperature": torch.tensor(0.0)},
    "temperature NaN": lambda weights: weights | {"temperature": torch.tensor(float("nan"))},
    "several temperatures": lambda weights: weights | {"temperature": torch.ones(3)},
    "no temperature": lambda weights: {key: value for key, value in weights.items() if key != "temperature"},
    "head of one number": lambda weights: weights | {"classifier.head.weight": torch.ones(1)},
    "wide head": lambda weights: weights | {"classifier.head.weight": torch.ones(3, 2)},
    "no head": lambda weights: {key: value for key, value in weights.items() if "head" not in key},
    "no unknown score": lambda weights: {key: value for key, value in weights.items() if "ood" not in key},
    "NaN head": lambda weights: weights | {"classifier.head.bias": torch.full((3,), float("nan"))},
    "stranger": lambda weights: weights | {"classifier.backbone.model.extra": torch.ones(1)},
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit(name: str, frozen: Path, photos: Path, copy_of: Callable[[Path], Path]):
    bundle = copy_of(frozen)
    save_file(WEIGHTS[name](load_file(bundle / "model.safetensors")), bundle / "model.safetensors")
    seal_again(bundle)
    with pytest.raises(FovealError):
        foveal.load(bundle).model.classifier.backbone.model  # noqa: B018
        use(bundle, photos)


def test_what_a_bundle_names_is_not_opened(frozen: Path, photos: Path, copy_of: Callable[[Path], Path]):
    bundle = copy_of(frozen)
    before = use(bundle, photos)
    for path, value in {"backbone.origin": "/etc/passwd", "backbone.name": "/etc/passwd", "data.source": "/"}.items():
        change(bundle, "bundle.json", path, value)
    opened: list[str] = []
    import sys

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and watching:
            opened.append(str(arguments[0]))

    watching = True
    sys.addaudithook(watch)
    after = use(bundle, photos)
    watching = False
    assert after == before
    assert opened
    assert not any(name.startswith("/etc/passwd") for name in opened)


def test_odd_class_names_are_names(frozen: Path, photos: Path, copy_of: Callable[[Path], Path]):
    odd = ["../../etc/passwd", "<script>alert(1)</script>", "\x1b[31mred\x07\ud800"]
    bundle = copy_of(frozen)
    change(bundle, "bundle.json", "classes", odd)
    rows = use(bundle, photos)
    assert {row["label"] for row in rows} <= set(odd)
    assert np.isfinite([row["probability"] for row in rows]).all()


def test_a_link_out_of_a_bundle_is_not_pushed(frozen: Path, tmp_path: Path, copy_of: Callable[[Path], Path]):
    from foveal.core.bundle import open_bundle
    from foveal.ship.hub import contents

    bundle = copy_of(frozen)
    assert "README.md" in contents(open_bundle(bundle), None, True)
    (tmp_path / "id_rsa").write_text("secret")
    (bundle / "README.md").unlink()
    (bundle / "README.md").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(FovealError, match="leads out of the Bundle"):
        contents(open_bundle(bundle), None, True)
