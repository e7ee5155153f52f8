from __future__ import annotations

import io
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional as T

from foveal.core.errors import DataError
from foveal.core.preprocessing import Preprocessing
from foveal.data.images import EXTENSIONS, FORMATS, decode, to_pixels

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def corners() -> Image.Image:
    """16 x 8, red in the upper left quarter, blue elsewhere."""
    image = Image.new("RGB", (16, 8), BLUE)
    image.paste(RED, (0, 0, 8, 4))
    return image


def save(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG made by hand, for what Pillow reads but does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_undone(orientation, form):
    turned = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = corners() if turned is None else corners().transpose(turned)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(save(stored, form, exif=exif, **({"quality": 95} if form in ("JPEG", "WEBP") else {})))
    assert image.size == (16, 8)
    assert np.abs(np.asarray(image, int)[1, 1] - RED).max() < 40
    assert np.abs(np.asarray(image, int)[6, 13] - BLUE).max() < 40


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_counts_as_none():
    image = decode(save(corners(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff"))
    assert image.size == (16, 8)


def test_grey_and_one_bit():
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    assert (np.asarray(decode(save(grey)))[..., 1] == np.asarray(grey)).all()
    bits = Image.fromarray(np.eye(8, dtype=bool))
    assert (np.asarray(decode(save(bits)))[..., 0] == np.eye(8) * 255).all()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_by_its_range(form):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = decode(save(Image.fromarray(values), form))
    assert (np.asarray(image)[..., 0] == np.rint(values / 257)).all()


def test_dark_16_bit_grey_keeps_its_scale():
    values = np.full((8, 8), 1028, np.uint16)
    assert np.asarray(decode(save(Image.fromarray(values), "PNG"))).max() == 4


def test_16_bit_colour_is_scaled():
    row = b"\x00" + struct.pack(">HHH", 65535, 32768, 0) * 4
    assert np.asarray(decode(png(4, 4, 16, 2, row * 4)))[2, 2].tolist() == [255, 128, 0]


def test_16_bit_pgm_and_32_bit_tiff():
    pgm = b"P5 2 1 65535\n" + struct.pack(">HH", 65535, 257)
    assert np.asarray(decode(pgm))[0, :, 0].tolist() == [255, 1]
    deep = Image.fromarray(np.array([[0, 2**31 - 1]], np.int32))
    assert np.asarray(decode(save(deep, "TIFF")))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_float_images_by_the_usual_ranges(top):
    image = decode(save(Image.fromarray(np.array([[0.0, top / 2, top]], np.float32)), "TIFF"))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("values", [[[0.0, np.nan]], [[-1.0, 1.0]], [[0.0, 1e9]]])
def test_float_images_of_no_usual_range_are_refused(values):
    with pytest.raises(DataError, match=r"expected 0 to 1|NaN"):
        decode(save(Image.fromarray(np.array(values, np.float32)), "TIFF"))


def test_cmyk():
    image = decode(save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, int)[4, 4] - RED).max() < 12


def test_palette():
    assert np.asarray(decode(save(corners().quantize(4))))[1, 1].tolist() == list(RED)


def test_palette_with_transparency_is_laid_on_white():
    image = corners().quantize(4)
    transparent = image.getpixel((1, 1))
    pixels = np.asarray(decode(save(image, transparency=transparent)))
    assert pixels[1, 1].tolist() == list(WHITE)
    assert pixels[6, 13].tolist() == list(BLUE)


@pytest.mark.parametrize(("alpha", "expected"), [(0, [255, 255, 255]), (255, [255, 0, 0]), (51, [255, 204, 204])])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_alpha_is_laid_on_white(alpha, expected, form):
    assert np.asarray(decode(save(Image.new("RGBA", (4, 4), (*RED, alpha)), form)))[0, 0].tolist() == expected


def test_grey_with_alpha_and_colour_key():
    assert np.asarray(decode(save(Image.new("LA", (4, 4), (0, 0)))))[0, 0].tolist() == list(WHITE)
    assert np.asarray(decode(save(Image.new("RGB", (4, 4), RED), transparency=RED)))[0, 0].tolist() == list(WHITE)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_many(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE, WHITE)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = save(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert np.asarray(decode(data))[0, 0].tolist() == list(RED)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_round_trips(form):
    image = decode(save(corners(), form, **({"quality": 95} if form in ("JPEG", "AVIF") else {})))
    assert image.size == (16, 8)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, int)[1, 1] - RED).max() < 60


@pytest.mark.parametrize("cut", [1, 2, 50, 1000])
def test_truncated_jpeg(picture, cut):
    data = save(picture(0, (200, 200)), "JPEG")
    with pytest.raises(DataError, match="truncated"):
        decode(data[:-cut])


@pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_half_a_file(picture, form):
    data = save(picture(0, (200, 200)), form)
    with pytest.raises(DataError, match=r"truncated|damaged"):
        decode(data[: len(data) // 2])


def test_damaged_pixels():
    data = bytearray(save(corners()))
    data[data.index(b"IDAT") + 6] ^= 0xFF
    with pytest.raises(DataError, match="truncated or damaged"):
        decode(bytes(data))


@pytest.mark.parametrize(
    "data", [b"this is a shopping list\n" * 50, b"<html></html>", b"\x00" * 500, b"%!PS-Adobe-3.0 EPSF-3.0"]
)
def test_what_is_no_image(data):
    with pytest.raises(DataError, match="not an image"):
        decode(data)


def test_postscript_is_never_run():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(DataError, match="not an image"):
        decode(eps)


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_bytes_give_a_picture_or_a_data_error(picture, form):
    whole = save(picture(0, (60, 50)), form)
    rng = np.random.default_rng(0)
    for _ in range(40):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 6):
            data[place] = rng.integers(256)
        try:
            assert decode(bytes(data)).mode == "RGB"
        except DataError as error:
            assert "\n" not in str(error)


def test_empty_file():
    with pytest.raises(DataError, match="empty"):
        decode(b"")


def zip_bomb(side: int) -> bytes:
    """A PNG of side x side grey pixels, all there."""
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(100 * (side + 1))) for _ in range(side // 100)) + packer.flush()
    body = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", body) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [30_000, 11_000])
def test_zip_bomb_is_refused_from_its_header(side):
    bomb = zip_bomb(side)
    assert len(bomb) < 5_000_000
    tracemalloc.start()
    with pytest.raises(DataError, match="100 megapixels"):
        decode(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(bomb)


def test_nothing_is_said_but_the_error(tmp_path):
    (tmp_path / "bomb.png").write_bytes(zip_bomb(11_000))
    (tmp_path / "exif.jpg").write_bytes(save(corners(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff"))
    program = f"""
from foveal.core.errors import DataError
from foveal.data.images import decode
decode(open({str(tmp_path / "exif.jpg")!r}, "rb").read())
try:
    decode(open({str(tmp_path / "bomb.png")!r}, "rb").read())
except DataError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("11000 x 11000 pixels")
    assert ran.stderr == ""


def test_extensions_are_of_formats_that_can_be_read():
    Image.init()
    registered = Image.registered_extensions()
    assert {registered[ending] for ending in EXTENSIONS} <= set(FORMATS)


@pytest.mark.parametrize("size", [(300, 300), (301, 200), (97, 640), (20, 13), (256, 256), (225, 224), (1, 1)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_those_of_torchvision(picture, size, interpolation):
    p = Preprocessing(64, (0.5,) * 3, (0.5,) * 3, interpolation, 0.875)
    mode = T.InterpolationMode(interpolation)
    image = picture(3, size)
    resized = T.resize(image, [p.resized], mode)
    given = to_pixels(image, p)
    assert given.shape == (64, 64, 3)
    assert np.abs(given - np.asarray(T.center_crop(resized, [64]), int)).max() <= 2
    width_first = T.resize(T.resize(image, [image.height, resized.width], mode), [resized.height, resized.width], mode)
    assert (given == np.asarray(T.center_crop(width_first, [64]))).all()


def test_a_long_strip_is_cut_before_it_is_enlarged(picture):
    p = Preprocessing(32, (0.5,) * 3, (0.5,) * 3)
    for size in ((300, 30), (20, 170)):
        image = picture(1, size)
        resized = T.resize(image, [p.resized], T.InterpolationMode.BICUBIC)
        assert np.abs(to_pixels(image, p) - np.asarray(T.center_crop(resized, [32]), int)).max() <= 2
    strip = Image.new("RGB", (2_000_000, 1), RED)
    tracemalloc.start()
    assert to_pixels(strip, p)[0, 0].tolist() == list(RED)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
