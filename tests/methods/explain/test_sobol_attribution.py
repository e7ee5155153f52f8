"""sobol-attribution: indices of functions whose indices are known, agreement with scipy, and invariances."""

from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import qmc, rankdata, sobol_indices
from torch import Tensor

from foveal.backbones.wrapper import Scorer
from foveal.core.errors import UsageError
from foveal.methods.explain.sobol_attribution import (
    BLUR,
    SHOWN,
    Options,
    SobolAttribution,
    blurred,
    contexts,
    design,
    effects,
    indices,
    total_order,
)


def weights(d: int, seed: int = 1) -> Tensor:
    """Of alternating sign, so that the first point, all zeros, is no outlier."""
    order = torch.randperm(d, generator=torch.Generator().manual_seed(seed))
    return torch.linspace(0.2, 2.0, d)[order] * (1 - 2 * (torch.arange(d) % 2))


@pytest.mark.parametrize(
    ("d", "points", "error"),
    [(16, 32, 0.1), (16, 64, 0.004), (16, 1024, 0.0015), (64, 32, 0.036), (64, 64, 0.015), (64, 1024, 0.0008)],
)
def test_an_additive_function_has_the_shares_of_its_squared_weights(d: int, points: int, error: float):
    w = weights(d)
    found = indices(lambda m: m.double() @ w.double(), d, points)
    truth = (w**2 / w.square().sum()).double()
    assert (found - truth).abs().max() < error
    assert np.corrcoef(rankdata(found), rankdata(truth))[0, 1] >= 0.96


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([4, 16, 36]))
def test_any_additive_function_at_a_thousand_points(seed: int, d: int):
    w = torch.randn(d, generator=torch.Generator().manual_seed(seed)).double()
    found = indices(lambda m: m.double() @ w, d, 1024)
    assert (found - w**2 / w.square().sum()).abs().max() < 0.005
    assert found.sum() == pytest.approx(1, abs=0.02)


def test_a_zero_first_point_as_outlier_is_avoided_by_scrambling():
    w = weights(16).abs().double()
    truth = w**2 / w.square().sum()
    plain = (indices(lambda m: m.double() @ w, 16, 32) - truth).abs().max()
    drawn = [
        (indices(lambda m: m.double() @ w, 16, 32, scramble=True, seed=seed) - truth).abs().max() for seed in range(9)
    ]
    assert sum(error < plain for error in drawn) >= 5


@pytest.mark.parametrize(("points", "error"), [(64, 0.04), (1024, 0.0015)])
def test_a_product_shares_its_interaction_and_inert_cells_have_none(points: int, error: float):
    found = indices(lambda m: m[:, 2] * m[:, 5], 9, points)
    assert found[[2, 5]].sub(4 / 7).abs().max() < error
    assert (found[[0, 1, 3, 4, 6, 7, 8]] == 0).all()
    assert found.sum() >= 1


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 100), st.booleans(), st.floats(-50, 50), st.sampled_from([8, 32, 128]))
def test_scale_and_offset_of_the_score_change_nothing(scale: float, negative: bool, offset: float, points: int):
    def f(m: Tensor) -> Tensor:
        m = m.double()
        return m[:, 0] * m[:, 1] + m[:, 2].square()

    factor = -scale if negative else scale
    assert torch.allclose(indices(f, 4, points), indices(lambda m: factor * f(m) + offset, 4, points), rtol=1e-6)


def test_indices_are_not_negative_and_sum_to_one_or_more():
    found = indices(lambda m: (m.double() @ weights(9).double()).sin() * m[:, 0], 9, 2048)
    assert (found >= 0).all()
    assert found.sum() >= 1


def test_a_constant_has_no_indices():
    for value in (0.0, 1e-30, 0.7, -3e5):
        assert (indices(lambda m, value=value: torch.full((len(m),), value), 6, 16) == 0).all()


def test_the_points_are_scipys_and_the_first_is_zero():
    rows = design(5, 16)
    drawn = torch.from_numpy(qmc.Sobol(10, scramble=False).random(16)).float()
    assert rows.shape == (16 * 6, 5)
    assert torch.equal(rows[:16], drawn[:, :5])
    for cell in range(5):
        swapped = drawn[:, :5].clone()
        swapped[:, cell] = drawn[:, 5 + cell]
        assert torch.equal(rows[16 * (cell + 1) : 16 * (cell + 2)], swapped)
    assert (rows[::16] == 0).all()
    assert not (design(5, 16, scramble=True, seed=1)[::16] == 0).all()
    assert torch.equal(design(5, 16, scramble=True, seed=1), design(5, 16, scramble=True, seed=1))
    assert not torch.equal(design(5, 16, scramble=True, seed=1), design(5, 16, scramble=True, seed=2))


def test_agrees_with_scipy_once_the_variance_is_the_same():
    d, points = 4, 64
    rows = design(d, points).double()
    B = torch.from_numpy(qmc.Sobol(2 * d, scramble=False).random(points))[:, d:]

    def f(m: Tensor) -> Tensor:
        return m[:, 0] * m[:, 1] + 2 * m[:, 2] + m[:, 3] ** 3

    f_A, f_AB, f_B = f(rows[:points]), f(rows[points:]).reshape(d, points), f(B)
    theirs = sobol_indices(
        func={"f_A": f_A[None].numpy(), "f_B": f_B[None].numpy(), "f_AB": f_AB[:, None].numpy()}, n=points
    )
    pooled = torch.cat([f_A, f_B]).var(correction=0)
    ours = total_order(f(rows), d) * f_A.var(correction=1) / pooled
    assert np.abs(theirs.total_order.ravel() - ours.numpy()).max() < 1e-12


def test_points_that_are_no_power_of_two_are_refused():
    with pytest.raises(UsageError, match="points=48: expected a power of two, such as 32"):
        design(4, 48)
    with pytest.raises(UsageError, match="points=1: expected a power of two, such as 2"):
        design(4, 1)


@pytest.mark.parametrize("points", [1, 4, 16])
def test_effects_of_an_additive_function_are_its_weights(points: int):
    w = weights(9).double()
    rows = contexts(9, points, seed=1)
    assert rows.shape == (points * 10, 9)
    assert set(rows.unique().tolist()) <= {0.0, 1.0}
    assert torch.allclose(effects(3 + rows.double() @ w, rows), w)
    assert torch.allclose(effects(-2 * (rows.double() @ w), rows), -2 * w)


def test_effects_agree_with_one_cell_and_context_at_a_time():
    rows, d, points = contexts(5, 8, seed=2), 5, 8

    def f(m: Tensor) -> Tensor:
        m = m.double()
        return (m[..., 0] * m[..., 1] - m[..., 2]).exp() + m[..., 3] * m[..., 0]

    found = effects(f(rows), rows)
    for cell in range(d):
        changes = []
        for context in rows[:points]:
            shown, hidden = context.clone(), context.clone()
            shown[cell], hidden[cell] = 1, 0
            changes.append(float(f(shown) - f(hidden)))
        assert float(found[cell]) == pytest.approx(np.mean(changes), abs=1e-12)
    assert found[4] == 0


def test_contexts_show_each_cell_as_often_and_effects_are_signed_first_order_indices():
    w = weights(4).double()
    rows = contexts(4, 1024, seed=3)
    A = rows[:1024]
    assert torch.allclose(A.mean(0), torch.tensor(SHOWN), atol=1e-6)
    variance = (A.double() @ w).var(correction=0)
    first = SHOWN * (1 - SHOWN) * effects(rows.double() @ w, rows).square() / variance
    assert torch.allclose(first, w**2 / w.square().sum(), atol=0.02)
    with pytest.raises(UsageError, match="points=3: expected a power of two"):
        contexts(4, 3)


class Counting(Scorer):
    """The probability-like scores of two corners of the image; counts what it is shown."""

    def __init__(self, batch: int = 32) -> None:
        super().__init__(self.corners, (0.2, 0.4, 0.6), batch)
        self.shown: list[Tensor] = []

    def corners(self, images: Tensor) -> Tensor:
        self.shown.append(images)
        first, last = images[:, :, :4, :4].mean((1, 2, 3)), images[:, :, -4:, -4:].mean((1, 2, 3))
        return torch.stack([first, last + 0.1 * first], 1)


def photos(count: int = 2, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def test_the_map_shows_the_corner_that_the_class_rests_on():
    method = SobolAttribution(Options(grid=4))
    maps = method.explain(Counting(), photos(), torch.tensor([0, 1]))
    assert maps.shape == (2, 16, 16)
    assert (maps >= 0).all()
    for map, corner in zip(maps, ((0, 0), (3, 3)), strict=True):
        cells = map.unflatten(0, (4, 4)).unflatten(2, (4, 4)).mean((1, 3))
        assert divmod(int(cells.argmax()), 4) == corner
        assert cells[0 if corner == (3, 3) else 3, 0] < 0.1 * cells.max()


def test_a_corner_that_speaks_against_the_class_is_below_zero():
    model = Scorer(lambda x: torch.stack([x[:, :, :4, :4].mean((1, 2, 3)) - 2 * x[:, :, -4:, -4:].mean((1, 2, 3))], 1))
    model.neutral = torch.zeros(3, 1, 1)
    method = SobolAttribution(Options(grid=4, points=2, index="effect"))
    cells = method.explain(model, photos(1), torch.tensor([0]))[0].unflatten(0, (4, 4)).unflatten(2, (4, 4))
    means = cells.mean((1, 3))
    assert divmod(int(means.argmax()), 4) == (0, 0)
    assert divmod(int(means.argmin()), 4) == (3, 3)
    assert means[3, 3] < -means[0, 0] < 0


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("index", ["total", "effect"])
def test_the_number_of_images_is_as_told_and_the_batch_changes_nothing(batch: int, index: Literal["total", "effect"]):
    method, model = SobolAttribution(Options(grid=3, points=8, index=index)), Counting(batch)
    maps = method.explain(model, photos(), torch.tensor([0, 1]))
    shown = [len(images) for images in model.shown]
    assert sum(shown) == 2 * method.passes() == 2 * 8 * 10
    assert max(shown) <= batch
    assert torch.allclose(maps, method.explain(Counting(), photos(), torch.tensor([0, 1])), atol=1e-6)


def test_cells_are_whole_and_fade_to_the_neutral_colour():
    model, image = Counting(), photos(1)
    SobolAttribution(Options(grid=3, points=4)).explain(model, image, torch.tensor([0]))
    shown = torch.cat(model.shown)
    neutral = model.neutral.expand(3, 16, 16)
    assert torch.allclose(shown[0], neutral), "the first point hides everything"
    strength = (shown - neutral) / (image[0] - neutral)
    edges = [0, 6, 11, 16]  # nearest enlargement of 3 cells to 16 pixels
    for top, bottom in pairwise(edges):
        for left, right in pairwise(edges):
            cell = strength[:, :, top:bottom, left:right].flatten(1)
            assert (cell - cell[:, :1]).abs().max() < 1e-3


def test_a_picture_that_changes_nothing_gives_zeros_and_says_so():
    model = Scorer(lambda images: torch.full((len(images), 2), 0.5))
    with pytest.warns(UserWarning, match="does not change under the perturbation"):
        maps = SobolAttribution(Options(grid=2, points=4)).explain(model, photos(1), torch.tensor([0]))
    assert (maps == 0).all()


def test_blur_is_the_mean_of_a_box_and_keeps_flat_images():
    flat = torch.full((1, 3, 24, 24), 0.3)
    assert torch.allclose(blurred(flat), flat)
    image = photos(1, 24)
    middle = image[0, 1, 12 - BLUR // 2 : 12 - BLUR // 2 + BLUR, 12 - BLUR // 2 : 12 - BLUR // 2 + BLUR].mean()
    assert torch.allclose(blurred(image)[0, 1, 12, 12], middle)
    maps = SobolAttribution(Options(grid=4, points=8, perturb="blur")).explain(Counting(), image, torch.tensor([1]))
    assert maps[0].argmax() >= 24 * 12


def test_bad_input_is_refused_with_what_to_do():
    with pytest.raises(UsageError, match="grid=32: larger than the image, 16 x 16"):
        SobolAttribution(Options(grid=32)).explain(Counting(), photos(1), torch.tensor([0]))
    with pytest.raises(UsageError, match="target 2: the model has 2 classes"):
        SobolAttribution().explain(Counting(), photos(1), torch.tensor([2]))
