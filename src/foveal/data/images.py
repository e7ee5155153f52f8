"""Bytes of an image file -> an upright RGB picture -> the square of pixels a backbone sees."""

from __future__ import annotations

import io
import math
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from foveal.core.errors import DataError
from foveal.core.preprocessing import Preprocessing

MAX_PIXELS = 100_000_000
"""Larger images are refused from their header, before any of their pixels are decoded."""

EXTENSIONS = frozenset(
    f".{name}"
    for names in ("jpg jpeg jpe jfif png gif webp bmp dib", "tif tiff ppm pgm pbm pnm jp2 j2k avif")
    for name in names.split()
)
# Formats that run other programs (EPS) or only wrap other files are left out.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")

ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
INTERPOLATION = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# Pillow warns on stderr of damaged EXIF, which `decode` does without, and of large images, which it refuses by itself.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(data: bytes, max_pixels: int = MAX_PIXELS, *, deep: bool = False) -> Image.Image:
    """An upright 8-bit RGB picture: the first frame, EXIF orientation applied, transparency over white.

    16-bit grey is scaled by its range (65535 -> 255), 32-bit integers and floats by the smallest usual range that
    holds them (0..1, 0..255, 0..65535, and for integers 0..2^31-1).

    Args:
        deep: leave grey of more than 8 bits as it is.

    Raises:
        DataError: one line with the reason: empty, not an image, truncated or damaged, larger than `max_pixels`.
    """
    if not data:
        raise DataError("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(
                    f"{width} x {height} pixels: images of up to {max_pixels / 1e6:g} megapixels are read, shrink it"
                )
            image.load()
            picture = upright(image)
            return picture.copy() if deep and is_deep(picture) else to_rgb(picture)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError("not an image of a known format, or its header is damaged") from None
    except Image.DecompressionBombError:
        raise DataError(f"more than {max_pixels / 1e6:g} megapixels: shrink it") from None
    except Exception as error:  # decoders meet damaged bytes with errors of any type
        raise DataError(f"truncated or damaged image ({str(error).strip() or type(error).__name__})") from None


def is_deep(image: Image.Image) -> bool:
    """Whether it is grey of more than 8 bits."""
    return image.mode.startswith(("I", "F"))


def upright(image: Image.Image) -> Image.Image:
    """Turn and mirror as the EXIF orientation says; unreadable EXIF counts as none."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF raises errors of any type, and the pixels are fine
        turn = None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of a loaded image of any mode."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image if type(image) is Image.Image else image.copy()
    if is_deep(image):
        return Image.fromarray(to_8_bit(np.asarray(image))).convert("RGB")
    if image.has_transparency_data or image.mode in ("La", "RGBa"):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def to_8_bit(values: np.ndarray) -> np.ndarray:
    """Deep grey [H, W] -> uint8 [H, W], by the range of its type or the smallest usual range that holds it."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError("floating-point image with NaN or infinite values")
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f":
        ceilings = (1.0, 255.0, 65535.0)
    else:
        ceilings = (65535.0, 2.0**31 - 1)
    top = next((ceiling for ceiling in ceilings if high <= ceiling), None)
    if top is None or low < 0:
        raise DataError(f"{values.dtype} image with values {low:g} to {high:g}: expected 0 to 1, 255 or 65535")
    return np.rint(values.astype(np.float32) * (255.0 / top)).astype(np.uint8)


def to_pixels(image: Image.Image, p: Preprocessing) -> np.ndarray:
    """What the backbone sees, before normalisation: uint8 [size, size, 3].

    The shorter side is resized to `p.resized`, then the centre is cut, with torchvision's rounding. The width is
    resized before the height: left to itself Pillow takes either first, by its version and the shape of the image.
    """
    width, height = image.size
    short, long = sorted((width, height))
    scaled = int(p.resized * long / short)
    size = (p.resized, scaled) if width <= height else (scaled, p.resized)
    left, top = round((size[0] - p.size) / 2), round((size[1] - p.size) / 2)
    method = INTERPOLATION[p.interpolation]
    if long > 8 * short:  # a long strip: resize only what is kept, for memory's sake
        x, box_left, box_right = central(width, size[0], left, p.size)
        y, box_top, box_bottom = central(height, size[1], top, p.size)
        image = image.crop((x.start, y.start, x.stop, y.stop))
        image = image.resize((p.size, len(y)), method, (box_left, 0, box_right, len(y)))
        return np.asarray(image.resize((p.size, p.size), method, (0, box_top, p.size, box_bottom)))
    image = image.resize((size[0], height), method).resize(size, method)
    return np.asarray(image.crop((left, top, left + p.size, top + p.size)))


def seen_box(size: tuple[int, int], p: Preprocessing) -> tuple[float, float, float, float]:
    """Left, top, right and bottom, in pixels of a photo of `size` (width, height), of what `to_pixels` keeps of it."""
    width, height = size
    short, long = sorted(size)
    scaled = int(p.resized * long / short)
    across, down = (p.resized, scaled) if width <= height else (scaled, p.resized)
    left, top = round((across - p.size) / 2), round((down - p.size) / 2)
    x, y = width / across, height / down
    return left * x, top * y, (left + p.size) * x, (top + p.size) * y


def central(length: int, resized: int, start: int, size: int) -> tuple[range, float, float]:
    """Pixels of one axis that `size` resized ones from `start` on are made of, and where those begin and end in it."""
    scale = length / resized
    margin = 2 * math.ceil(max(scale, 1.0)) + 1
    first = max(0, math.floor(start * scale) - margin)
    last = min(length, math.ceil((start + size) * scale) + margin)
    low = start * scale - first
    return range(first, last), low, low + size * scale
