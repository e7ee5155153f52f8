"""The vote equals scikit-learn's, the mix is what its equation says, and tuning looks at no row's own label."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from foveal.core import catalogue
from foveal.core.errors import DataError, UsageError
from foveal.methods.adapt import nn_revisit
from foveal.methods.adapt.nn_revisit import (
    Datastore,
    NeighbourMix,
    NnRevisit,
    Options,
    focal_factor,
    mixed,
    nearest,
    regularised_factor,
    tune,
    vote,
)


def features(n: int = 120, width: int = 8, classes: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    X = torch.randn(n, width, generator=generator, dtype=dtype) + 2
    X[:, :classes] += 1.5 * F.one_hot(y, classes)
    return X, y


def l2nc(X: torch.Tensor, mean: torch.Tensor) -> np.ndarray:
    return F.normalize(X - mean).numpy()


def probabilities(X, y, q, k: int, T: float, classes: int = 3) -> torch.Tensor:
    similarity, rows = nearest(Datastore.of(X, "l2nc"), q, k)
    return vote(similarity, F.one_hot(y, classes)[rows], T)


@pytest.mark.parametrize("k", [1, 5, 120])
@pytest.mark.parametrize("T", [0.01, 0.1, 1.0])
def test_vote_equals_scikit_learns(k: int, T: float):
    X, y = features()
    q, _ = features(n=40, seed=1)
    theirs = KNeighborsClassifier(k, weights=lambda d: np.exp(-(d**2) / T), algorithm="brute")
    theirs.fit(l2nc(X, X.mean(0)), y.numpy())
    expected = theirs.predict_proba(l2nc(q, X.mean(0)))
    ours = probabilities(X, y, q, k, T).numpy()
    assert np.abs(ours - expected).max() < 1e-6
    assert np.array_equal(ours.argmax(1), expected.argmax(1))


def test_head_in_float32_equals_scikit_learns_mix():
    X, y = features(dtype=torch.float32)
    q, _ = features(n=40, seed=1, dtype=torch.float32)
    head = NnRevisit(Options(k=7, temperature=0.2, mix=0.3)).fit_features(X, y, torch.ones(len(y)), seed=0)
    assert isinstance(head, NeighbourMix)
    theirs = KNeighborsClassifier(7, weights=lambda d: np.exp(-(d**2) / 0.2), algorithm="brute")
    theirs.fit(l2nc(X, X.mean(0)), y.numpy())
    vote_ = torch.from_numpy(theirs.predict_proba(l2nc(q, X.mean(0))))
    expected = 0.3 * vote_ + 0.7 * head.linear(q).softmax(1)
    assert torch.allclose(head(q).softmax(1).double(), expected, atol=1e-5)
    assert torch.allclose(head(q).exp().sum(1), torch.ones(40), atol=1e-5)


def test_mix_zero_is_the_classifier_and_mix_one_the_vote():
    X, y = features(dtype=torch.float32)
    ones = torch.ones(len(y))
    plain = NnRevisit(Options(mix=0)).fit_features(X, y, ones, seed=0)
    linear = catalogue.create("linear").fit_features(X, y, ones, seed=0)  # pyright: ignore[reportAttributeAccessIssue]
    assert type(plain) is nn.Linear
    assert torch.equal(plain(X), linear(X))
    pure = NnRevisit(Options(k=5, temperature=0.1, mix=1)).fit_features(X, y, ones, seed=0)
    assert torch.allclose(pure(X).softmax(1), probabilities(X, y, X, 5, 0.1), atol=1e-5)
    assert torch.isfinite(pure(X)).all()


def test_the_mix_lies_between_its_parts_for_every_class():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(20, 4, generator=generator).softmax(1), torch.rand(20, 4, generator=generator).softmax(1)
    for mix in (0.0, 0.2, 0.9, 1.0):
        p = mixed(a, b, mix)
        assert ((p >= torch.minimum(a, b) - 1e-7) & (p <= torch.maximum(a, b) + 1e-7)).all()
        assert torch.allclose(p.sum(1), torch.ones(20))


def test_temperature_limits_are_a_plain_count_and_the_nearest_label():
    X, y = features()
    q, _ = features(n=30, seed=1)
    _, rows = nearest(Datastore.of(X, "l2nc"), q, 9)
    counts = F.one_hot(y[rows], 3).double().mean(1)
    assert torch.allclose(probabilities(X, y, q, 9, 1e9), counts, atol=1e-6)
    closest = F.one_hot(y[rows[:, 0]], 3).double()
    assert torch.allclose(probabilities(X, y, q, 9, 1e-9), closest, atol=1e-6)
    assert torch.equal(probabilities(X, y, q, 1, 1.0), closest)


def test_raw_distances_in_the_thousands_neither_overflow_nor_give_nan():
    similarity = torch.tensor([[-4000.0, -4001.0, -9000.0]])
    p = vote(similarity, torch.eye(3)[None], 0.01)
    assert torch.allclose(p, torch.tensor([[1.0, 0.0, 0.0]]))
    assert torch.isnan(torch.exp(similarity / 0.01) / torch.exp(similarity / 0.01).sum()).all()


def test_leave_one_out_equals_a_datastore_without_that_row():
    X, _ = features(n=40)
    store = Datastore.of(X, "l2nc")
    similarity, rows = nearest(store, X, 5, own=torch.arange(40))
    assert not (rows == torch.arange(40)[:, None]).any()
    for i in range(40):
        rest = torch.arange(40) != i
        without = Datastore(X[rest], store.mean, store.inverse[rest])
        expected, index = nearest(without, X[i : i + 1], 5)
        assert torch.allclose(similarity[i], expected[0])
        assert torch.equal(rows[i], torch.arange(40)[rest][index[0]])


def test_a_duplicate_with_another_id_may_be_returned():
    X, _ = features(n=10)
    twice = torch.cat([X, X[:1]])
    _, rows = nearest(Datastore.of(twice, "l2nc"), twice[:1], 1, own=torch.tensor([0]))
    assert rows.item() == 10


def test_translation_and_scale_of_all_features_change_nothing():
    X, y = features()
    q, _ = features(n=30, seed=1)
    expected = probabilities(X, y, q, 7, 0.1)
    assert torch.allclose(probabilities(X + 5, y, q + 5, 7, 0.1), expected, atol=1e-9)
    assert torch.allclose(probabilities(X * 40, y, q * 40, 7, 0.1), expected, atol=1e-9)
    only_l2 = vote(*_voted(Datastore.of(X, "l2"), y, q))
    moved = vote(*_voted(Datastore.of(X + 5, "l2"), y, q + 5))
    assert not torch.allclose(only_l2, moved, atol=1e-3)


def _voted(store: Datastore, y: torch.Tensor, q: torch.Tensor):
    similarity, rows = nearest(store, q, 7)
    return similarity, F.one_hot(y, 3)[rows], 0.1


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch):
    X, y = features(n=100, dtype=torch.float32)
    q, _ = features(n=90, seed=1, dtype=torch.float32)
    whole = nearest(Datastore.of(X, "l2nc"), q, 6)
    head = NnRevisit(Options(k=6, temperature=0.1, mix=0.5)).fit_features(X, y, torch.ones(100), seed=0)
    logits = head(q)
    monkeypatch.setattr(nn_revisit, "TILE", 1)
    parts = nearest(Datastore.of(X, "l2nc"), q, 6)
    assert torch.allclose(whole[0], parts[0], atol=1e-6)
    assert torch.equal(whole[1], parts[1])
    assert torch.allclose(head(q), logits, atol=1e-5)


def test_a_query_equal_to_the_mean_gets_an_even_vote_of_its_neighbours():
    for dtype in (torch.float64, torch.float32):
        X, y = features(n=30, dtype=dtype)
        p = probabilities(X, y, X.mean(0, keepdim=True), 30, 0.01)
        assert torch.allclose(p, torch.full((1, 3), 1 / 3, dtype=dtype), atol=1e-6)


def test_weights_count_votes():
    X, y = features(n=60, dtype=torch.float32)
    heavy = torch.where(y == 2, 4.0, 1.0)
    head = NnRevisit(Options(k=15, temperature=1.0, mix=1.0)).fit_features(X, y, heavy, seed=0)
    similarity, rows = nearest(Datastore.of(X, "l2nc"), X, 15)
    share = heavy[rows] * similarity.exp()
    expected = (F.one_hot(y[rows], 3) * (share / share.sum(1, keepdim=True))[..., None]).sum(1)
    assert torch.allclose(head(X).softmax(1), expected, atol=1e-5)


def test_training_factors_are_plain_at_zero_bounded_and_carry_no_gradient():
    p = torch.tensor([0.0, 0.3, 1.0], requires_grad=True)
    assert torch.equal(regularised_factor(p, 0.0), torch.ones(3))
    assert torch.equal(focal_factor(p, 0.0), torch.ones(3))
    assert torch.allclose(regularised_factor(p, 0.5), torch.tensor([51.0, 1 + 0.5 * np.log(1 / 0.3), 1.0]).float())
    assert torch.allclose(focal_factor(p, 2.0), torch.tensor([1.0, 0.49, 0.0]))
    assert not regularised_factor(p, 1.0).requires_grad
    assert not focal_factor(p, 2.0).requires_grad


@pytest.mark.parametrize("neutral", [{"training": "reg", "strength": 0}, {"training": "focal", "gamma": 0}])
def test_training_forms_with_neutral_settings_are_plain(neutral: dict[str, object]):
    X, y = features(dtype=torch.float32)
    ones = torch.ones(len(y))
    plain = NnRevisit(Options(mix=0)).fit_features(X, y, ones, seed=0)
    same = NnRevisit(Options(mix=0, **neutral)).fit_features(X, y, ones, seed=0)  # pyright: ignore
    other = NnRevisit(Options(mix=0, training="reg", strength=3)).fit_features(X, y, ones, seed=0)
    assert torch.allclose(plain(X), same(X), atol=1e-6)
    assert not torch.allclose(plain(X), other(X), atol=1e-2)


def test_tuning_equals_an_exhaustive_search():
    X, y = features(n=60, classes=2)
    own = torch.arange(60)
    similarity, rows = nearest(Datastore.of(X, "l2nc"), X, 16, own)
    generator = torch.Generator().manual_seed(2)
    p_linear = torch.rand(60, 1, generator=generator, dtype=torch.float64)
    weights = torch.rand(60, generator=generator, dtype=torch.float64) + 0.5
    log_weights = weights.log()[rows]
    ks, temperatures, mixes = (1, 4, 16), (0.05, 0.5), (0.0, 0.3, 0.6)
    correct = (y[rows] == y[:, None])[..., None]
    p_linear = 0.4 + 0.2 * p_linear
    rows_of, w = {}, weights / weights.sum()
    for k in ks:
        for T in temperatures:
            p = vote(similarity[:, :k], correct[:, :k], T, log_weights[:, :k])
            for mix in mixes:
                rows_of[k, T, mix] = mixed(p, p_linear, mix).clamp_min(1e-12).log()[:, 0]
    best = max(rows_of, key=lambda key: float((w * rows_of[key]).sum()))
    gain = rows_of[best] - p_linear.log()[:, 0]
    mean = (w * gain).sum()
    assert float(mean) > float((w**2 * (gain - mean) ** 2).sum().sqrt()), "these data should favour the vote"
    assert tune(similarity, correct, log_weights, p_linear, weights, ks, temperatures, mixes) == best


def test_a_gain_within_its_standard_error_is_no_reason_to_mix():
    """One row in two gains what the other loses, but for a trifle."""
    similarity, correct = torch.zeros(100, 1), (torch.arange(100) % 2 == 0)[:, None, None]
    p_linear, ones = torch.full((100, 1), 0.499), torch.ones(100)
    log_weights = torch.zeros(100, 1)
    assert tune(similarity, correct, log_weights, p_linear, ones, (1,), (1.0,), (0.0, 0.05))[2] == 0.0
    assert tune(similarity, correct, log_weights, p_linear, ones, (1,), (1.0,), (0.05,))[2] == 0.05
    correct[:] = True
    assert tune(similarity, correct, log_weights, p_linear, ones, (1,), (1.0,), (0.0, 0.05))[2] == 0.05
    sure = torch.ones(100, 1)
    assert tune(similarity, correct, log_weights, sure, ones, (1,), (1.0,), (0.0, 0.05))[2] == 0.0


def test_scattered_clusters_are_left_to_the_vote_and_noise_to_neither():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(12, 6, generator=generator) * 4
    cluster = torch.arange(240) % 12
    X, y = centres[cluster] + 0.5 * torch.randn(240, 6, generator=generator), cluster % 2
    head = NnRevisit().fit_features(X, y, torch.ones(240), seed=0)
    assert isinstance(head, NeighbourMix)
    assert float(head.mix) > 0.5
    assert (head(X).argmax(1) == y).float().mean() > 0.98


def test_several_labels_mix_a_share_per_class_with_a_sigmoid():
    X, y = features(dtype=torch.float32)
    several = torch.stack([y == 0, y != 1, X[:, 4] > 2], 1).to(torch.uint8)
    head = NnRevisit(Options(k=9, temperature=0.5, mix=0.4)).fit_features(X, several, torch.ones(len(y)), seed=0)
    similarity, rows = nearest(Datastore.of(X, "l2nc"), X, 9)
    expected = 0.4 * vote(similarity, several[rows], 0.5) + 0.6 * head.linear(X).sigmoid()  # pyright: ignore
    assert torch.allclose(head(X).sigmoid(), expected, atol=1e-5)
    tuned = NnRevisit().fit_features(X, several, torch.ones(len(y)), seed=0)
    assert torch.isfinite(tuned(X)).all()
    with pytest.raises(UsageError, match="one label per image"):
        NnRevisit(Options(training="focal")).fit_features(X, several, torch.ones(len(y)), seed=0)


@pytest.mark.parametrize("several", [False, True])
def test_head_rebuilds_from_shapes_and_exports(several: bool, tmp_path):
    X, y = features(dtype=torch.float32)
    labels = F.one_hot(y, 3).to(torch.uint8) if several else y
    method = NnRevisit(Options(k=6, temperature=0.3, mix=0.5))
    fitted = method.fit_features(X, labels, torch.ones(len(y)), seed=0)
    state = fitted.state_dict()
    empty = method.head({key: value.shape for key, value in state.items()})
    empty.load_state_dict(state)
    assert torch.equal(empty(X), fitted(X))

    program = torch.export.export(empty.eval(), (X[:5],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.allclose(program.module()(X[:17]), fitted(X[:17]), atol=1e-6)


def test_same_seed_same_head_and_nothing_is_changed():
    X, y = features(dtype=torch.float32)
    weights = torch.rand(len(y), generator=torch.Generator().manual_seed(0)) + 0.5
    copies = X.clone(), y.clone(), weights.clone()
    first, again = (NnRevisit().fit_features(X, y, weights, seed=5).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(torch.equal(now, then) for now, then in zip((X, y, weights), copies, strict=True))


def test_two_images_of_each_class_are_enough():
    X, y = features(n=4, classes=2, dtype=torch.float32)
    head = NnRevisit().fit_features(X, y, torch.ones(4), seed=0)
    assert torch.isfinite(head(X)).all()


def test_more_neighbours_than_images_are_cut_with_a_warning():
    X, y = features(n=12, dtype=torch.float32)
    with pytest.warns(UserWarning, match="k=50 exceeds the 12 images"):
        head = NnRevisit(Options(k=50, temperature=1.0, mix=0.5)).fit_features(X, y, torch.ones(12), seed=0)
    assert len(head.ranks) == 12  # pyright: ignore
    with pytest.warns(UserWarning, match="using 11"):
        nearest(Datastore.of(X, "l2nc"), X, 12, own=torch.arange(12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NnRevisit().fit_features(X, y, torch.ones(12), seed=0)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("nn-revisit:temperature=-1", "temperature=-1"),
        ("nn-revisit:mix=1.5", "mix=1.5"),
        ("nn-revisit:normalise=max", "normalise=max"),
        ("nn-revisit:neighbours=3", "neighbours: unknown"),
    ],
)
def test_wrong_options_are_refused(choice: str, message: str):
    with pytest.raises(UsageError, match=message):
        catalogue.create(choice)


def test_wrong_rows_are_refused_with_what_to_do():
    X, y = features(dtype=torch.float32)
    ones = torch.ones(len(y))
    with pytest.raises(UsageError, match="expected 0 to 1, or -1"):
        NnRevisit(Options(mix=-0.5)).fit_features(X, y, ones, seed=0)
    with pytest.raises(DataError, match="class 1 has no image"):
        NnRevisit().fit_features(X, y.where(y != 1, 0), ones, seed=0)
    with pytest.raises(UsageError, match="one datastore row"):
        nearest(Datastore.of(X, "l2nc"), X[:3], 2, own=torch.tensor([0, 1, 500]))
    with pytest.raises(UsageError, match="datastore is empty"):
        nearest(Datastore(X[:0], X[0], ones[:0]), X, 1)
    with pytest.raises(UsageError, match="features of width 8"):
        nearest(Datastore.of(X, "l2nc"), X[:, :5], 1)
