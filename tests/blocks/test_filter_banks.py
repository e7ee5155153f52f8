"""Banks without labels: orthonormal where they must be, folded exactly, and refused where nothing can be learnt."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.blocks import dictionaries as made
from foveal.blocks.filter_banks import KINDS, Bank, install, learn, normalised, patches, quadrants, zca
from foveal.core.errors import BackboneError, DataError, UsageError


def images(count: int = 12, channels: int = 3, size: int = 24, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, size // 3, size // 3, generator=rng)
    fine = F.interpolate(coarse, (size, size), mode="bilinear")
    return (0.8 * fine + 0.2 * torch.rand(count, channels, size, size, generator=rng)).clamp(0, 1)


def unfolded(x: Tensor, size: int) -> Tensor:
    """Patches of every place in order, [B * places, d]."""
    return F.unfold(x, size).transpose(1, 2).flatten(0, 1)


def test_patches_are_places_of_the_images_and_drawn_by_seed():
    x = images(2, 3, 8)
    known = {tuple(row.tolist()) for row in unfolded(x, 3)}
    found = patches(x, 3, 50, seed=1)
    assert found.shape == (50, 27)
    assert all(tuple(row.tolist()) in known for row in found)
    assert torch.equal(found, patches(x, 3, 50, seed=1))
    assert not torch.equal(found, patches(x, 3, 50, seed=2))
    assert len(patches(x, 3, 10_000)) == 2 * 6 * 6


def test_normalised_patches_have_no_mean_and_nearly_unit_variance():
    x = 5 * torch.randn(10, 27) + 3
    found = normalised(x)
    assert found.mean(1).abs().max() < 1e-5
    assert found.var(1, correction=0).numpy() == pytest.approx(1, abs=1e-3)
    assert torch.equal(normalised(torch.full((1, 27), 0.3)).abs() < 1e-6, torch.ones(1, 27, dtype=torch.bool))


@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_whitened_patches_have_the_identity_as_covariance_within_eps(eps: float):
    x = torch.randn(4000, 12, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.linspace(0.5, 2, 12)) + 1
    whitening = zca(x, eps)
    values, vectors = np.linalg.eigh(np.cov(x.double().numpy().T, bias=True))
    expected = vectors @ np.diag(values / (values + eps * values.mean())) @ vectors.T
    found = np.cov(whitening(x).double().numpy().T, bias=True)
    assert np.abs(found - expected).max() < 1e-4
    if eps < 1e-6:
        assert np.abs(found - np.eye(12)).max() < 1e-4
    assert torch.allclose(whitening.matrix, whitening.matrix.T, atol=1e-6)
    assert whitening(x).mean(0).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_every_bank_has_unit_rows_and_the_same_seed_gives_the_same(kind):
    bank = learn(images(), kind, 16, 5, count=800, seed=3)
    assert bank.pictures().shape == (16, 3, 5, 5)
    assert bank.filters.norm(dim=1).tolist() == pytest.approx([1] * 16, abs=1e-5)
    assert torch.equal(bank.filters, learn(images(), kind, 16, 5, count=800, seed=3).filters)
    assert bool(bank.filters.isfinite().all())


def test_pca_and_dct_are_orthonormal_and_pca_comes_by_variance():
    x = normalised(patches(images(), 5, 3000))
    pca = made.pca_filters(x, 20)
    assert (pca @ pca.T - torch.eye(20)).abs().max() < 1e-5
    variances = (x @ pca.T).var(0, correction=0)
    assert bool((variances.diff() <= 1e-5).all())
    top = np.linalg.svd(x.double().numpy() - x.double().numpy().mean(0), full_matrices=False)[2][0]
    assert abs(float(torch.from_numpy(top).float() @ pca[0])) == pytest.approx(1, abs=1e-4)
    dct = made.dct_filters(75, (3, 5, 5))
    assert (dct @ dct.T - torch.eye(75)).abs().max() < 1e-5
    assert dct[0].std() < 1e-6, "the lowest is constant"


def test_gabor_has_no_mean_in_any_channel_and_eight_directions():
    from foveal.blocks.filters import spectrum

    bank = made.gabor_filters(48, (3, 9, 9)).reshape(48, 3, 9, 9)
    assert bank.sum((2, 3)).abs().max() < 1e-5
    assert torch.equal(bank[:, 0], bank[:, 2])
    turns = spectrum(bank[16:32:2]).orientation
    assert sorted(round(float(each) / 22.5) % 8 for each in turns) == list(range(8))


def naive_kmeans(x: Tensor, n: int, seed: int, iterations: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, x.shape[1], generator=rng)
    rows = [row / row.norm() for row in rows]
    for _ in range(iterations):
        gathered = [row.clone() for row in rows]
        for patch in x:
            scores = [float(patch @ row) for row in rows]
            best = max(range(n), key=lambda k: abs(scores[k]))
            gathered[best] += scores[best] * patch
        rows = [row / row.norm() for row in gathered]
    return torch.stack(rows)


def test_kmeans_is_the_damped_loop():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    assert torch.allclose(made.kmeans_filters(x, 5, 2, 4), naive_kmeans(x, 5, 2, 4), atol=1e-4)


def test_kmeans_ica_and_the_autoencoder_find_planted_directions():
    rng = np.random.default_rng(0)
    planted = np.linalg.qr(rng.normal(size=(8, 8)))[0][:4]
    codes = rng.laplace(size=(4000, 4)) * (rng.random((4000, 4)) < 0.25)
    x = torch.from_numpy(codes @ planted + 0.01 * rng.normal(size=(4000, 8))).float()
    directions = torch.from_numpy(planted).float().T
    for learnt in (made.kmeans_filters(x, 12, 1, 50), made.ica_filters(x, 4)):
        assert float((learnt @ directions).abs().amax(0).min()) > 0.9
    inside = (made.autoencoder_filters(x, 4) @ directions).square().sum(1)
    assert float(inside.min()) > 0.95, "an autoencoder of 4 units spans the 4 directions"


def test_neighbours_on_a_map_are_alike():
    x = normalised(patches(images(), 5, 3000))
    grid = made.som_filters(x, 36).reshape(6, 6, -1)
    beside = (grid[:, 1:] * grid[:, :-1]).sum(2).mean()
    everything = grid.reshape(36, -1)
    assert float(beside) > float((everything @ everything.T).mean()) + 0.2


@pytest.mark.parametrize("kind", ["kmeans", "ica", "random"])
def test_whitening_folds_into_one_convolution_exactly(kind):
    x = images()
    bank = learn(x, kind, 16, 5, whiten=True, contrast=False, count=3000)
    assert bank.whitening is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conv = install(nn.Conv2d(3, 16, 5, stride=2, bias=False), bank)
    expected = bank.whitening(unfolded(x, 5)) @ bank.filters.T
    found = conv(x)
    assert found.shape[-1] == 10
    whole = expected.reshape(len(x), 20, 20, 16).permute(0, 3, 1, 2)[..., ::2, ::2]
    assert float((found - whole).detach().abs().max()) < 1e-4
    inside = nn.Conv2d(16, 16, 5)
    with pytest.raises(BackboneError, match=r"16 x 16 x 5 x 5 .* the bank 16 x 3 x 5 x 5"):
        install(inside, bank)


def test_without_folding_the_filters_alone_go_in_and_the_argument_stays():
    bank = learn(images(), "kmeans", 8, 3, count=2000)
    conv = nn.Conv2d(3, 8, 3, padding=1)
    before = conv.weight.detach().clone()
    plain = install(conv, bank, fold_zca=False)
    assert torch.equal(plain.weight, bank.pictures())
    assert not plain.bias.any()
    assert plain.padding == (1, 1)
    assert torch.equal(conv.weight, before)
    with pytest.warns(UserWarning, match="divided by their own deviation, which no convolution can do"):
        install(conv, bank)


def test_normalised_patches_fold_up_to_the_division():
    """Where all patches have one deviation, nothing is lost."""
    rng = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (1200, 1, 4, 4), generator=rng).float()
    balanced = signs[(signs.sum((1, 2, 3)) == 8)]
    bank = learn(balanced, "kmeans", 6, 4, count=4000)
    with pytest.warns(UserWarning, match="it divides by"):
        conv = install(nn.Conv2d(1, 6, 4), bank)
    assert bank.whitening is not None
    expected = bank.whitening(normalised(balanced.flatten(1))) @ bank.filters.T
    assert float((conv(balanced).flatten(1) - expected).detach().abs().max()) < 1e-4


def test_quadrants_are_sums_over_quarters():
    conv = nn.Conv2d(1, 4, 3)
    x = torch.rand(3, 1, 10, 10)
    maps = conv(x).relu()
    expected = torch.stack([maps[..., a : a + 4, b : b + 4].sum((2, 3)) for a in (0, 4) for b in (0, 4)], 2).flatten(1)
    assert torch.allclose(quadrants(x, conv, batch=2), expected, atol=1e-4)


def test_what_cannot_be_learnt_is_refused():
    x = images()
    with pytest.raises(DataError, match=r"128 patches of 27 numbers: a covariance needs at least 135 \(5 for each"):
        zca(torch.randn(128, 27))
    with pytest.raises(DataError, match="all 4 images are constant: zero variance"):
        learn(torch.rand(4, 3, 1, 1).expand(-1, -1, 16, 16))
    with pytest.raises(DataError, match="all 200 patches are alike"):
        zca(torch.full((200, 3), 0.5))
    with pytest.raises(DataError, match="900 centroids from 800 patches: expected at most as many"):
        learn(x, "kmeans", 900, 3, count=800)
    with pytest.raises(DataError, match="a map of 900 units from 800 patches"):
        learn(x, "som", 900, 3, count=800)
    with pytest.raises(DataError, match="24 x 24 are smaller than a patch of 31 x 31"):
        learn(x, size=31)
    with pytest.raises(UsageError, match="40 pca filters of 27 numbers: there are only 27 directions"):
        learn(x, "pca", 40, 3)
    with pytest.raises(UsageError, match="no bank 'sift': expected one of kmeans, pca"):
        learn(x, "sift")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="0 filters of 3 x 3"):
        learn(x, filters=0, size=3)


def test_what_cannot_be_installed_into_is_refused():
    bank = Bank("random", torch.eye(27)[:6], (3, 3, 3))
    with pytest.raises(BackboneError, match="has 3 groups"):
        install(nn.Conv2d(3, 6, 3, groups=3), bank)
    with pytest.raises(BackboneError, match=r"into an nn\.Conv2d, not into ConvTranspose2d"):
        install(nn.ConvTranspose2d(3, 6, 3), bank)  # type: ignore[arg-type]
    with pytest.raises(BackboneError, match="learn the bank with filters=8, size=3 on images of 3 channels"):
        install(nn.Conv2d(3, 8, 3), bank)
