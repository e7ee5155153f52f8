"""Fuzzing: damaged images, Bundles, archives and words. Whatever comes, the answer is a result or a FovealError.

`FOVEAL_FUZZ=20000 pytest tests/security/test_fuzz.py` searches longer, and elsewhere each time.
"""

import io
import json
import os
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import foveal
from foveal.core import catalogue
from foveal.core.bundle import PROTECTED, sha256
from foveal.core.errors import DataError, FovealError
from foveal.core.preprocessing import Preprocessing
from foveal.data.images import MAX_PIXELS, decode, to_pixels
from foveal.data.open import open_dataset
from foveal.data.scan import scan
from foveal.verbs._prepare import parse_budget
from foveal.verbs.compare import split_methods

LONG = int(os.environ.get("FOVEAL_FUZZ", "0"))


def fuzz(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=LONG or examples,
        derandomize=not LONG,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# Images

P = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def photographs() -> dict[str, bytes]:
    """A small picture in every format and mode that is read."""
    rng = np.random.default_rng(0)
    grey = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 7), np.uint8)).resize((41, 29)))
    colour = Image.fromarray(np.stack([grey, grey[::-1], grey[:, ::-1]], 2))
    made: dict[str, bytes] = {}

    def keep(name: str, image: Image.Image, form: str, **options: Any) -> None:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        made[name] = buffer.getvalue()

    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    frames = [colour.rotate(angle) for angle in (0, 90, 180)]
    keep("jpeg", colour, "JPEG", exif=exif)
    keep("progressive", colour, "JPEG", progressive=True, icc_profile=b"profile" * 20)
    keep("cmyk", colour.convert("CMYK"), "JPEG")
    keep("png", colour, "PNG", exif=exif)
    keep("palette", colour.convert("P"), "PNG", transparency=3)
    keep("deep", Image.fromarray(grey.astype(np.uint16) * 257), "PNG")
    keep("apng", frames[0], "PNG", save_all=True, append_images=frames[1:])
    keep("gif", frames[0], "GIF", save_all=True, append_images=frames[1:])
    keep("webp", colour, "WEBP", lossless=True)
    keep("animated", frames[0], "WEBP", save_all=True, append_images=frames[1:])
    keep("bmp", colour, "BMP")
    keep("tiff", colour, "TIFF", compression="tiff_lzw")
    keep("pages", frames[0], "TIFF", save_all=True, append_images=frames[1:], compression="tiff_adobe_deflate")
    keep("float", Image.fromarray(grey.astype(np.float32) / 255), "TIFF")
    keep("ppm", colour, "PPM")
    keep("jpeg2000", colour, "JPEG2000")
    keep("avif", colour, "AVIF")
    return made


PHOTOGRAPHS = photographs()
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """One of them with bits flipped, numbers overwritten, parts cut, doubled, moved or taken from another."""
    data = bytearray(PHOTOGRAPHS[draw(st.sampled_from(sorted(PHOTOGRAPHS)))])
    for _ in range(draw(st.integers(1, 6))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1) | st.integers(0, min(63, len(data) - 1)))
        length = draw(st.integers(1, 64))
        kind = draw(st.sampled_from(["flip", "number", "cut", "tail", "double", "graft", "noise", "zero"]))
        if kind == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "number":
            form = draw(st.sampled_from(["<I", ">I", "<H", ">H"]))
            number = draw(st.sampled_from(NUMBERS)) % 2 ** (8 * struct.calcsize(form))
            data[at : at + struct.calcsize(form)] = struct.pack(form, number)
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "tail":
            del data[at:]
        elif kind == "double":
            data[at:at] = data[at : at + length] * draw(st.integers(1, 8))
        elif kind == "graft":
            other = PHOTOGRAPHS[draw(st.sampled_from(sorted(PHOTOGRAPHS)))]
            data[at : at + length] = other[at : at + length]
        elif kind == "noise":
            data[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        else:
            data[at : at + length] = bytes(length)
    return bytes(data)


def look(data: bytes) -> None:
    """An upright RGB picture that the rest of foveal can use, or a DataError of one line."""
    try:
        image = decode(data)
    except DataError as error:
        assert "\n" not in str(error).strip()
        return
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= MAX_PIXELS
    assert to_pixels(image, P).shape == (32, 32, 3)
    assert scan(image)["ok"] == 1


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_whole_photographs_are_read(name: str):
    assert decode(PHOTOGRAPHS[name]).size in ((41, 29), (29, 41))


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_cut_anywhere(name: str):
    data = PHOTOGRAPHS[name]
    for end in range(0, len(data), max(1, len(data) // 60)):
        look(data[:end])


@fuzz(250)
@given(damaged())
def test_damaged_photographs(data: bytes):
    look(data)


@fuzz(50)
@given(st.sampled_from(["", "P6\n", "GIF89a", "RIFF", "\x89PNG\r\n\x1a\n", "II*\0", "BM", "\xff\xd8\xff"]), st.binary())
def test_noise_is_no_photograph(start: str, rest: bytes):
    look(start.encode("latin-1") + rest)


# Bundles

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([-1, 2**70, 1e308]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(content: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key and index of nested JSON; of long lists the first few."""
    inner = (
        content.items() if isinstance(content, dict) else enumerate(content[:3]) if isinstance(content, list) else ()
    )
    return [way, *(place for key, value in inner for place in places(value, (*way, key)))]


@pytest.fixture(scope="module")
def scratch(trained: Path, frozen: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("scratch")
    found = {"trained": trained, "frozen": frozen}
    for name, bundle in found.items():
        shutil.copytree(bundle, root / name)
    return {name: root / name for name in found}


@pytest.fixture(scope="module")
def picture(photos: Path) -> Path:
    return sorted((photos / "red").iterdir())[0]


def ask(bundle: Path, picture: Path) -> None:
    """A right answer or a FovealError."""
    try:
        row = foveal.load(bundle).predict([picture])[0]
    except FovealError as error:
        assert str(error).strip()
        return
    json.dumps(row, allow_nan=False)
    assert 0 <= row["probability"] <= 1


@fuzz(60)
@given(data=st.data())
def test_bundles_with_damaged_json(data: st.DataObject, scratch: dict[str, Path], picture: Path):
    bundle = scratch[data.draw(st.sampled_from(["frozen", "trained"]))]
    file = bundle / data.draw(st.sampled_from(["bundle.json", "calibration.json", "metrics.json", "cost.json"]))
    whole = {name: (bundle / name).read_bytes() for name in (file.name, "bundle.json")}
    content = json.loads(whole[file.name])
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(places(content)[1:] or [("x",)]))
        place = content
        for key in way:
            place = place[key]
        if data.draw(st.booleans()) and len(place) > 1:
            place.pop(last)
        else:
            place[last] = data.draw(JSON)
    try:
        text = json.dumps(content)
        if data.draw(st.integers(0, 9)) == 0:
            at = data.draw(st.integers(0, len(text)))
            text = text[:at] + data.draw(st.text(max_size=5)) + text[at + data.draw(st.integers(0, 5)) :]
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        if file.name != "bundle.json":
            manifest = json.loads(whole["bundle.json"])
            manifest["sha256"] = {name: sha256(bundle / name) for name in PROTECTED}
            (bundle / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
        ask(bundle, picture)
    finally:
        for name, was in whole.items():
            (bundle / name).write_bytes(was)


@fuzz(40)
@given(data=st.data())
def test_bundles_with_damaged_weights(data: st.DataObject, scratch: dict[str, Path], picture: Path):
    bundle = scratch["trained"]
    file = bundle / "model.safetensors"
    weights, manifest = file.read_bytes(), (bundle / "bundle.json").read_bytes()
    size = struct.unpack("<Q", weights[:8])[0]
    header, body = json.loads(weights[8 : 8 + size]), weights[8 + size :]
    kind = data.draw(st.sampled_from(["header", "bytes", "body", "cut"]))
    if kind == "header":
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from(sorted(header)))
            change = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "rename", "drop"]))
            if change == "rename":
                header[data.draw(st.text(max_size=20) | st.sampled_from(sorted(header)))] = header.pop(name)
            elif change == "drop":
                header.pop(name)
            elif change == "dtype" and isinstance(header[name], dict):
                kinds = ["F16", "F64", "I64", "U8", "BOOL", "BF16", "F8_E4M3", "C64", "I32", "X", ""]
                header[name]["dtype"] = data.draw(st.sampled_from(kinds))
            elif isinstance(header[name], dict):
                header[name][change] = data.draw(st.lists(st.integers(-2, 2**64), max_size=4) | JSON)
        text = json.dumps(header, allow_nan=True).encode("utf-8", "surrogatepass")
        made = struct.pack("<Q", len(text)) + text + body
    elif kind == "bytes":
        damage = bytearray(weights[: 8 + size])
        damage[data.draw(st.integers(0, len(damage) - 1))] = data.draw(st.integers(0, 255))
        made = bytes(damage) + body
    elif kind == "body":
        noise = data.draw(st.binary(min_size=4, max_size=64)) * 64
        at = data.draw(st.integers(0, len(body) - len(noise)))
        made = weights[: 8 + size] + body[:at] + noise + body[at + len(noise) :]
    else:
        made = weights[: data.draw(st.integers(0, len(weights)))]
    try:
        file.write_bytes(made)
        sealed = json.loads(manifest) | {"sha256": {name: sha256(bundle / name) for name in PROTECTED}}
        (bundle / "bundle.json").write_text(json.dumps(sealed), encoding="utf-8")
        ask(bundle, picture)
    finally:
        file.write_bytes(weights)
        (bundle / "bundle.json").write_bytes(manifest)


# Archives and tables


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in {
            "a.png": PHOTOGRAPHS["png"],
            "a.cls": b"x",
            "ü" * 90 + ".jpg": b"j",
            "b.json": b"{}",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


ARCHIVE = archive()
TABLE = b'image,label,split\na.png,x|y,train\n"b ""b"".png",z,val\n'


@st.composite
def changed(draw: st.DrawFn, whole: bytes) -> bytes:
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        data[at : at + draw(st.integers(0, 12))] = draw(
            st.binary(max_size=12) | st.sampled_from([b"\xff" * 12, b"-1", b'"'])
        )
    return bytes(data)


def open_and_read(path: Path) -> None:
    try:
        dataset = open_dataset(path)
    except FovealError as error:
        assert str(error).strip()
        return
    assert len(set(dataset.ids)) == len(dataset)
    for row in range(len(dataset)):
        try:
            assert isinstance(dataset.read(row), bytes)
        except DataError:
            continue


@fuzz(150)
@given(data=changed(ARCHIVE))
def test_damaged_archives(data: bytes, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.getbasetemp() / "fuzzed.tar"
    path.write_bytes(data)
    open_and_read(path)


@fuzz(100)
@given(data=changed(TABLE))
def test_damaged_tables(data: bytes, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.getbasetemp()
    (folder / "a.png").write_bytes(PHOTOGRAPHS["png"])
    (folder / "fuzzed.csv").write_bytes(data)
    open_and_read(folder / "fuzzed.csv")


def test_a_damaged_page_of_a_parquet_file(tmp_path: Path):
    """Found by fuzzing: pyarrow notices only when the page is unpacked."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [b"\0" * 5000], "label": ["x"]}), tmp_path / "t.parquet", use_dictionary=False)
    data = bytearray((tmp_path / "t.parquet").read_bytes())
    data[24:60] = b"\xff" * 36
    (tmp_path / "t.parquet").write_bytes(data)
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        open_dataset(tmp_path / "t.parquet")


@fuzz(60)
@given(data=st.data())
def test_damaged_parquet(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    images = [{"bytes": PHOTOGRAPHS["png"], "path": "a"}, {"bytes": None, "path": "a.png"}]
    pq.write_table(pa.table({"image": images, "label": ["x", "y"]}), buffer)
    path = tmp_path_factory.getbasetemp() / "fuzzed.parquet"
    path.write_bytes(data.draw(changed(buffer.getvalue())))
    open_and_read(path)


# Words


WORDS = st.text(max_size=40) | st.text(alphabet=":=,{}.@~/ \\|*?[]%$()-+0123456789eE\0\n'\"_aftrsn", max_size=30)
KNOWN = ["linear", "frozen", "full", "vpt", "lora", "nn-revisit", "c=1", "k=2", "epochs=3", "sample:digits", "hub:a/b"]


@fuzz(150)
@given(st.lists(st.sampled_from(KNOWN) | WORDS, max_size=4), st.sampled_from([",", ":", "=", ""]))
@example(["linear:c=nan"], "")
@example(["linear:c=1e400"], "")
@example(["full:epochs=" + "9" * 5000], "")
def test_methods_and_their_options(parts: list[str], between: str):
    text = between.join(parts)
    try:
        choices = split_methods(text)
        for choice in choices:
            method = catalogue.create(choice)
            assert method.name in catalogue.names()
    except FovealError as error:
        assert str(error).strip()


@fuzz(150)
@given(WORDS | st.from_regex(r"[0-9.e+\-_]{1,8}[smhd]?", fullmatch=True))
@example("infs")
@example("1_0m")
@example("٣s")
def test_budgets(text: str):
    try:
        seconds = parse_budget(text)
    except FovealError:
        return
    assert seconds is not None
    assert 0 < seconds < float("inf")


@fuzz(200)
@given(
    WORDS | st.sampled_from(["", ":", "sample:", "hub:", ".tar", ".csv"]).flatmap(lambda a: WORDS.map(lambda b: a + b))
)
@example("~nobody/x")
@example("x" * 5000)
@example("\0.tar")
@example("{0..9}" * 9 + ".tar")
def test_names_of_data(text: str):
    assume(text.strip("./ ~") and not text.startswith(("hub:", "/", "~/", ".", "sample:digits")))
    assume(not os.path.exists(text))
    with pytest.raises(FovealError):
        open_dataset(text)


@fuzz(60)
@given(
    WORDS
    | st.sampled_from(["resnet18@", "@", "hf-hub:", "~x", "a.safetensors@"]).flatmap(
        lambda a: WORDS.map(lambda b: a + b)
    )
)
@example("~nobody/w.safetensors")
@example("resnet18@~nobody/w.safetensors")
@example("\0.safetensors")
@example("x" * 5000 + ".safetensors")
def test_names_of_backbones(text: str):
    from foveal.backbones.adapter import locate

    try:
        arch, file = locate(text)
    except FovealError:
        return
    assert isinstance(arch, str)
    assert file is None or isinstance(file, Path)
