"""subpixel-heatmap: the codec against a naive loop and the published arithmetic, and the agreement of two views."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foveal.core.errors import DataError, UsageError
from foveal.data.geometry import about_centre, moved, resample
from foveal.methods.dense.subpixel_heatmap import (
    Options,
    SubpixelHeatmap,
    decode,
    disagreement,
    encode,
    within,
)

GRID = torch.cartesian_prod(torch.linspace(-0.5, 0.5, 21), torch.linspace(-0.5, 0.5, 21)).double()
UNIFORM = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5


def naive_decode(map: Tensor, window: int, tau: float) -> Tensor:
    """One map [h, w], with loops."""
    h, w = map.shape
    best = (0, 0)
    for i in range(h):
        for j in range(w):
            if map[i, j] > map[best]:
                best = (i, j)
    total, x, y, half = torch.zeros((), dtype=map.dtype), 0.0, 0.0, window // 2
    for i in range(max(0, best[0] - half), min(h, best[0] + half + 1)):
        for j in range(max(0, best[1] - half), min(w, best[1] + half + 1)):
            share = torch.exp(tau * (map[i, j] - map[best].detach()))
            total, x, y = total + share, x + share * j, y + share * i
    return torch.stack([x / total, y / total])


def errors(sigma: float, window: int, tau: float, offsets: Tensor = UNIFORM) -> Tensor:
    """Distances in cells of decoded from true points, at offsets from the middle of a map."""
    points = offsets + 16
    return (decode(encode(points, (33, 33), sigma), window, tau)[0] - points).norm(dim=1)


@pytest.mark.parametrize(("sigma", "mean", "most"), [(1.0, 0.132, 0.196), (1.5, 0.029, 0.042), (2.0, 0.010, 0.014)])
def test_what_is_encoded_is_decoded(sigma: float, mean: float, most: float):
    found = errors(sigma, 5, 10.0)
    assert float(found.mean()) == pytest.approx(mean, abs=0.003)
    assert float(found.max()) == pytest.approx(most, abs=0.004)


def test_the_round_trip_at_the_defaults_is_within_its_bounds():
    found = errors(2.0, 5, 10.0, GRID)
    assert float(found.mean()) <= 0.012
    assert float(found.max()) <= 0.016


@pytest.mark.parametrize(
    ("sigma", "window", "tau", "mean", "most"), [(1.0, 5, 5.0, 0.069, 0.088), (2.0, 3, 10.0, 0.069, 0.126)]
)
def test_other_windows_and_temperatures(sigma: float, window: int, tau: float, mean: float, most: float):
    found = errors(sigma, window, tau)
    assert float(found.mean()) == pytest.approx(mean, abs=0.003)
    assert float(found.max()) == pytest.approx(most, abs=0.004)


def test_better_than_whole_and_quarter_cells_at_every_offset():
    middles = (torch.arange(20, dtype=torch.float64) + 0.5) / 20 - 0.5
    points = torch.cartesian_prod(middles, middles) + 16
    maps = encode(points, (33, 33), 2.0)
    whole = decode(maps, 1)[0]
    quarter = whole.clone()
    for row, (x, y) in enumerate(whole.long().tolist()):
        quarter[row, 0] += 0.25 * torch.sign(maps[row, y, x + 1] - maps[row, y, x - 1])
        quarter[row, 1] += 0.25 * torch.sign(maps[row, y + 1, x] - maps[row, y - 1, x])
    fine = (decode(maps)[0] - points).norm(dim=1).unflatten(0, (20, 20))
    for rough, mean in ((whole, 0.39), (quarter, 0.18)):
        coarse = (rough - points).norm(dim=1).unflatten(0, (20, 20))
        assert float(coarse.mean()) == pytest.approx(mean, abs=0.02)
        assert (fine.mean(0) < coarse.mean(0)).all(), "at every offset along y, averaged over those along x"
        assert (fine.mean(1) < coarse.mean(1)).all()


def test_the_amplitude_of_a_density_ruins_it():
    points = GRID + 16
    maps = encode(points, (33, 33), 2.0) / (2 * math.pi * 4)
    found = (decode(maps)[0] - points).norm(dim=1)
    assert float(found.mean()) == pytest.approx(0.354, abs=0.01)
    assert float(found.max()) == pytest.approx(0.625, abs=0.02)


@pytest.mark.parametrize("window", [1, 3, 5, 9])
def test_decode_agrees_with_loops_and_so_do_its_gradients(window: int):
    maps = torch.rand(4, 3, 12, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    found, peak = decode(ours, window, 7.0)
    expected = torch.stack([torch.stack([naive_decode(one, window, 7.0) for one in few]) for few in theirs])
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.equal(peak, maps.amax((-2, -1)))
    weight = torch.rand(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (mine,) = torch.autograd.grad((found * weight).sum(), ours)
    if window == 1:
        assert (mine == 0).all(), "the highest cell alone moves nothing"
        return
    (other,) = torch.autograd.grad((expected * weight).sum(), theirs)
    assert torch.allclose(mine, other, atol=1e-12)
    away = torch.ones(4, 3, 12, 9, dtype=torch.bool)
    for index in np.ndindex(4, 3):
        at = int(maps[index].argmax())
        i, j, half = at // 9, at % 9, window // 2
        away[index][max(0, i - half) : i + half + 1, max(0, j - half) : j + half + 1] = False
    assert (mine[away] == 0).all(), "the gradient reaches the window and nothing else"
    assert (mine[~away] != 0).any()


def test_decode_moves_with_the_map_and_ignores_a_constant():
    maps = encode(torch.tensor([[7.3, 8.6]]), (24, 24), 1.5)
    found = decode(maps)[0]
    for down, right in ((3, -2), (-4, 5)):
        rolled = decode(torch.roll(maps, (down, right), (-2, -1)))[0]
        assert torch.allclose(rolled, found + torch.tensor([right, down]), atol=1e-5)
    assert torch.allclose(decode(maps + 3.7)[0], found, atol=1e-5)


def test_the_widest_window_is_the_global_and_the_narrowest_the_argmax():
    points = torch.tensor([[7.2, 6.9]], dtype=torch.float64)
    maps = encode(points, (15, 15), 2.0)
    share = (10 * maps.flatten(-2)).softmax(-1).unflatten(-1, (15, 15))
    axis = torch.arange(15, dtype=torch.float64)
    expected = torch.stack([(share.sum(-2) * axis).sum(-1), (share.sum(-1) * axis).sum(-1)], -1)
    assert torch.allclose(decode(maps, 15)[0], expected, atol=1e-12)
    assert torch.equal(decode(maps, 1)[0], torch.tensor([[7.0, 7.0]], dtype=torch.float64))


def test_windows_are_cut_at_the_border():
    near = torch.linspace(-0.5, 2, 26, dtype=torch.float64)
    points = torch.cartesian_prod(near, near)
    maps = encode(points, (20, 20), 2.0)
    found = decode(maps)[0]
    expected = torch.stack([naive_decode(one, 5, 10.0) for one in maps])
    assert torch.allclose(found, expected, atol=1e-12), "as the window that is cut, written out"
    inwards = (found - points).amax(1)
    assert float(inwards[(points >= 0).all(1)].max()) < 0.5
    assert float(inwards.max()) < 0.65, "on the outer half of the outermost cell, which has no cell beyond it"
    padded = decode(nn.functional.pad(maps, (2, 2, 2, 2)))[0] - 2
    at_corner = (points < 0.5).all(1)
    assert ((found - points)[at_corner].norm(dim=1) != (padded - points)[at_corner].norm(dim=1)).all()


def test_points_outside_have_empty_maps():
    points = torch.tensor([[-0.6, 3.0], [-0.5, 3.0], [9.5, 3.0], [9.6, 3.0], [3.0, 7.6]])
    maps = encode(points, (8, 10), 1.0)
    assert within(points, (8, 10)).tolist() == [False, True, True, False, False]
    assert (maps.amax((-2, -1)) > 0).tolist() == [False, True, True, False, False]


def views(seed: int, mirror: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Maps [2, 3, 32, 32] of soft points, the same maps seen after a move, and the move."""
    matrix = torch.from_numpy(about_centre((32, 32), angle=20, scale=1.1, shift=(1.5, -0.7), mirror=mirror))[None]
    points = 6 + 20 * torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return encode(points, (32, 32), 2.5), encode(moved(matrix, points), (32, 32), 2.5 * 1.1), matrix.expand(2, 3, 3)


STRAIGHT = torch.arange(3).expand(2, 3)


def test_the_same_view_agrees_fully():
    maps, _, _ = views(0)
    assert float(disagreement(maps, maps, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), STRAIGHT)) < 1e-20


@pytest.mark.parametrize("mirror", [False, True])
def test_a_network_that_moves_with_the_image_agrees_with_itself(mirror: bool):
    maps, seen, matrix = views(1, mirror)
    good = float(disagreement(maps, seen, matrix, STRAIGHT))
    bad = float(disagreement(maps, maps, matrix, STRAIGHT))
    assert good < 0.02 * bad, "bilinear tolerance"


def test_moved_and_moved_back():
    maps, _, matrix = views(2)
    there, _ = resample(maps, matrix, (32, 32))
    back, shown = resample(there, torch.linalg.inv(matrix), (32, 32))
    both = shown & (resample(torch.ones_like(maps[:, :1]), matrix.inverse(), (32, 32))[0] > 0.999)
    assert ((back - maps).abs() * both).max() < 0.08
    assert both.float().mean() > 0.5


def test_mirrored_views_swap_left_and_right():
    maps, seen, matrix = views(3, mirror=True)
    swapped = seen[:, [1, 0, 2]]  # what a network answers that calls the twins by their side
    order = torch.tensor([1, 0, 2]).expand(2, 3)
    assert float(disagreement(maps, swapped, matrix, order)) == pytest.approx(
        float(disagreement(maps, seen, matrix, STRAIGHT))
    )
    assert float(disagreement(maps, swapped, matrix, STRAIGHT)) > 5 * float(disagreement(maps, swapped, matrix, order))


class Fixed(nn.Module):
    """Answers the maps it was given, whatever comes."""

    def __init__(self, maps: Tensor) -> None:
        super().__init__()
        self.maps = nn.Parameter(maps)

    def forward(self, images: Tensor) -> Tensor:
        return self.maps


def test_the_loss_is_that_of_the_formula_and_masks_what_is_unknown():
    maps = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    points = 31 * torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(5))
    known = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    points[0, 1] = 500.0
    batch = {"images": torch.zeros(2, 3, 32, 32), "points": points, "known": known}
    model = Fixed(maps)
    loss = SubpixelHeatmap(Options(consistency=0)).loss(model, batch)["loss"]
    expected, count = 0.0, 0
    for b, k in zip(*np.nonzero(known.numpy()), strict=True):
        x, y = ((points[b, k] + 0.5) / 4 - 0.5).tolist()
        count += 1
        for i in range(8):
            for j in range(8):
                expected += float(maps[b, k, i, j] - math.exp(-((j - x) ** 2 + (i - y) ** 2) / 8)) ** 2
    assert float(loss) == pytest.approx(expected / count, rel=1e-5)
    loss.backward()
    assert model.maps.grad is not None
    assert (model.maps.grad[known == 0] == 0).all()
    assert (model.maps.grad[known == 1] != 0).any()


def test_two_views_add_their_disagreement():
    maps = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    points = 31 * torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(5))
    matrix = torch.from_numpy(about_centre((32, 32), angle=10)).float()[None].expand(2, 3, 3)
    batch = {
        "images": torch.zeros(2, 3, 32, 32), "points": points[:2], "known": torch.ones(2, 3),
        "view": torch.zeros(2, 3, 32, 32), "view_points": points[2:], "view_known": torch.ones(2, 3),
        "matrix": matrix, "order": STRAIGHT,
    }  # fmt: skip
    found = SubpixelHeatmap(Options(consistency=0.3)).loss(Fixed(maps), batch)
    cells = torch.from_numpy(about_centre((8, 8), angle=10))[None].expand(2, 3, 3)  # the same turn, about the middle
    apart = disagreement(maps[:2], maps[2:], cells, STRAIGHT)
    assert torch.allclose(found["apart"], apart, rtol=1e-4)
    assert torch.allclose(found["loss"], found["heat"] + 0.3 * apart, rtol=1e-5)
    assert SubpixelHeatmap().views() == 2
    assert SubpixelHeatmap(Options(consistency=0)).views() == 1


def test_places_come_in_pixels_of_the_image():
    points = torch.tensor([[[22.25, 40.5], [30.0, 28.0]]])
    maps = encode((points + 0.5) / 4 - 0.5, (16, 16), 2.0)
    found, sure = SubpixelHeatmap().locate(Fixed(maps), torch.zeros(1, 3, 64, 64))
    assert torch.allclose(found, points, atol=0.06)
    assert ((sure > 0.9) & (sure <= 1)).all()


def test_bad_input_is_refused_with_what_to_do():
    with pytest.raises(UsageError, match="window=4: expected an odd number"):
        SubpixelHeatmap(Options(window=4))
    with pytest.raises(UsageError, match=r"sigma=0.3 is below half a cell: the peak falls between cells"):
        SubpixelHeatmap(Options(sigma=0.3))
    with pytest.raises(UsageError, match=r"a window of 9 cells is larger than the map \(8 x 8\)"):
        decode(torch.zeros(1, 8, 8), 9)
    with pytest.raises(DataError, match="int64, expected floats"):
        encode(torch.tensor([[3, 4]]), (8, 8), 2.0)
    with pytest.raises(DataError, match="NaN"):
        encode(torch.tensor([[3.0, math.nan]]), (8, 8), 2.0)
