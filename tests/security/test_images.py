"""Images that are small on disk and huge in memory: refused by their header, or bounded."""

import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import GifImagePlugin, Image, TiffImagePlugin

from foveal.core.errors import DataError
from foveal.data import dataset, images
from foveal.data.images import decode
from foveal.data.open import open_images

SIZE, HUGE = (41, 29), (30_011, 30_013)


def encoded(form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    frames = {"append_images": [Image.new("RGB", SIZE, "red")], "save_all": True} if form == "WEBP" else {}
    Image.new("RGB", SIZE).save(buffer, form, **frames, **options)
    return buffer.getvalue()


def swapped(data: bytes, write: Callable[[int], bytes]) -> bytes:
    """The same file with another width and height wherever they are written."""
    for small, large in zip(SIZE, HUGE, strict=True):
        assert write(small) in data
        data = data.replace(write(small), write(large))
    return data


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress(b"\0" * (1 + 3 * width) * min(height, 64))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BOMBS = {
    "png": png(*HUGE),
    "jpeg": swapped(encoded("JPEG"), lambda n: struct.pack(">H", n)),
    "gif": swapped(encoded("GIF"), lambda n: struct.pack("<H", n)),
    "bmp": swapped(encoded("BMP"), lambda n: struct.pack("<i", n)),
    "tiff": swapped(encoded("TIFF", compression="tiff_lzw"), lambda n: b"\x01\x00\x00\x00" + struct.pack("<H", n)),
    "webp": swapped(encoded("WEBP"), lambda n: struct.pack("<I", n - 1)[:3]),
    "ppm": b"P6 30011 30013 255\n" + b"\0" * 1000,
    "jpeg2000": swapped(encoded("JPEG2000"), lambda n: struct.pack(">I", n)),
    "avif": swapped(encoded("AVIF"), lambda n: struct.pack(">I", n)),
}


@pytest.mark.parametrize("form", BOMBS)
def test_bombs_are_refused_by_their_header(form: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError):
        decode(BOMBS[form])


def test_the_limit_is_a_number_of_pixels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 41 * 29)
    assert decode(encoded("PNG"), 41 * 29).size == SIZE
    with pytest.raises(DataError, match="41 x 29 pixels"):
        decode(encoded("PNG"), 41 * 29 - 1)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_compressed_text_in_a_png_does_not_unpack_without_end(kind: bytes):
    start = {b"zTXt": b"Comment\0\0", b"iCCP": b"icc\0\0", b"iTXt": b"Comment\0\1\0\0\0"}[kind]
    bomb = png(8, 8, chunk(kind, start + zlib.compress(b"\0" * 300 * 2**20, 9)))
    assert len(bomb) < 2**19
    before = memory()
    with suppress(DataError):
        assert decode(bomb).size == (8, 8)
    assert memory() - before < 150 * 2**20


def memory() -> int:
    """Bytes that this process has taken at most."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    ("form", "reader"), [("GIF", GifImagePlugin.GifImageFile), ("TIFF", TiffImagePlugin.TiffImageFile)]
)
def test_only_the_first_of_many_frames_is_decoded(form: str, reader: type, monkeypatch: pytest.MonkeyPatch):
    frames = [Image.new("P", SIZE, colour) for colour in range(200)]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
    monkeypatch.setattr(reader, "seek", lambda *_: pytest.fail("looked for another frame"))
    assert decode(buffer.getvalue()).size == SIZE


def test_formats_that_run_programs_or_fetch_files_are_not_tried():
    assert not set(images.FORMATS) & {"EPS", "PDF", "WMF", "FPX", "MIC", "SVG", "GBR", "IM", "MPEG", "HDF5", "GRIB"}
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.4\n", b"<svg xmlns='x'/>"):
        with pytest.raises(DataError, match="not an image"):
            decode(data)


def test_a_huge_file_is_not_read(tmp_path: Path):
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(dataset.MAX_BYTES + 1)
    before = memory()
    with pytest.raises(DataError, match="files up to 512 MiB are read"):
        open_images([path]).read(0)
    assert memory() - before < 50 * 2**20


def test_an_image_without_pixels():
    with pytest.raises(DataError):
        decode(b"GIF89a\0\0\0\0\0\0\0;")
    with pytest.raises(DataError):
        open_images([np.zeros((0, 5, 3), np.uint8)])
