from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from foveal.data.images import decode
from foveal.data.scan import SCAN, scan


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return decode(buffer.getvalue())


def photo(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Something with detail at every scale."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", size)
    total = np.zeros((size[1], size[0], 3))
    for cells in (3, 6, 12, 24, 48):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), float) / cells
    picture = total - total.min()
    return Image.fromarray((picture / picture.max() * 255).astype(np.uint8))


def apart(one: Image.Image, other: Image.Image) -> int:
    return int(np.bitwise_count(scan(one)["phash"] ^ scan(other)["phash"]).sum())


def test_record():
    record = scan(photo(0))
    assert record.dtype == SCAN
    grey = np.asarray(photo(0).convert("L"), float)
    assert record["ok"] == 1
    assert (record["width"], record["height"]) == (320, 240)
    assert record["mean"] == pytest.approx(grey.mean(), rel=1e-6)
    assert record["std"] == pytest.approx(grey.std(), rel=1e-6)
    table = np.zeros(2, SCAN)
    table[1] = record
    assert table[1] == record
    assert table["ok"].tolist() == [0, 1]


@pytest.mark.parametrize(
    "change",
    [
        lambda image: jpeg(image, 75),
        lambda image: jpeg(image, 40),
        lambda image: image.resize((160, 120), Image.Resampling.BICUBIC),
        lambda image: jpeg(image.resize((224, 168)), 80),
        lambda image: image.resize((640, 480), Image.Resampling.LANCZOS),
        lambda image: image.point(lambda value: int(value * 0.8 + 20)),
        lambda image: image.convert("L").convert("RGB"),
    ],
    ids=["jpeg75", "jpeg40", "half", "small jpeg", "double", "contrast", "grey"],
)
def test_copies_stay_close(change):
    assert max(apart(photo(seed), change(photo(seed))) for seed in range(12)) <= 16


def test_other_pictures_are_far():
    hashes = np.stack([scan(photo(seed))["phash"] for seed in range(40)])
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(axis=2)
    assert distances[np.triu_indices(40, 1)].min() > 70


@pytest.mark.parametrize("level", [0, 1, 77, 255])
def test_one_colour_has_the_hash_zero(level):
    record = scan(Image.new("RGB", (50, 70), (level,) * 3))
    assert not record["phash"].any()
    assert record["std"] == 0
    assert record["mean"] == level


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3000, 2)])
def test_odd_sizes(size):
    assert scan(Image.new("RGB", size, (9, 9, 9)))["ok"] == 1
