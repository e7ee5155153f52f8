"""less-is-more: the cover by a naive double loop, the counts of the solar cells, what the hash sees and what not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from foveal.blocks.cover import Cosine, Hamming, Steps, greedy_cover, grouped_cover
from foveal.core.errors import DataError, UsageError
from foveal.core.options import describe_options
from foveal.data.open import open_dataset
from foveal.methods.curate.less_is_more import LessIsMore, Options, dhash, read_window, to_grey


def naive_cover(codes: list[int], radius: int) -> list[int]:
    """The first that is left stays, everything within the radius of it goes."""
    exemplar = [-1] * len(codes)
    for i, code in enumerate(codes):
        if exemplar[i] == -1:
            for j in range(i, len(codes)):
                if exemplar[j] == -1 and bin(code ^ codes[j]).count("1") <= radius:
                    exemplar[j] = i
    return exemplar


def clustered(n: int, seed: int, flips: int = 5) -> np.ndarray:
    """Codes around a few centres, so that every radius has something to do."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**64, max(1, n // 8), dtype=np.uint64)[rng.integers(0, max(1, n // 8), n)]
    for _ in range(flips):
        codes = codes ^ np.where(rng.random(n) < 0.6, np.uint64(1) << rng.integers(0, 64, n).astype(np.uint64), 0)
    return codes.astype(np.uint64)


@given(st.integers(1, 60), st.integers(0, 64), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_cover_is_the_naive_one(n: int, radius: int, seed: int):
    codes = clustered(n, seed)
    exemplar, apart = greedy_cover(Hamming(codes), np.arange(n), radius)
    assert exemplar.tolist() == naive_cover([int(code) for code in codes], radius)
    assert apart.tolist() == [bin(int(codes[i] ^ codes[e])).count("1") for i, e in enumerate(exemplar)]


@pytest.mark.parametrize("radius", [0, 3, 6, 20])
def test_more_images_than_a_block_and_the_index_of_bands(radius: int):
    codes = clustered(1500, radius)
    exemplar, _ = greedy_cover(Hamming(codes), np.arange(len(codes)), radius)
    assert exemplar.tolist() == naive_cover([int(code) for code in codes], radius)


def test_the_index_finds_what_comparing_all_finds():
    codes = clustered(3000, 1)
    hamming = Hamming(codes)
    centres, rows = np.arange(0, 400), np.arange(400, 3000)
    place, apart = hamming.first_within(centres, rows, 6)
    bits = np.bitwise_count(codes[centres][:, None] ^ codes[rows])
    expected = np.where((bits <= 6).any(0), (bits <= 6).argmax(0), -1)
    assert (place == expected).all()
    assert (apart[place >= 0] == bits[place[place >= 0], np.flatnonzero(place >= 0)]).all()


@pytest.fixture(scope="module")
def cells() -> np.ndarray:
    """What is seen of 2,624 solar cells."""
    dataset, method = open_dataset("sample:elpv"), LessIsMore()
    return np.stack([method.look(dataset.image(row)) for row in range(len(dataset))])


def test_counts_on_the_solar_cells(cells: np.ndarray):
    selection = LessIsMore().select(cells, np.zeros(len(cells), np.int64), None)
    counts = {row["radius"]: row["kept"] for row in selection.curve}
    expected = {0: 2580, 1: 2464, 2: 2307, 3: 2109, 4: 1907, 6: 1583, 8: 1353, 10: 1163, 12: 940}
    for radius, kept in expected.items():
        assert abs(counts[radius] - kept) <= 0.01 * kept, f"radius {radius}"
    assert list(counts.values()) == sorted(counts.values(), reverse=True)
    assert selection.kept.sum() == counts[6]
    assert selection.audit["false_negatives_in_256_before"] > 100
    assert selection.audit["false_negatives_in_256_after"] == 0


def test_cover_and_separation(cells: np.ndarray):
    groups = np.arange(len(cells)) % 5
    selection = LessIsMore(Options(radius=6)).select(cells, groups, None)
    codes = np.ascontiguousarray(cells[:, :8]).view(np.uint64)[:, 0]
    bits = np.bitwise_count(codes ^ codes[selection.exemplar])
    assert (bits == selection.distance).all()
    assert bits.max() <= 6
    assert (groups == groups[selection.exemplar]).all()
    for group in range(5):
        stays = codes[selection.kept & (groups == group)]
        between = np.bitwise_count(stays[:, None] ^ stays) + 64 * np.eye(len(stays), dtype=int)
        assert between.min() > 6


def test_groups_do_not_see_each_other(cells: np.ndarray):
    some = cells[:600]
    groups = np.arange(600) % 3
    whole = LessIsMore(Options(radius=6)).select(some, groups, None)
    renamed = LessIsMore(Options(radius=6)).select(some, 2 - groups, None)
    assert (whole.exemplar == renamed.exemplar).all()
    alone = np.flatnonzero(groups == 1)
    part = LessIsMore(Options(radius=6)).select(some[alone], np.zeros(len(alone), np.int64), None)
    assert (whole.exemplar[alone] == alone[part.exemplar]).all()


def test_the_smallest_and_the_largest_radius(cells: np.ndarray):
    some, groups = np.concatenate([cells[:200], cells[:10]]), np.arange(210) % 3
    equal = LessIsMore(Options(radius=0)).select(some, np.zeros(210, np.int64), None)
    assert (some[:, :8] == some[equal.exemplar][:, :8]).all()
    assert equal.kept.sum() == len(np.unique(some[:, :8], axis=0))
    one = LessIsMore(Options(radius=64)).select(some, groups, None)
    assert one.kept.sum() == 3


def test_keep_takes_the_smallest_radius_that_reaches_it(cells: np.ndarray):
    groups = np.zeros(len(cells), np.int64)
    selection = LessIsMore().select(cells, groups, 0.5)
    radius = selection.chosen["radius"]
    counts = {row["radius"]: row["kept"] for row in selection.curve}
    assert counts[radius] <= 0.5 * len(cells) < counts[radius - 1]
    assert selection.kept.sum() == counts[radius]


def test_a_share_that_no_radius_reaches(cells: np.ndarray):
    with pytest.raises(UsageError, match=r"--keep 0.2 cannot be met: even radius 64 leaves 50 of 100 images \(0.50\)"):
        LessIsMore().select(cells[:100], np.arange(100) // 2, 0.2)


def test_a_share_and_a_radius_contradict(cells: np.ndarray):
    with pytest.raises(UsageError, match="radius=6 is given: say one of them"):
        LessIsMore(Options(radius=6)).select(cells[:9], np.zeros(9, np.int64), 0.5)


def test_an_empty_pool():
    with pytest.raises(DataError, match="no images to choose from"):
        LessIsMore().select(np.zeros((0, 11), np.uint8), np.zeros(0, np.int64), None)


@pytest.mark.parametrize("radius", [-1, 65])
def test_a_radius_out_of_range(radius: int):
    with pytest.raises(ValueError, match="radius"):
        Options(radius=radius)


def test_the_table_of_options_knows_the_radius():
    row = next(row for row in describe_options(Options) if row["name"] == "radius")
    assert (row["type"], row["range"], row["default"]) == ("integer", ">= 0, <= 64", None)


def bits(image: Image.Image) -> np.ndarray:
    return np.unpackbits(dhash(image)).reshape(8, 8)


def smooth(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(60, 180, (6, 6), dtype=np.uint8)
    return Image.fromarray(coarse).resize((72, 72), Image.Resampling.BICUBIC)


def test_what_the_hash_does_not_see():
    image = smooth(0)
    brighter = Image.fromarray((np.asarray(image).astype(float) * 1.25 + 10).clip(0, 255).astype(np.uint8))
    assert (bits(image) != bits(brighter)).mean() <= 0.02
    flipped = bits(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert (flipped != 1 - bits(image)[:, ::-1]).mean() <= 0.02
    assert not bits(Image.new("L", (50, 50), 99)).any()


def test_the_hash_by_the_book():
    image = smooth(3)
    small = np.asarray(image.resize((9, 8), Image.Resampling.LANCZOS)).astype(int)
    expected = [[int(small[i][j + 1] > small[i][j]) for j in range(8)] for i in range(8)]
    assert bits(image).tolist() == expected


def test_a_note_when_only_the_colour_differs():
    method = LessIsMore()
    grey = smooth(1)
    red = Image.merge("RGB", (grey, grey.point(lambda v: v // 2), grey.point(lambda v: v // 2)))
    blue = Image.merge("RGB", (red.getchannel(1), red.getchannel(1), red.getchannel(0)))
    seen = np.stack([method.look(each) for each in (red, blue)])
    selection = method.select(seen, np.zeros(2, np.int64), None)
    assert selection.kept.sum() == 1
    assert "1 images were dropped for one of another colour" in selection.notes[0]
    assert method.select(seen[[0, 0]], np.zeros(2, np.int64), None).notes == ()


def test_deep_grey_needs_a_window():
    deep = Image.fromarray(np.asarray(smooth(2)).astype(np.uint16) * 16)
    with pytest.raises(UsageError, match=r"need a window of grey values .* give window=LOW\.\.HIGH"):
        LessIsMore().look(deep)
    seen = LessIsMore(Options(window="0..4080")).look(deep)
    assert (seen[:8] == dhash(smooth(2))).all()
    with pytest.raises(UsageError, match=r"window=9: expected LOW\.\.HIGH"):
        read_window("9")
    assert np.asarray(to_grey(deep, (0.0, 2040.0))).max() == 255


def test_by_features_and_by_order():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(8, 16)).astype(np.float32)[np.arange(40) % 8] * rng.uniform(1, 3, (40, 1)).astype(np.float32)
    selection = LessIsMore(Options(by="features", radius=1)).select(X, np.zeros(40, np.int64), None)
    assert selection.exemplar.tolist() == (np.arange(40) % 8).tolist()
    every = LessIsMore(Options(by="order", radius=3)).select(X, np.arange(40) // 20, None)
    assert np.flatnonzero(every.kept).tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36]
    assert LessIsMore(Options(by="features")).reads() == "features"


def test_the_distances():
    unit = np.eye(3, dtype=np.float32)
    assert Cosine(unit)(np.array([0]), np.arange(3)).tolist() == [[0, 100, 100]]
    assert Steps(np.arange(5))(np.array([3]), np.arange(5)).tolist() == [[3, 2, 1, 0, 1]]
    exemplar, _ = grouped_cover(Steps(np.arange(4)), np.array([1, 0, 1, 0]), 64)
    assert exemplar.tolist() == [0, 1, 0, 1]
