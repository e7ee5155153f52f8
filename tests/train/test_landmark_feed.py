"""Examples of landmarks: what is drawn at a point is found at the point that the feed gives, mirrored or not."""

import numpy as np
import pytest
import torch

from foveal.core.errors import UsageError
from foveal.core.preprocessing import Preprocessing
from foveal.data.points import Points, in_memory
from foveal.train.landmarks import LandmarkFeed

PLAIN = Preprocessing(64, (0.5,) * 3, (0.5,) * 3)
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])


def coloured(flip: tuple[int, ...] | None = (1, 0, 2), count: int = 4) -> Points:
    """Black images of 80 x 60 with a red, a green and a blue spot; red and green are left and right."""
    rng = np.random.default_rng(0)
    images, xy = np.zeros((count, 60, 80, 3), np.uint8), np.zeros((count, 3, 2))
    for row in range(count):
        xy[row] = [[rng.integers(15, 30), 30], [rng.integers(50, 65), 25], [rng.integers(35, 45), 45]]
        for k in range(3):
            x, y = xy[row, k].astype(int)
            images[row, y - 3 : y + 4, x - 3 : x + 4] = COLOURS[k]
    return in_memory(images, xy, ("left", "right", "middle"), flip)


def spots(pixels: np.ndarray) -> np.ndarray:
    """Centres (x, y) of the red, green and blue spots [3, 2]."""
    grey = pixels.astype(float).sum(-1, keepdims=True) / 3
    weight = np.where(pixels - grey > 30, pixels - grey, 0)
    rows, columns = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    centres = [[(weight[..., c] * axis).sum() / weight[..., c].sum() for axis in (columns, rows)] for c in range(3)]
    return np.array(centres)


@pytest.mark.parametrize("augment", ["none", "light"])
@pytest.mark.parametrize("flip", ["off", "auto"])
def test_points_follow_the_image(augment: str, flip: str):
    feed = LandmarkFeed(coloured(), PLAIN, augment=augment, flip=flip)
    mirrored = 0
    for seed in range(12):
        example = feed.example(seed % 4, np.random.default_rng(seed))
        found = spots(example["images"])
        given = example["points"]
        swapped = np.linalg.norm(found[0] - given[0]) > 3
        mirrored += swapped
        order = [1, 0, 2] if swapped else [0, 1, 2]  # in a mirror the left point is where the right one was
        assert np.allclose(found[order], given, atol=0.6)
        assert example["known"].tolist() == [1, 1, 1]
    assert (mirrored > 0) == (augment == "light" and flip == "auto")


def test_the_second_view_is_the_first_one_moved():
    feed = LandmarkFeed(coloured(), PLAIN, augment="light", flip="on", views=2)
    swaps = 0
    for seed in range(12):
        example = feed.example(seed % 4, np.random.default_rng(seed))
        matrix, order = example["matrix"].astype(float), example["order"]
        moved = example["points"] @ matrix[:2, :2].T + matrix[:2, 2]
        assert np.allclose(moved, example["view_points"][order], atol=1e-3)
        found, seen = spots(example["images"]), spots(example["view"])
        assert np.allclose(found @ matrix[:2, :2].T + matrix[:2, 2], seen, atol=1.0), "pixels moved as the points did"
        swaps += order.tolist() == [1, 0, 2]
    assert 0 < swaps < 12


def test_all_randomness_comes_from_the_generator():
    feed = LandmarkFeed(coloured(), PLAIN, augment="strong", views=2)
    first, again, other = (feed.example(1, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not np.array_equal(first["images"], other["images"])


def test_points_that_leave_the_image_are_not_asked_for():
    points = coloured()
    points.xy[0, 0] = [500, 30]
    points.known[0, 1] = False
    example = LandmarkFeed(points, PLAIN, augment="none").example(0, np.random.default_rng(0))
    assert example["known"].tolist() == [0, 0, 1]


def test_batches_are_normalised_and_the_fingerprint_knows_the_data():
    feed = LandmarkFeed(coloured(), PLAIN, augment="none", views=2)
    example = feed.example(0, np.random.default_rng(0))
    ready = feed.ready({name: torch.from_numpy(np.asarray(value))[None] for name, value in example.items()})
    assert ready["images"].shape == ready["view"].shape == (1, 3, 64, 64)
    assert float(ready["images"].min()) == -1
    moved = coloured()
    moved.xy[0, 0, 0] += 1
    assert LandmarkFeed(moved, PLAIN, augment="none", views=2).fingerprint() != feed.fingerprint()
    assert LandmarkFeed(coloured(), PLAIN, augment="none", views=2).fingerprint() == feed.fingerprint()


def test_flipping_needs_to_know_the_twins():
    with pytest.raises(UsageError, match="flip=on needs to know which points are mirror twins: add a column flip"):
        LandmarkFeed(coloured(flip=None), PLAIN, flip="on")
    assert LandmarkFeed(coloured(flip=None), PLAIN, flip="auto").flip is None
