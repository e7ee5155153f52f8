"""Statistics of filters: closed cases, loops, and what must be refused."""

import math

import numpy as np
import pytest
import torch

from foveal.blocks import filters as f
from foveal.core.errors import DataError


def orthogonal(n: int, m: int = 3, k: int = 3) -> torch.Tensor:
    return torch.nn.init.orthogonal_(torch.empty(n, m * k * k)).reshape(n, m, k, k)


def test_rank_of_copies_of_orthogonal_filters_and_of_nothing():
    one = torch.randn(1, 3, 3, 3)
    assert f.effective_rank(one.expand(12, -1, -1, -1)) == pytest.approx(1, abs=1e-9)
    assert f.effective_rank(one * torch.randn(12, 1, 1, 1)) == pytest.approx(1, abs=1e-6)
    assert f.effective_rank(orthogonal(12)) == pytest.approx(12, abs=1e-4)
    assert f.effective_rank(torch.zeros(4, 3, 3, 3)) == 0
    assert f.energy_rank(one.expand(12, -1, -1, -1)) == 1
    assert f.energy_rank(orthogonal(20)) == 20
    assert f.energy_rank(orthogonal(20), 0.94) == 19
    assert f.energy_rank(torch.zeros(4, 3, 3, 3)) == 0


@pytest.mark.parametrize("shape", [(20, 3, 3, 3), (40, 2, 3, 3)])
def test_rank_agrees_with_the_singular_values(shape: tuple[int, ...]):
    bank = torch.randn(shape, dtype=torch.float64)
    values = np.linalg.svd(bank.flatten(1).numpy(), compute_uv=False) ** 2
    share = values / values.sum()
    assert f.effective_rank(bank) == pytest.approx(math.exp(-sum(s * math.log(s) for s in share)), rel=1e-9)
    held, count = 0.0, 0
    while held < 0.95:
        held, count = held + share[count], count + 1
    assert f.energy_rank(bank, 0.95) == count


def test_planted_copies_are_counted_exactly_and_only_within_a_group():
    bank = orthogonal(10)
    planted = torch.cat([bank, -2 * bank[:3], bank[4:5] + 0.01 * bank[5:6], 0.5 * bank[4:5] + 0.5 * bank[6:7]])
    assert f.duplicates(bank) == 0
    assert f.duplicates(planted) == 4
    assert f.identical(planted) == 0
    assert f.identical(torch.cat([bank, bank[:2], bank[:1]])) == 3
    assert f.duplicates(torch.cat([bank, bank])[torch.randperm(20)]) == 10
    depthwise = torch.randn(1, 1, 3, 3).expand(8, -1, -1, -1)
    assert f.duplicates(depthwise, groups=8) == f.identical(depthwise, groups=8) == 0
    assert f.duplicates(depthwise) == f.identical(depthwise) == 7
    two = torch.cat([bank[:4], bank[:4]])
    assert f.duplicates(two, groups=2) == 0, "the second group reads other channels"


def test_overlap_and_sparsity_at_their_ends():
    assert f.orthogonality(3 * orthogonal(9)) < 1e-6
    assert f.orthogonality(torch.ones(9, 1, 3, 3)) == pytest.approx(math.sqrt(72) / 9)
    single = torch.zeros(2, 1, 3, 3)
    single[:, 0, 1, 2] = -4
    assert f.hoyer(single).tolist() == pytest.approx([1, 1])
    assert f.hoyer(torch.full((2, 1, 3, 3), -0.3)).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert f.hoyer(torch.ones(3, 1, 1, 1)).tolist() == [0, 0, 0]


def test_schemes_and_what_suits_an_activation():
    found = f.deviations(50, 200)
    assert found == pytest.approx({"He": 0.2, "Glorot": math.sqrt(2 / 250), "LeCun": math.sqrt(0.02)})
    assert [f.recommended(name) for name in ("relu", "gelu", "tanh", "sigmoid", "", "selu")] == [
        "He", "He", "Glorot", "Glorot", "Glorot", "LeCun",
    ]  # fmt: skip


def test_the_stack_has_the_weights_of_its_layers():
    layers = [torch.nn.Conv2d(8, 16, 3, bias=False)] + [torch.nn.Conv2d(16, 16, 3, bias=False) for _ in range(2)]
    assert f.stacked(7, 8, 16) == sum(each.weight.numel() for each in layers)
    assert f.stacked(5, 12, 12, groups=12) == 2 * 12 * 9


@pytest.mark.parametrize("size", [(3, 3), (4, 7), (1, 5)])
def test_an_outer_product_is_separable_and_a_loop_agrees(size: tuple[int, int]):
    height, width = size
    outer = torch.randn(5, 2, height, 1) * torch.randn(5, 2, 1, width)
    assert f.separability(outer).tolist() == pytest.approx([1] * 5, abs=1e-6)
    assert f.separability(torch.zeros(2, 1, 3, 3)).tolist() == [1, 1]
    assert f.separability(torch.eye(3).expand(1, 1, 3, 3)).tolist() == pytest.approx([1 / 3])
    bank = torch.randn(5, 2, height, width, dtype=torch.float64)
    for kernel, found in zip(bank, f.separability(bank).tolist(), strict=True):
        squares = [np.linalg.svd(channel, compute_uv=False) ** 2 for channel in kernel.numpy()]
        assert found == pytest.approx(sum(s[0] for s in squares) / sum(s.sum() for s in squares))


def wave(angle: float, frequency: float, k: int = 9) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(k) - k // 2, torch.arange(k) - k // 2, indexing="ij")
    turn = math.radians(angle)
    around = torch.exp(-(x.square() + y.square()) / 6.0)
    return torch.sin(2 * math.pi * frequency * (x * math.cos(turn) + y * math.sin(turn)))[None, None] * around


@pytest.mark.parametrize("angle", [0, 30, 90, 135])
def test_the_spectrum_knows_direction_and_frequency_of_a_wave(angle: float):
    found = f.spectrum(wave(angle, 0.25).expand(1, 3, -1, -1))
    assert abs((float(found.orientation[0]) - angle + 90) % 180 - 90) < 3
    assert float(found.coherence[0]) > 0.8
    assert float(found.frequency[0]) == pytest.approx(0.25, abs=0.03)
    assert float(found.dc[0]) < 1e-6
    assert found.oriented() == pytest.approx(float(found.coherence[0]))


def test_the_share_of_the_mean_is_that_of_the_fourier_transform():
    bank = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    power = np.abs(np.fft.fft2(bank.numpy())) ** 2
    expected = power[:, :, 0, 0].sum(1) / power.sum((1, 2, 3))
    found = f.spectrum(bank)
    assert found.dc.numpy() == pytest.approx(expected)
    assert found.energy.numpy() == pytest.approx((1 - expected) * bank.square().sum((1, 2, 3)).numpy())
    constant = f.spectrum(torch.ones(1, 1, 5, 5))
    assert float(constant.dc[0]) == pytest.approx(1)
    assert float(constant.coherence[0]) == pytest.approx(0, abs=1e-9)
    assert float(f.spectrum(torch.zeros(1, 1, 3, 3)).dc[0]) == 0


def test_coarser_textures_are_longer_and_a_constant_image_has_none():
    rng = torch.Generator().manual_seed(0)
    fine = torch.rand(3, 3, 64, 64, generator=rng)
    coarse = torch.nn.functional.interpolate(fine[..., :8, :8], (64, 64), mode="nearest")
    assert f.texture_length(fine).tolist() == [1, 1, 1]
    assert all(4 <= each <= 8 for each in f.texture_length(coarse).tolist())
    with pytest.raises(DataError, match=r"1 of 3 images are one constant colour \(the first is image 1\)"):
        f.texture_length(torch.cat([fine[:1], torch.full((1, 3, 64, 64), 0.4), fine[2:]]))
