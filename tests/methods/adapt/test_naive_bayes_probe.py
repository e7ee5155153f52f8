"""The naive-Bayes probe equals a loop over classes and features, and GaussianNB where it should."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.naive_bayes import GaussianNB

from foveal.blocks.statistics import ClassMoments, class_moments
from foveal.core.errors import DataError
from foveal.methods.adapt.naive_bayes_probe import NaiveBayesProbe, default_eps, naive_bayes, shared_variance


def features(shots: tuple[int, ...] = (30, 20, 10), width: int = 6, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.repeat_interleave(torch.arange(len(shots)), torch.tensor(shots))
    X = torch.randn(len(y), width, generator=generator, dtype=torch.float64) * torch.linspace(0.5, 2, width)
    X[:, : len(shots)] += 1.2 * F.one_hot(y, len(shots))
    return X, y


def rule(X: torch.Tensor, y: torch.Tensor, eps: float = 0.0, weights: torch.Tensor | None = None):
    moments = class_moments(X, y, weights, int(y.max()) + 1)
    return naive_bayes(moments, moments.weight / moments.weight.sum(), eps)


def log_posterior(X: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The rule written as a loop over classes and features."""
    classes, m = int(y.max()) + 1, len(y)
    v = sum((y == k).sum() / m * X[y == k].var(0, correction=0) for k in range(classes))
    scores = []
    for k in range(classes):
        mu = X[y == k].mean(0)
        score = torch.log((y == k).sum().double() / m).expand(len(x)).clone()
        for j in range(X.shape[1]):
            score -= 0.5 * (x[:, j] - mu[j]) ** 2 / v[j]
        scores.append(score)
    return torch.stack(scores, 1).log_softmax(1)


def test_equals_a_loop_over_classes_and_features():
    X, y = features()
    x, _ = features(seed=1)
    weight, bias = rule(X, y)
    assert torch.allclose((x @ weight.T + bias).log_softmax(1), log_posterior(X, y, x), atol=1e-10)


def test_matches_gaussian_nb_exactly_when_classes_spread_alike_and_not_otherwise():
    base, _ = features((40,), seed=2)
    base = (base - base.mean(0)) / base.std(0, correction=0)
    X = torch.cat([base + shift for shift in (0.0, 0.7, -0.4)])
    y = torch.repeat_interleave(torch.arange(3), 40)
    x, _ = features(seed=3)
    weight, bias = rule(X, y)
    ours = (x @ weight.T + bias).softmax(1).numpy()
    theirs = GaussianNB(var_smoothing=0).fit(X.numpy(), y.numpy())
    assert np.abs(ours - theirs.predict_proba(x.numpy())).max() < 1e-9

    X[y == 1] = (X[y == 1] - 0.7) * 3 + 0.7
    weight, bias = rule(X, y)
    theirs = GaussianNB(var_smoothing=0).fit(X.numpy(), y.numpy())
    ours = (x @ weight.T + bias).softmax(1).numpy()
    assert np.abs(ours - theirs.predict_proba(x.numpy())).max() > 0.05


def test_streaming_equals_batch():
    X, y = features()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    X, y = X[order], y[order]
    total: ClassMoments | None = None
    for rows in (slice(40, 60), slice(0, 3), slice(3, 40)):
        block = class_moments(X[rows], y[rows], None, 3)
        total = block if total is None else total.merge(block)
    assert total is not None
    weight, bias = naive_bayes(total, total.weight / total.weight.sum(), 0.0)
    expected = rule(X, y)
    assert torch.allclose(weight, expected[0], rtol=1e-10, atol=1e-13)
    assert torch.allclose(bias, expected[1], rtol=1e-10, atol=1e-13)


def test_rescaling_features_changes_nothing_and_rotating_them_does():
    X, y = features()
    x, _ = features(seed=1)
    weight, bias = rule(X, y)
    expected = (x @ weight.T + bias).softmax(1)
    scale, shift = torch.linspace(0.01, 100, 6).double(), torch.linspace(-5, 5, 6).double()
    weight, bias = rule(X * scale + shift, y)
    assert torch.allclose(((x * scale + shift) @ weight.T + bias).softmax(1), expected, atol=1e-8)

    Q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
    weight, bias = rule(X @ Q, y)
    assert not torch.allclose((x @ Q @ weight.T + bias).softmax(1), expected, atol=1e-3)


def test_duplicates_change_nothing_and_weights_count_images():
    X, y = features()
    assert all(
        torch.allclose(a, b, rtol=1e-9, atol=1e-12)
        for a, b in zip(rule(X.repeat(3, 1), y.repeat(3)), rule(X, y), strict=True)
    )
    weights = torch.ones(len(y))
    weights[:30] = 2
    repeated = rule(torch.cat([X, X[:30]]), torch.cat([y, y[:30]]))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(rule(X, y, weights=weights), repeated, strict=True))


def test_prior_moves_the_bias_alone():
    X, y = features()
    moments = class_moments(X, y, None, 3)
    observed = moments.weight / moments.weight.sum()
    weight, bias = naive_bayes(moments, observed, 1e-9)
    even_weight, even_bias = naive_bayes(moments, torch.full((3,), 1 / 3, dtype=torch.float64), 1e-9)
    assert torch.equal(weight, even_weight)
    assert torch.allclose(bias - even_bias, observed.log() - np.log(1 / 3))


@pytest.mark.parametrize("eps", [0.0, 1e-9])
def test_a_feature_without_variance_contributes_nothing(eps: float):
    X, y = features()
    x, _ = features(seed=1)
    weight, bias = rule(X, y)
    dead = torch.full((len(X), 1), 0.3, dtype=torch.float64)
    weight2, bias2 = rule(torch.cat([X, dead], 1), y, eps)
    scores = torch.cat([x, torch.full((len(x), 1), 0.3, dtype=torch.float64)], 1) @ weight2.T + bias2
    assert torch.isfinite(weight2).all()
    assert torch.allclose(scores.softmax(1), (x @ weight.T + bias).softmax(1), atol=1e-6)


def test_float32_features_far_from_zero_are_accumulated_in_float64():
    X, y = features((2000, 2000))
    far = (X + 1e4).float()
    moments = class_moments(far, y, None, 2)
    expected = torch.stack([far.double()[y == k].var(0, correction=0) for k in range(2)]).mean(0)
    assert torch.allclose(shared_variance(moments), expected, rtol=1e-10)
    head = NaiveBayesProbe().fit_features(far, y, torch.ones(len(y)), seed=0)
    weight, bias = rule(far.double(), y, default_eps(expected))
    agree = head(far).argmax(1) == (far.double() @ weight.T + bias).argmax(1)
    assert agree.double().mean() > 0.99


def test_eps_follows_the_median_so_that_dead_features_do_not_dominate():
    assert default_eps(torch.tensor([0.0, 0.0, 0.0])) == 1e-9
    assert default_eps(torch.tensor([0.1, 2.0, 30.0])) == pytest.approx(2e-3)
    X, y = features()
    X[:, 4] = 0
    X[0, 4] = 1e-3
    head = NaiveBayesProbe().fit_features(X.float(), y, torch.ones(len(y)), seed=0)
    assert head.weight[:, 4].abs().max() < 1


def test_one_image_a_class_falls_back_to_the_total_variance_with_a_warning():
    X, y = features((1, 1, 1))
    with pytest.warns(UserWarning, match="no spread inside any class"):
        head = NaiveBayesProbe().fit_features(X.float(), y, torch.ones(3), seed=0)
    assert torch.isfinite(head.weight).all()
    assert torch.equal(head(X.float()).argmax(1), y)


def test_bad_input_is_refused_with_what_to_do():
    X, y = features()
    weights = torch.ones(len(y))
    with pytest.raises(DataError, match="at least two"):
        NaiveBayesProbe().fit_features(X.float(), y * 0, weights, seed=0)
    with pytest.raises(DataError, match="class 2 has no image"):
        NaiveBayesProbe().fit_features(X.float(), y.where(y != 2, 3), weights, seed=0)
    with pytest.raises(DataError, match="NaN or infinity"):
        NaiveBayesProbe().fit_features(X.float() / 0, y, weights, seed=0)
    with pytest.raises(DataError, match="several labels"):
        NaiveBayesProbe().fit_features(X.float(), F.one_hot(y, 3), weights, seed=0)
