"""Batched logistic regression agrees with scikit-learn's, column by column."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from foveal.blocks import logistic
from foveal.blocks.logistic import GRID, Scaling, Targets, choose_c, logistic_regression, minimise, stratified_folds


def problem(n: int = 150, width: int = 12, classes: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=generator)
    X = torch.randn(n, width, generator=generator) * torch.linspace(0.1, 5, width) + torch.linspace(-3, 3, width)
    X[:, 0] += 0.2 * y
    X[:, 1] -= 0.3 * (y == 1)
    weights = torch.rand(n, generator=generator) + 0.5
    return X, y, weights


def standardised(X: torch.Tensor) -> np.ndarray:
    return ((X.double() - X.double().mean(0)) / X.double().std(0, correction=0)).numpy()


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("c", [1e-3, 0.1, 10.0])
def test_coefficients_equal_scikit_learns(classes: int, c: float):
    X, y, weights = problem(classes=classes)
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10000)
    theirs.fit(standardised(X), y.numpy(), sample_weight=weights.double().numpy())
    scaling, targets = Scaling.of(X), Targets.of(y, classes)
    theta, _ = minimise(X, targets, weights[None], torch.tensor([c]), scaling, tolerance=1e-6)
    scale = np.abs(theirs.coef_).max()
    assert np.abs(theta[0, :, :-1].numpy() - theirs.coef_).max() < 1e-3 * scale
    ours = theta[0, :, -1].numpy()
    centred = ours - ours.mean() if classes > 2 else ours
    assert np.abs(centred - (theirs.intercept_ - theirs.intercept_.mean() * (classes > 2))).max() < 1e-2

    fitted = logistic_regression(X, y, weights, classes, c=c, tolerance=1e-6)
    probabilities = (X @ fitted.weight.T + fitted.bias).softmax(1).numpy()
    assert np.abs(probabilities - theirs.predict_proba(standardised(X))).max() < 1e-3


def test_several_labels_are_independent_problems():
    X, y, weights = problem()
    several = torch.stack([y == 0, y == 2, X[:, 3] > 0], 1).to(torch.uint8)
    fitted = logistic_regression(X, several, weights, 3, c=0.1, tolerance=1e-6)
    for column in range(3):
        theirs = LogisticRegression(C=0.1, tol=1e-10, max_iter=10000)
        theirs.fit(standardised(X), several[:, column].numpy(), sample_weight=weights.double().numpy())
        p = (X @ fitted.weight[column] + fitted.bias[column]).sigmoid().numpy()
        assert np.abs(p - theirs.predict_proba(standardised(X))[:, 1]).max() < 1e-3


@pytest.mark.parametrize("several", [False, True])
def test_fewer_rows_than_features_are_solved_in_their_span_to_the_same(several: bool):
    X, y, weights = problem(n=30, width=100)
    X[:, 5], X[7] = 1.0, X[6]  # a constant feature, and rows that do not span all their dimensions
    labels = torch.stack([y == 0, y == 1, y != 1], 1).to(torch.uint8) if several else y
    scaling, targets = Scaling.of(X), Targets.of(labels, 3)
    theta, logits = minimise(X, targets, weights[None], torch.tensor([0.3]), scaling, tolerance=1e-7)
    fitted = logistic_regression(X, labels, weights, 3, c=0.3, tolerance=1e-7)
    expected = theta[0, :, :-1] * scaling.inverse
    assert (fitted.weight - expected).abs().max() < 1e-3 * expected.abs().max()
    assert torch.allclose(X @ fitted.weight.T + fitted.bias, logits[0].T, atol=2e-3)
    assert (fitted.weight[:, 5] == 0).all()


def test_gradient_vanishes_at_the_solution_by_autograd():
    X, y, weights = problem()
    scaling, targets = Scaling.of(X), Targets.of(y, 3)
    theta, _ = minimise(X, targets, weights[None], torch.tensor([0.5]), scaling, tolerance=1e-6)
    W = theta[0, :, :-1].double().requires_grad_()
    b = theta[0, :, -1].double().requires_grad_()
    z = torch.from_numpy(standardised(X)) @ W.T + b
    loss = (torch.nn.functional.cross_entropy(z, y, reduction="none") * weights).sum() + W.square().sum() / (2 * 0.5)
    gradients = torch.autograd.grad(loss, [W, b])
    assert max(float(g.abs().max()) for g in gradients) < 1e-5 * float(weights.sum())


def test_problems_solved_together_equal_problems_solved_alone():
    X, y, weights = problem()
    scaling, targets = Scaling.of(X), Targets.of(y, 3)
    left_out = weights * (torch.arange(len(y)) % 4 > 0)
    batch, logits = minimise(
        X, targets, torch.stack([weights, left_out]), torch.tensor([0.01, 1.0]), scaling, tolerance=1e-6
    )
    for index, (w, c) in enumerate([(weights, 0.01), (left_out, 1.0)]):
        alone, _ = minimise(X, targets, w[None], torch.tensor([c]), scaling, tolerance=1e-6)
        assert torch.allclose(batch[index], alone[0], atol=2e-3 * float(alone.abs().max()))
    standard = torch.from_numpy(standardised(X)).float()
    expected = torch.einsum("pkd,nd->pkn", batch[..., :-1], standard) + batch[..., -1:]
    assert torch.allclose(logits, expected, atol=1e-3)


def test_left_out_rows_and_duplicated_rows_count_as_their_weight():
    X, y, weights = problem()
    keep = torch.arange(len(y)) % 3 > 0
    scaling = Scaling.of(X)
    masked, _ = minimise(X, Targets.of(y, 3), (weights * keep)[None], torch.tensor([0.1]), scaling, tolerance=1e-6)
    removed, _ = minimise(
        X[keep], Targets.of(y[keep], 3), weights[keep][None], torch.tensor([0.1]), scaling, tolerance=1e-6
    )
    assert torch.allclose(masked, removed, atol=1e-4)


def test_constant_and_scaled_features_do_no_harm():
    X, y, weights = problem()
    plain = logistic_regression(X, y, weights, 3, c=0.1, tolerance=1e-6)
    odd = torch.cat([X * 100 + 3, torch.full((len(X), 1), 0.3)], 1)
    fitted = logistic_regression(odd, y, weights, 3, c=0.1, tolerance=1e-6)
    assert torch.equal(fitted.weight[:, -1], torch.zeros(3))
    p, q = (X @ plain.weight.T + plain.bias).softmax(1), (odd @ fitted.weight.T + fitted.bias).softmax(1)
    assert torch.allclose(p, q, atol=1e-3)


def test_choice_of_c_never_scores_a_row_with_a_model_that_saw_it():
    """With labels that are pure noise, held-out logits must be no better than chance; in-sample ones would be."""
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(120, 400, generator=generator), torch.arange(120) % 2
    tuned = choose_c(X, y, torch.ones(120), 2, Scaling.of(X), seed=0)
    assert tuned.logits.shape == (120, 2)
    assert abs(float((tuned.logits.argmax(1) == y[tuned.rows]).float().mean()) - 0.5) < 0.15
    assert tuned.c < 0.01, "noise calls for a strong penalty"


def test_choice_of_c_matches_an_exhaustive_search_with_scikit_learn():
    X, y, weights = problem(n=240, width=40, classes=2)
    tuned = choose_c(X, y, weights, 2, Scaling.of(X), seed=4)
    fold, Z = stratified_folds(y, 3, 4).numpy(), standardised(X)
    losses = []
    for c in GRID:
        p = np.zeros(len(y))
        for f in range(3):
            model = LogisticRegression(C=c, tol=1e-6, max_iter=5000)
            model.fit(Z[fold != f], y.numpy()[fold != f], sample_weight=weights.numpy()[fold != f])
            p[fold == f] = model.predict_proba(Z[fold == f])[np.arange((fold == f).sum()), y.numpy()[fold == f]]
        losses.append(-(np.log(p) * weights.numpy()).mean())
    assert losses[GRID.index(tuned.c)] < min(losses) + 0.01


def test_many_classes_and_many_rows_take_the_short_way(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logistic, "TUNING_ROWS", 200)
    X, y, weights = problem(n=600, classes=60, width=30)
    X[:, :30] += 3 * torch.nn.functional.one_hot(y % 30, 30)
    tuned = choose_c(X, y, weights, 60, Scaling.of(X), seed=0)
    assert len(tuned.rows) < 100
    assert tuned.logits.shape == (len(tuned.rows), 60)
    assert tuned.c in GRID
    assert logistic_regression(X, y, weights, 60).weight.shape == (60, 30)


def test_folds_spread_every_class_evenly_and_follow_the_seed():
    y = torch.tensor([0] * 30 + [1] * 9 + [2] * 3)
    fold = stratified_folds(y, 3, 7)
    assert [torch.bincount(fold[y == c], minlength=3).tolist() for c in range(3)] == [[10] * 3, [3] * 3, [1] * 3]
    assert torch.equal(fold, stratified_folds(y, 3, 7))
    assert not torch.equal(fold, stratified_folds(y, 3, 8))


def test_separable_classes_give_finite_weights():
    X = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]])
    y = torch.tensor([0, 0, 1, 1])
    fitted = logistic_regression(X, y, torch.ones(4), 2)
    assert torch.isfinite(fitted.weight).all()
    assert torch.equal((X @ fitted.weight.T + fitted.bias).argmax(1), y)
