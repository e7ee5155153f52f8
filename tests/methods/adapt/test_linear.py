"""Logistic regression on frozen features agrees with scikit-learn's, and chooses its strength inside the rows given."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from foveal.core import catalogue
from foveal.core.errors import DataError, UsageError
from foveal.methods.adapt.linear import Linear, Options


def features(n: int = 200, width: int = 20, classes: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    X = torch.randn(n, width, generator=generator).abs() * torch.linspace(0.2, 4, width)
    X[:, 1] += 0.5 * y
    X[:, 2] -= 0.7 * (y == 0)
    return X, y, torch.rand(n, generator=generator) + 0.5


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("c", [0.01, 1.0])
def test_agrees_with_scikit_learn_at_the_same_c(classes: int, c: float):
    X, y, weights = features(classes=classes)
    head = Linear(Options(c=c)).fit_features(X, y, weights, seed=0)
    scaler = StandardScaler().fit(X.double().numpy())
    Z = scaler.transform(X.double().numpy())
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10000).fit(Z, y.numpy(), sample_weight=weights.numpy())
    ours = head.weight.detach().double().numpy() * scaler.scale_
    expected = theirs.coef_ if classes > 2 else np.concatenate([-theirs.coef_ / 2, theirs.coef_ / 2])
    assert np.abs(ours - expected).max() < 1e-3
    assert np.abs(head(X).softmax(1).detach().numpy() - theirs.predict_proba(Z)).max() < 1e-3


def test_same_seed_same_head_and_nothing_is_changed():
    X, y, weights = features()
    copies = X.clone(), y.clone(), weights.clone()
    first, again = (Linear().fit_features(X, y, weights, seed=5).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(torch.equal(now, then) for now, then in zip((X, y, weights), copies, strict=True))


def test_weights_count_images():
    X, y, _ = features(n=60)
    twice = torch.ones(60)
    twice[:20] = 2
    weighted = Linear(Options(c=0.1)).fit_features(X, y, twice, seed=0)
    moved = (X - X.mean(0)) / X.std(0, correction=0)
    repeated = LogisticRegression(C=0.1, tol=1e-10, max_iter=10000)
    repeated.fit(torch.cat([moved, moved[:20]]).numpy(), torch.cat([y, y[:20]]).numpy())
    assert np.abs(weighted(X).softmax(1).detach().numpy() - repeated.predict_proba(moved.numpy())).max() < 1e-3


def test_several_labels_give_one_sigmoid_each():
    X, y, weights = features()
    several = torch.stack([y == 0, X[:, 5] > X[:, 5].median()], 1).to(torch.int64)
    head = Linear().fit_features(X, several, weights, seed=0)
    correct = (head(X).sigmoid() > 0.5).long() == several
    assert head.weight.shape == (2, 20)
    assert (correct.float().mean(0) > 0.8).all()


def test_head_loads_what_fit_features_returned():
    X, y, weights = features()
    fitted = Linear().fit_features(X, y, weights, seed=0)
    state = fitted.state_dict()
    empty = Linear().head({key: value.shape for key, value in state.items()})
    empty.load_state_dict(state)
    assert torch.equal(empty(X), fitted(X))


def test_wrong_options_and_rows_are_refused_with_what_to_do():
    with pytest.raises(UsageError, match="c=-1"):
        catalogue.create("linear:c=-1")
    X, y, weights = features()
    with pytest.raises(DataError, match="at least two"):
        Linear().fit_features(X, y * 0, weights, seed=0)
    X[3, 4] = torch.inf
    with pytest.raises(DataError, match="NaN or infinity"):
        Linear().fit_features(X, y, weights, seed=0)
