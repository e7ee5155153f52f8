import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from foveal.core.method import Recipe
from foveal.core.preprocessing import Preprocessing
from foveal.data.images import to_pixels
from foveal.train.batches import ahead, augment, epoch_batches, random_box
from foveal.train.optim import make_optimizer, rate, set_rate

P = Preprocessing(24, (0.5, 0.25, 0.75), (0.5, 0.5, 0.5), "bilinear", 0.875)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8))


@pytest.mark.parametrize(("count", "size", "sizes"), [(10, 4, [4, 3, 3]), (65, 64, [33, 32]), (3, 8, [3]), (8, 8, [8])])
def test_batches_cover_every_image_once_without_a_small_rest(count: int, size: int, sizes: list[int]) -> None:
    batches = epoch_batches(count, size, 0, 0)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(np.concatenate(batches)) == list(range(count))


def test_order_follows_seed_and_epoch() -> None:
    one, same, later, other = (
        np.concatenate(epoch_batches(50, 8, seed, epoch)) for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, later)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("kind", ["none", "light", "strong"])
def test_views_have_the_right_shape_and_repeat_with_the_generator(kind) -> None:
    views = [augment(PICTURE, P, kind, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert views[0].shape == (24, 24, 3)
    assert views[0].dtype == np.uint8
    assert np.array_equal(views[0], views[1])
    assert np.array_equal(views[0], views[2]) == (kind == "none")
    if kind == "none":
        assert np.array_equal(views[0], to_pixels(PICTURE, P))


def test_light_mirrors_half_of_the_images_and_changes_no_colour() -> None:
    ramp = Image.fromarray(np.repeat(np.arange(60, dtype=np.uint8)[None, :, None] * 4, 40, 0).repeat(3, 2))
    views = [augment(ramp, P, "light", np.random.default_rng(seed)).astype(int) for seed in range(200)]
    mirrored = [view[0, 0, 0] > view[0, -1, 0] for view in views]
    assert 70 < sum(mirrored) < 130
    assert all((view.max(2) == view.min(2)).all() for view in views)
    spans = [abs(view[0, 0, 0] - view[0, -1, 0]) for view in views]
    assert min(spans) < 0.75 * max(spans)


def test_boxes_keep_to_area_ratio_and_image() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        left, top, right, bottom = random_box(60, 40, (0.6, 1.0), rng)
        assert 0 <= left < right <= 60
        assert 0 <= top < bottom <= 40
        width, height = right - left, bottom - top
        assert 0.59 < width * height / 2400 < 1.01
        assert 0.74 < width / height < 1.34
    assert random_box(1000, 4, (0.6, 1.0), rng) == (498, 0, 502, 4)


def test_strong_greys_out_a_part_with_the_mean_colour() -> None:
    mean = np.round(255 * np.array(P.mean)).astype(np.uint8)
    shares = [(augment(PICTURE, P, "strong", np.random.default_rng(seed)) == mean).all(2).mean() for seed in range(100)]
    greyed = [share for share in shares if share > 0.01]
    assert 30 < len(greyed) < 70
    assert max(greyed) < 0.25


def test_work_ahead_is_in_order_and_bounded() -> None:
    started, lock = [0], threading.Lock()

    def work(item: int) -> int:
        with lock:
            started[0] += 1
        time.sleep(0.001 * (item % 3))
        return item * item

    with ThreadPoolExecutor(4) as pool:
        for number, answer in enumerate(ahead(work, range(50), pool, 6)):
            assert answer == number * number
            assert started[0] <= number + 7
    assert started[0] == 50


def test_work_ahead_passes_errors_on() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("item 3")
        return item

    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="item 3"):
        list(ahead(work, range(10), pool, 4))


def test_rate_rises_then_falls_as_a_cosine() -> None:
    rates = [rate(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[99] < 0.01
    assert rate(0, 1, 0.1) == 1
    assert rate(0, 10, 0.0) == 1


def test_every_group_keeps_its_own_full_rate() -> None:
    one, two = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [one], "lr": 0.1}, {"params": [two], "lr": 0.4}]
    optimizer = make_optimizer(groups, Recipe(optimizer="sgd"))
    for share in (0.5, 0.25):
        assert set_rate(optimizer, share) == pytest.approx(0.1 * share)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * share, 0.4 * share])
