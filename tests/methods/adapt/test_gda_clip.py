"""GDA-CLIP without text equals shrunk linear discriminant analysis, written twice."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.covariance import shrunk_covariance
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from foveal.core.errors import DataError
from foveal.methods.adapt.gda_clip import GdaClip, Options, Statistics, discriminant, precision_cholesky


def unit_features(shots: tuple[int, ...] = (12, 12, 12), width: int = 10, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.repeat_interleave(torch.arange(len(shots)), torch.tensor(shots))
    x = torch.randn(len(y), width, generator=generator, dtype=torch.float64) + 1
    x[:, :3] += 1.5 * F.one_hot(y, len(shots))[:, :3]
    order = torch.randperm(len(y), generator=generator)
    return F.normalize(x[order]), y[order]


def uniform(classes: int) -> torch.Tensor:
    return torch.full((classes,), 1 / classes, dtype=torch.float64)


def statistics(x: torch.Tensor, y: torch.Tensor, classes: int = 3) -> Statistics:
    return Statistics.of(x, y, torch.ones(len(x)), classes)


def naive(x: torch.Tensor, y: torch.Tensor, classes: int = 3):
    """The paper's formulas in numpy, with an explicit inverse."""
    X, labels = x.numpy(), y.numpy()
    mu = np.stack([X[labels == c].mean(0) for c in range(classes)])
    Z = X - mu[labels]
    N, D = X.shape
    S = Z.T @ Z / (N - 1)
    P = D * np.linalg.inv((N - 1) * S + np.trace(S) * np.eye(D))
    W = P @ mu.T
    b = np.log(1 / classes) - 0.5 * np.einsum("cd,de,ce->c", mu, P, mu)
    return S, P, W, b


def test_equals_the_formulas_with_an_explicit_inverse():
    x, y = unit_features()
    _, _, W, b = naive(x, y)
    ours, bias = discriminant(statistics(x, y), uniform(3))
    assert np.abs(ours.numpy() - W).max() < 1e-9 * np.abs(W).max()
    assert np.abs(bias.numpy() - b).max() < 1e-9 * np.abs(b).max()


@pytest.mark.parametrize("shots", [(4, 4, 4), (40, 40, 40), (30, 9, 5)])
def test_precision_is_the_inverse_of_a_shrunk_covariance(shots: tuple[int, ...]):
    x, y = unit_features(shots)
    N, D = x.shape
    S, P, _, _ = naive(x, y)
    factor = precision_cholesky(statistics(x, y).scatter, N)
    ours = torch.cholesky_inverse(factor).numpy()
    s = D / (N - 1 + D)
    expected = s * np.linalg.inv(shrunk_covariance(S, s))
    assert np.abs(ours - expected).max() < 1e-10 * np.abs(expected).max()
    assert np.abs(ours - P).max() < 1e-10 * np.abs(P).max()
    assert np.linalg.eigvalsh(ours).min() > 0


def test_balanced_classes_equal_scikit_learns_shrunk_lda():
    x, y = unit_features()
    N, D = x.shape
    s = D / (N - 1 + D)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s, priors=[1 / 3] * 3).fit(x.numpy(), y.numpy())
    W, b = discriminant(statistics(x, y), uniform(3))
    assert np.array_equal((x @ W + b).argmax(1).numpy(), theirs.predict(x.numpy()))
    assert np.abs(W.T.numpy() - s * (N - 1) / N * theirs.coef_).max() < 1e-9 * np.abs(theirs.coef_).max()


def test_unbalanced_classes_equal_scikit_learns_without_its_priors():
    x, y = unit_features((30, 9, 5))
    N, D = x.shape
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=D / (N - 1 + D)).fit(x.numpy(), y.numpy())
    scores = x.numpy() @ theirs.coef_.T + theirs.intercept_ - np.log(theirs.priors_)
    W, b = discriminant(statistics(x, y), uniform(3))
    # the covariances differ by the factor N / (N - 1): the scores agree up to that scale
    scale = D / (N - 1 + D) * (N - 1) / N
    ours = (x @ W + b).numpy() / scale
    assert np.abs((ours - ours[:, :1]) - (scores - scores[:, :1])).max() < 1e-6


@pytest.mark.parametrize("cut", [1, 13, 35])
def test_streamed_statistics_give_the_same_classifier_in_any_order(cut: int):
    x, y = unit_features()
    whole = discriminant(statistics(x, y), uniform(3))
    first, second = statistics(x[:cut], y[:cut]), statistics(x[cut:], y[cut:])
    for merged in (first.merge(second), second.merge(first)):
        W, b = discriminant(merged, uniform(3))
        assert torch.allclose(W, whole[0], rtol=1e-10, atol=1e-9)
        assert torch.allclose(b, whole[1], rtol=1e-10, atol=1e-9)


def test_a_class_is_added_without_the_old_images():
    x, y = unit_features()
    old = statistics(x[y < 2], y[y < 2])
    W, b = discriminant(old.merge(statistics(x[y == 2], y[y == 2])), uniform(3))
    expected, bias = discriminant(statistics(x, y), uniform(3))
    assert torch.allclose(W, expected, rtol=1e-10, atol=1e-9)
    assert torch.allclose(b, bias, rtol=1e-10, atol=1e-9)


def test_rotating_the_features_rotates_the_weights():
    x, y = unit_features()
    Q = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
    W, b = discriminant(statistics(x, y), uniform(3))
    rotated, bias = discriminant(statistics(x @ Q, y), uniform(3))
    assert torch.allclose(rotated, Q.T @ W, atol=1e-9 * float(W.abs().max()))
    assert torch.allclose(bias, b, atol=1e-9 * float(b.abs().max()))


def test_float32_features_agree_with_float64_at_full_width():
    x, y = unit_features((60, 60, 60), width=1280)
    W, b = discriminant(statistics(x, y), uniform(3))
    V, a = discriminant(statistics(x.float(), y), uniform(3))
    assert float(((x @ W + b) - (x @ V + a)).abs().max()) < 1e-3


def test_the_head_gives_the_formula_on_raw_features_of_any_scale():
    x, y = unit_features()
    raw = (x * torch.linspace(0.1, 50, len(x))[:, None]).float()
    head = GdaClip().fit_features(raw, y, torch.ones(len(x)), seed=0)
    W, b = discriminant(statistics(x, y), uniform(3))
    assert torch.allclose(head(raw).softmax(1), (x @ W + b).softmax(1).float(), atol=1e-4)
    state = head.state_dict()
    empty = GdaClip().head({key: value.shape for key, value in state.items()})
    empty.load_state_dict(state)
    assert torch.equal(empty(raw), head(raw))


def test_observed_prior_adds_its_logarithm():
    x, y = unit_features((30, 6, 6))
    weights = torch.ones(len(x))
    given = GdaClip(Options(prior="observed")).fit_features(x.float(), y, weights, seed=0)
    equal = GdaClip().fit_features(x.float(), y, weights, seed=0)
    shift = (given(x.float()) - equal(x.float())).detach()[0]
    assert torch.allclose(shift - shift[1], torch.tensor([np.log(5), 0, 0]).float(), atol=1e-3)


def test_one_image_a_class_is_the_nearest_mean_with_a_warning():
    x, y = unit_features((1, 1, 1))
    with pytest.warns(UserWarning, match="no spread"):
        head = GdaClip().fit_features(x.float(), y, torch.ones(3), seed=0)
    queries, _ = unit_features((20, 20, 20), seed=1)
    nearest = torch.cdist(queries, x).argmin(1)
    assert torch.equal(head(queries.float()).argmax(1), y[nearest])


def test_bad_input_is_refused_with_what_to_do():
    x, y = unit_features()
    weights = torch.ones(len(x))
    with pytest.raises(DataError, match="class 1 has no image"):
        GdaClip().fit_features(x.float(), y.where(y != 1, 0), weights, seed=0)
    with pytest.raises(DataError, match="several labels"):
        GdaClip().fit_features(x.float(), F.one_hot(y, 3), weights, seed=0)
    with pytest.raises(DataError, match="NaN"):
        GdaClip().fit_features(x.float().where(x < 0.5, torch.nan), y, weights, seed=0)
