"""Deletion, insertion, the pointing game and the overlay."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from foveal.core.errors import DataError
from foveal.evaluate.explanation import Curves, follow, judge, overlap, passes, pointing_hits, ranking, rivals
from foveal.evaluate.overlay import colours, overlay

NEUTRAL = torch.zeros(3, 1, 1)
SIZE = 32


def image() -> Tensor:
    return torch.ones(3, SIZE, SIZE)


def weight() -> Tensor:
    """How much each of 8 x 8 cells counts; all different."""
    values = torch.arange(64.0)[torch.randperm(64, generator=torch.Generator().manual_seed(0))] ** 2
    return (values / values.sum()).reshape(8, 8)


def score(images: Tensor) -> Tensor:
    """The sum over cells of their weight, as far as they are shown."""
    cells = images[:, 0].unflatten(1, (8, 4)).unflatten(3, (8, 4)).mean((2, 4))
    return (cells * weight()).sum((1, 2))


def enlarged(cells: Tensor) -> Tensor:
    return cells.repeat_interleave(4, 0).repeat_interleave(4, 1)


def test_curves_are_those_of_a_loop_over_the_cells():
    maps = {"true": enlarged(weight()), "wrong": -enlarged(weight())}
    curves = follow(score, image(), maps, NEUTRAL, steps=64)
    for name, map in maps.items():
        order = map[::4, ::4].flatten().argsort(descending=True)
        left = 1 - torch.cat([torch.zeros(1), weight().flatten()[order].cumsum(0)])
        assert torch.allclose(curves[name].deletion, left.double(), atol=1e-5)
        assert torch.allclose(curves[name].insertion, 1 - left.double(), atol=1e-5)
    assert curves["true"].areas()["deletion"] < curves["wrong"].areas()["deletion"]
    coarse = follow(score, image(), maps, NEUTRAL, steps=16)
    assert torch.allclose(coarse["true"].deletion, curves["true"].deletion[::4], atol=1e-5)


def test_area_is_the_mean_over_the_way():
    line = Curves(torch.linspace(1, 0, 11), torch.ones(11))
    assert line.areas() == {"deletion": pytest.approx(0.5), "insertion": pytest.approx(1)}


def test_no_more_images_exist_at_once_than_a_batch_and_their_number_is_told():
    sizes: list[int] = []

    def counted(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return score(images)

    maps = {str(k): torch.rand(SIZE, SIZE) for k in range(5)}
    few = follow(counted, image(), maps, NEUTRAL, batch=7)
    assert max(sizes) == 7
    assert sum(sizes) == passes(5)
    many = follow(score, image(), maps, NEUTRAL, batch=1000)
    assert all(torch.allclose(few[name].deletion, many[name].deletion) for name in maps)


def test_a_map_that_knows_beats_the_rivals_and_its_opposite_does_not():
    knows = judge(score, image(), enlarged(weight()), NEUTRAL, features=torch.rand(4, 5, 5))
    assert set(knows) == {"map", "random", "centre", "channel-norm"}
    assert knows["map"]["deletion"] < min(knows[name]["deletion"] for name in ("random", "centre", "channel-norm"))
    assert knows["map"]["insertion"] > max(knows[name]["insertion"] for name in ("random", "centre", "channel-norm"))
    opposite = judge(score, image(), -enlarged(weight()), NEUTRAL)
    assert opposite["map"]["deletion"] > opposite["random"]["deletion"]
    assert judge(score, image(), enlarged(weight()), NEUTRAL) == judge(score, image(), enlarged(weight()), NEUTRAL)


def test_a_flat_map_is_cells_at_random_and_not_reading_order():
    order = ranking(torch.zeros(SIZE, SIZE), 8)
    assert sorted(order.tolist()) == list(range(64))
    assert order.tolist() != list(range(64))
    assert np.abs(np.corrcoef(order, np.arange(64))[0, 1]) < 0.4


def test_cells_are_means_also_when_they_do_not_divide_the_image():
    map = torch.rand(30, 23)
    rows, columns = (torch.arange(length) * 8 // length for length in map.shape)
    means = torch.stack([map[rows == r][:, columns == c].mean() for r in range(8) for c in range(8)])
    assert torch.equal(ranking(map, 8), means.argsort(descending=True).argsort())


def test_rivals_have_the_size_asked_for():
    found = rivals((20, 30), features=torch.rand(4, 3, 3), draws=2)
    assert list(found) == ["random-0", "random-1", "centre", "channel-norm"]
    assert all(map.shape == (20, 30) for map in found.values())
    assert not torch.equal(found["random-0"], found["random-1"])
    assert found["centre"].flatten().argmax() in (9 * 30 + 14, 9 * 30 + 15, 10 * 30 + 14, 10 * 30 + 15)


def test_maps_that_cannot_be_scored_are_refused():
    with pytest.raises(DataError, match="map 'x' is"):
        follow(score, image(), {"x": torch.zeros(8, 8)}, NEUTRAL)
    with pytest.raises(DataError, match="NaN"):
        follow(score, image(), {"x": torch.full((SIZE, SIZE), torch.nan)}, NEUTRAL)


def test_the_pointing_game_shares_ties():
    truth = torch.zeros(3, 4, 4, dtype=torch.bool)
    truth[:, :2] = True
    maps = torch.zeros(3, 4, 4)
    maps[0, 1, 1], maps[1, 3, 3] = 1, 1
    assert pointing_hits(maps, truth).tolist() == [1, 0, 0.5]


def test_overlap_of_thresholded_maps():
    a, b = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    a[0, 0, :2], b[0, 0, 1:3] = 1, 0.2
    assert overlap(a, b).item() == pytest.approx(1 / 3)
    assert overlap(a, 7 * a).item() == 1


def test_the_overlay_has_the_photos_size_and_dims_what_is_not_seen():
    photo = Image.new("RGB", (90, 70), (200, 200, 200))
    map = np.zeros((70, 90), np.float32)
    map[30:40, 40:50] = 3
    drawn = np.asarray(overlay(photo, map, (10, 0, 80, 70))).astype(int)
    assert drawn.shape == (70, 90, 3)
    assert drawn[5, 5].sum() < 0.6 * drawn[5, 40].sum(), "outside is darker"
    assert np.ptp(drawn[5, 40]) <= 1, "no colour where nothing matters"
    assert drawn[35, 45, 2] < drawn[35, 45, 0], "the highest is yellow"
    against = np.asarray(overlay(photo, -1 - map, (0, 0, 90, 70))).astype(int)
    assert np.ptp(against, axis=2).max() <= 1, "no colour where all speaks against the class"
    tall = overlay(photo.resize((90, 700)), np.ones((700, 90), np.float32), (0, 0, 90, 700))
    assert np.ptp(np.asarray(tall), axis=0).max() == 0, "no seams between strips"


def test_colours_grow_lighter_without_a_step():
    ramp = colours(np.linspace(0, 1, 200)) @ np.array([0.3, 0.59, 0.11])
    assert (np.diff(ramp) > 0).all()
    assert np.diff(ramp).max() < 4
