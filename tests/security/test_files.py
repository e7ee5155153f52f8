"""Weights, models, tables and archives from a stranger: read, or refused; never run, never followed elsewhere."""

import csv
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveal.backbones import weights
from foveal.backbones.adapter import load_backbone
from foveal.backbones.weights import read_tensors
from foveal.core.errors import BackboneError, BundleError, DataError, FovealError
from foveal.data import hub, shards
from foveal.data.open import open_dataset, open_images
from foveal.ship.runtime import Runtime


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


# Weights


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("form", ["pickle", "torch", "torch legacy", "tensors and more"])
def test_pickled_weights_run_nothing(suffix: str, form: str, tmp_path: Path, mark: Path, payload: bytes):
    import pickle

    path = tmp_path / f"w{suffix}"
    attack = Attack(mark)
    if form == "pickle":
        path.write_bytes(payload)
    elif form == "tensors and more":
        torch.save({"weight": torch.ones(2), "more": attack}, path)
    else:
        torch.save(attack, path, _use_new_zipfile_serialization=form == "torch", pickle_module=pickle)
    with pytest.raises(BackboneError, match="could run any code"):
        read_tensors(path)
    with pytest.raises(FovealError):
        load_backbone(f"test_resnet@{path}", offline=True)


class Attack:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_pickled_weights_of_the_hub_run_nothing(
    tmp_path: Path, mark: Path, payload: bytes, monkeypatch: pytest.MonkeyPatch, cache: Path
):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"conv1.weight": Attack(mark)}, path)
    monkeypatch.setattr(weights, "hub_file", lambda *_, **__: path)
    with pytest.raises(BackboneError, match="cannot load the weights of resnet18"):
        load_backbone("resnet18", offline=True)


@pytest.mark.parametrize("name", ["w.npy", "w.npz", "w.pkl", "w.joblib", "w.h5", "w.onnx"])
def test_other_forms_of_weights_are_refused(name: str, tmp_path: Path, mark: Path, payload: bytes):
    path = tmp_path / name
    if name == "w.npy":
        np.save(path, np.array([Attack(mark)], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(payload)
    with pytest.raises(FovealError):
        load_backbone(f"test_resnet@{path}", offline=True)
    with pytest.raises(FovealError):
        read_tensors(path)


def test_compressed_parts_of_a_torch_file_are_refused(tmp_path: Path):
    """A megabyte that says it unpacks to a gigabyte."""
    made, bomb = tmp_path / "w.pth", tmp_path / "bomb.pth"
    torch.save({"weight": torch.zeros(2**24)}, made)
    with zipfile.ZipFile(made) as whole, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for member in whole.infolist():
            packed.writestr(member.filename, whole.read(member))
    assert bomb.stat().st_size < 2**20
    with pytest.raises(BackboneError, match="compressed"):
        read_tensors(bomb)


def test_a_tensor_larger_than_its_file_is_refused_by_its_shape(tmp_path: Path):
    path = tmp_path / "w.pth"
    torch.save({"conv1.weight": torch.zeros(1).expand(2**40)}, path)
    with pytest.raises(BackboneError, match=r"w\.pth"):
        load_backbone(f"test_resnet@{path}", offline=True)


# Exported models


def tiny_model(folder: Path, **about: Any) -> Path:
    """As `foveal export` writes one, for images of 4 pixels and two classes."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    said = {
        "classes": ["a", "b"],
        "preprocessing": {
            "size": 4,
            "mean": [0.0, 0.0, 0.0],
            "std": [1.0, 1.0, 1.0],
            "interpolation": "bicubic",
            "crop": 1.0,
        },
        "unknown_threshold": 0.5,
        **about,
    }
    nodes = [
        helper.make_node("Identity", ["image"], ["squares"]),
        helper.make_node("Cast", ["squares"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["numbers", "flat"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weight"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
        helper.make_node("ReduceMax", ["logits"], ["unknown_score"], axes=[1], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 3, 4, 4])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 2]),
            helper.make_tensor_value_info("unknown_score", TensorProto.FLOAT, ["N"]),
        ],
        [
            numpy_helper.from_array(np.ones((48, 2), np.float32), "weight"),
            numpy_helper.from_array(np.array([-1, 48]), "flat"),
        ],
        value_info=[helper.make_tensor_value_info("squares", TensorProto.UINT8, ["N", 3, 4, 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    encoded = {key: value if isinstance(value, str) else json.dumps(value) for key, value in said.items()}
    helper.set_model_props(model, {"task": "single-label", **encoded})
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def test_the_tiny_model_answers(tmp_path: Path):
    probabilities, scores = Runtime(tiny_model(tmp_path))(np.zeros((3, 4, 4, 3), np.uint8))
    assert probabilities.shape == (3, 2)
    assert scores.shape == (3,)


@pytest.mark.parametrize("where", ["secret.bin", "../secret.bin", "/etc/passwd", "inner/../../secret.bin"])
@pytest.mark.parametrize("place", ["initializer", "attribute", "subgraph"])
def test_tensors_in_other_files_are_not_read(where: str, place: str, tmp_path: Path):
    import onnx
    from onnx import TensorProto, helper

    folder = tmp_path / "bundle"
    folder.mkdir()
    for secret in (tmp_path / "secret.bin", folder / "secret.bin"):
        secret.write_bytes(np.ones((48, 2), np.float32).tobytes())
    path = tiny_model(folder)
    model = onnx.load(path)
    tensor = TensorProto(name="weight", dims=[48, 2], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=where)
    kept = [each for each in model.graph.initializer if each.name != "weight"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    constant = helper.make_node("Constant", [], ["weight"], value=tensor)
    if place == "initializer":
        model.graph.initializer.append(tensor)
    elif place == "attribute":
        model.graph.node.insert(0, constant)
    else:
        inner = helper.make_graph(
            [constant], "inner", [], [helper.make_tensor_value_info("weight", TensorProto.FLOAT, [48, 2])]
        )
        choice = helper.make_node("If", ["yes"], ["weight"], then_branch=inner, else_branch=inner)
        model.graph.node.insert(0, choice)
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="in other files"):
        Runtime(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", ["a", "b", "c"]),
        ("classes", "[" * 10**5),
        ("classes", [1, 2]),
        ("task", "eval"),
        ("unknown_threshold", "NaN"),
        ("unknown_threshold", "high"),
        ("preprocessing", {"size": 10**9}),
        ("preprocessing", "null"),
    ],
)
def test_metadata_that_export_does_not_write(key: str, value: Any, tmp_path: Path):
    with pytest.raises(BundleError, match="is not a model that `foveal export` wrote"):
        Runtime(tiny_model(tmp_path, **{key: value}))


@pytest.mark.parametrize("content", [b"", b"hello", b"\x0a" * 1000, b"\xff" * 1000])
def test_a_file_that_is_no_model(content: bytes, tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="is not a model"):
        Runtime(tmp_path / "model.onnx")


# Tables


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """An image outside of the folder of the data."""
    path = tmp_path / "private" / "secret.png"
    path.parent.mkdir()
    path.write_bytes(png(77))
    return path


def test_a_table_of_paths_is_its_readers_own_and_may_name_any_file(tmp_path: Path, secret: Path):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "t.csv").write_text(f"image,label\n{secret},a\n../private/secret.png,b\n")
    assert len(open_dataset(folder / "t.csv")) == 2


@pytest.mark.parametrize(
    "path", ["file://{}", "http://localhost:1/x.png", "ftp://x/y.png", "\\\\host\\share\\x.png", "-"]
)
def test_addresses_are_not_paths(path: str, tmp_path: Path, secret: Path):
    (tmp_path / "t.csv").write_text(f"image,label\n{path.format(secret)},a\n")
    with pytest.raises(DataError, match="none of its 1 images exist"):
        open_dataset(tmp_path / "t.csv")


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/tty", "/proc/self/mem", "fifo", "."])
def test_devices_are_not_images(target: str, tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "t.csv").write_text(f"image,label\n{target},a\n")
    with pytest.raises(DataError):
        open_dataset(tmp_path / "t.csv").read(0)
    with pytest.raises(DataError):
        open_images([tmp_path / target] if target != "." else [tmp_path]).read(0)


def test_the_path_of_an_encoded_image_stays_in_the_folder(tmp_path: Path, secret: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "in.png").write_bytes(png(1))
    (folder / "link.png").symlink_to(secret)
    paths = ["in.png", str(secret), "../private/secret.png", "link.png", "/etc/passwd", "in.png\0"]
    images = [{"bytes": None, "path": path} for path in paths]
    pq.write_table(pa.table({"image": images, "label": [str(n) for n in range(6)]}), folder / "t.parquet")
    dataset = open_dataset(folder / "t.parquet")
    assert len(dataset) == 1
    assert dataset.read(0) == png(1)
    assert sum("leads out" in reason for _, reason in dataset.set_aside) == 5


def test_the_path_of_an_image_of_the_hub_stays_in_its_cache(
    tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
):
    import datasets

    inside = tmp_path / "cache" / "in.png"
    inside.parent.mkdir()
    inside.write_bytes(png(1))
    monkeypatch.setattr(hub, "cache_folders", lambda: [str(inside.parent)])
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    rows = {
        "image": [{"bytes": None, "path": str(path)} for path in (inside, secret, "/etc/passwd")],
        "label": ["a", "b", "c"],
    }
    features["image"] = datasets.Image()
    dataset = hub.from_datasets("owner/name", {"train": datasets.Dataset.from_dict(rows, features=features)})
    assert dataset.read(0) == png(1)
    for row in (1, 2):
        with pytest.raises(DataError, match="leads out of the Hugging Face cache"):
            dataset.read(row)


def test_data_sets_of_the_hub_run_no_script():
    from importlib.metadata import version

    assert int(version("datasets").split(".")[0]) >= 4, "older versions run a data set's own script"


@pytest.mark.parametrize(
    "content",
    [
        b"image,label\n" + b"a" * (2**20 + 9) + b",x\n",
        b"image," + b"label" * 10**6,
        b'image,label\n"' + b"a\n" * 200_000,
        b"image,label\n" + b"," * 200_000 + b"\n",
        b"image,label\n\0\0,\0\n",
        b"\xff\xfe" + "image,label\n".encode("utf-16-le"),
    ],
    ids=["long line", "long header", "open quote", "many fields", "zero bytes", "UTF-16"],
)
def test_csv_files_that_are_none(content: bytes, tmp_path: Path):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError):
        open_dataset(tmp_path / "t.csv")
    assert csv.field_size_limit() <= 2**20


# Archives


def shard(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(name: str, data: bytes | None = None) -> list[tuple[tarfile.TarInfo, bytes]]:
    stem = name.rpartition(".")[0]
    return [(tarfile.TarInfo(name), png() if data is None else data), (tarfile.TarInfo(f"{stem}.cls"), b"a")]


def special(name: str, kind: bytes, target: str = "") -> list[tuple[tarfile.TarInfo, bytes]]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return [(info, b""), *sample(name)[1:]]


def test_nothing_is_unpacked_and_no_name_is_followed(tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch):
    for method in ("extract", "extractall", "extractfile"):
        monkeypatch.setattr(tarfile.TarFile, method, lambda *_, **__: pytest.fail("unpacked"))
    names = ["/abs/a.png", "../../b.png", "c\nd.png", "x" * 3000 + ".png"]
    members = [each for name in names for each in sample(name)]
    members += special("link.png", tarfile.SYMTYPE, str(secret)) + special("hard.png", tarfile.LNKTYPE, "/etc/passwd")
    members += special("fifo.png", tarfile.FIFOTYPE) + special("device.png", tarfile.CHRTYPE)
    before = set(tmp_path.rglob("*"))
    dataset = open_dataset(shard(tmp_path / "s.tar", members))
    assert len(dataset) == len(names)
    assert {dataset.read(row) for row in range(len(dataset))} == {png()}
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "s.tar"}


def header(size: bytes, kind: bytes = tarfile.REGTYPE, name: bytes = b"a.png") -> bytes:
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[124:136], block[156:157] = b"0000644\0", size.ljust(12, b"\0"), kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


HUGE = b"\x80" + (2**60).to_bytes(11, "big")
BROKEN = {
    "size backwards": header(b"\xff" * 12) + b"\0" * 1024,
    "size beyond the file": header(HUGE) + b"\0" * 1024,
    "long name of a terabyte": header(HUGE, tarfile.GNUTYPE_LONGNAME) + b"\0" * 1024,
    "extension of a terabyte": header(HUGE, tarfile.XHDTYPE) + b"\0" * 1024,
    "extensions without end": header(b"00000000000", tarfile.XHDTYPE) * 5000,
    "extension with a lying length": header(b"00000000020", tarfile.XHDTYPE) + b"9" * 512 + header(b"0") + b"\0" * 1024,
    "sparse": header(b"00000000020", tarfile.GNUTYPE_SPARSE) + b"\0" * 1024,
    "compressed": b"\x1f\x8b\x08\0" + b"\0" * 600,
}


@pytest.mark.parametrize("name", BROKEN)
def test_tar_headers_that_lie(name: str, tmp_path: Path):
    (tmp_path / "s.tar").write_bytes(BROKEN[name])
    with pytest.raises(DataError):
        open_dataset(tmp_path / "s.tar")


def test_damage_in_the_middle_of_a_shard_is_said(tmp_path: Path):
    path = shard(tmp_path / "s.tar", sample("a.png") + sample("b.png") + sample("c.png"))
    content = bytearray(path.read_bytes())
    at = content.index(b"b.png")
    content[at : at + 3] = b"???"
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged at byte"):
        open_dataset(path)


def test_labels_that_are_deep_or_large_are_none(tmp_path: Path):
    members = sample("good.png")
    for name, label in {"deep": b"[" * 60_000, "large": b"a" * 70_000}.items():
        members += [sample(f"{name}.png")[0], (tarfile.TarInfo(f"{name}.{'json' if name == 'deep' else 'txt'}"), label)]
    dataset = open_dataset(shard(tmp_path / "s.tar", members))
    assert list(dataset.ids) == ["good.png"]
    assert len(dataset.set_aside) == 2


@pytest.mark.parametrize(
    "pattern", ["{0..99999}{0..99999}.tar", "{0..9999999999}.tar", "{a,b}" * 30 + ".tar", "{٣..٤}.tar"]
)
def test_patterns_of_more_shards_than_anyone_has(pattern: str):
    with pytest.raises(DataError, match=r"pattern|expected"):
        shards.expand(pattern)


def test_a_huge_member_is_set_aside_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "MAX_BYTES", 100)
    dataset = open_dataset(shard(tmp_path / "s.tar", sample("a.png", b"\0" * 101) + sample("b.png", b"\0" * 99)))
    assert list(dataset.ids) == ["b.png"]
    assert dataset.set_aside == (("a.png", "larger than is read"),)


def test_the_headers_above_are_else_as_tar_wants_them(tmp_path: Path):
    image = header(b"%011o" % len(png())) + png().ljust(512, b"\0")
    label = header(b"00000000001", name=b"a.cls") + b"x".ljust(512, b"\0")
    (tmp_path / "s.tar").write_bytes(image + label)
    assert open_dataset(tmp_path / "s.tar").read(0) == png()
