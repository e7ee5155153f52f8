"""udml-ss: loss and mining by plain loops, who gets which gradient, batches, clusters, and what is refused."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.blocks.kmeans import kmeans
from foveal.core.errors import DataError, UsageError
from foveal.methods.retrieve.udml_ss import Learner, Options, UdmlSs, balanced, mine, multi_similarity, turned


def unit(n: int = 12, D: int = 6, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def naive(z: Tensor, labels: list[int]) -> Tensor:
    """The paper's loss, image by image, pair by pair; anchors that mining leaves nothing count in the mean."""
    total, S = z.new_zeros(()), (z @ z.T).tolist()
    for i in range(len(z)):
        positives = [j for j in range(len(z)) if j != i and labels[j] == labels[i]]
        negatives = [j for j in range(len(z)) if labels[j] != labels[i]]
        if not positives or not negatives:
            continue
        least = min(S[i][j] for j in positives)
        most = max(S[i][j] for j in negatives)
        pull = [torch.exp(-2 * (z[i] @ z[j] - 0.5)) for j in positives if S[i][j] - 0.1 < most]
        push = [torch.exp(40 * (z[i] @ z[j] - 0.5)) for j in negatives if S[i][j] + 0.1 > least]
        if pull:
            total = total + torch.log(1 + sum(pull)) / 2
        if push:
            total = total + torch.log(1 + sum(push)) / 40
    return total / len(z)


@pytest.mark.parametrize("seed", range(4))
def test_the_loss_is_the_naive_one(seed: int):
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4])
    ours, theirs = (unit(seed=seed).requires_grad_() for _ in range(2))
    a, b = multi_similarity(ours, labels), naive(theirs, labels.tolist())
    assert a.item() == pytest.approx(b.item(), abs=1e-10)
    a.backward()
    b.backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-10)


def test_nothing_mined_is_no_loss():
    z = F.normalize(torch.tensor([[1.0, 0, 0], [1, 0.01, 0], [0, 1, 0], [0.01, 1, 0]]), dim=1).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1])
    positive, negative = mine(z.detach() @ z.detach().T, labels)
    assert not positive.any()
    assert not negative.any()
    loss = multi_similarity(z, labels)
    loss.backward()
    assert loss == 0
    assert (z.grad == 0).all()


def test_names_of_clusters_and_order_do_not_matter():
    z, labels = unit(), torch.arange(12) % 4
    loss = multi_similarity(z, labels)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(multi_similarity(z[order], (3 - labels)[order]), loss)


def test_four_turns_are_none():
    images = torch.rand(5, 3, 8, 8)
    views, turns = turned(images)
    assert torch.bincount(turns).tolist() == [5] * 4
    assert torch.equal(views[:5], images)
    again, _ = turned(views[5:10])
    assert torch.equal(again[15:], images)  # 90 degrees, then 270


class Tiny(nn.Module):
    """A backbone of a few weights."""

    width = 6

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def learner(**options: float) -> tuple[UdmlSs, Learner, dict[str, Tensor]]:
    torch.manual_seed(0)
    method = UdmlSs(Options(**{"clusters": 4, "width": 5, "batch_size": 12, "each": 3, "turned": 4, **options}))
    model = method.attach(Tiny(), 24)
    assert isinstance(model, Learner)
    model.clusters.copy_(torch.arange(24) % 4)
    model.looked.fill_(0)
    return method, model.train(), {"images": torch.randn(12, 3, 16, 16), "index": torch.arange(12)}


def grads(module: nn.Module) -> float:
    return sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)


def test_each_loss_reaches_its_own_head():
    method, model, batch = learner()
    parts = method.loss(model, batch)
    parts["rotation"].backward(retain_graph=True)
    assert grads(model.head) == 0
    assert grads(model.rotation) > 0
    assert grads(model.backbone) > 0
    model.zero_grad()
    parts["metric"].backward()
    assert grads(model.rotation) == 0
    assert grads(model.head) > 0
    assert grads(model.backbone) > 0
    assert parts["loss"].item() == pytest.approx(parts["metric"].item() + 0.1 * parts["rotation"].item())


def test_without_rotation_its_head_learns_nothing():
    method, model, batch = learner(eta=0.0)
    parts = method.loss(model, batch)
    parts["loss"].backward()
    assert all(p.grad is None for p in model.rotation.parameters())
    assert "rotation" not in parts


def test_batch_norms_stay_pretrained():
    method, model, batch = learner()
    before = model.backbone.layers[1].running_mean.clone()
    assert not model.backbone.layers[1].training
    method.loss(model, batch)
    assert torch.equal(model.backbone.layers[1].running_mean, before)


def test_vectors_have_length_one():
    method, model, batch = learner()
    embedding = method.finish(model).eval()
    assert torch.allclose(embedding(batch["images"]).norm(dim=1), torch.ones(12), atol=1e-6)
    assert torch.equal(model.eval().embed(batch["images"]), embedding(batch["images"]))
    model.looked.fill_(-1)
    assert model.embed(batch["images"]).shape == (12, 6)


def test_a_warning_when_the_rotation_is_not_learnt():
    method, model, _ = learner()
    model.turning.fill_(0.99 * math.log(4))
    with pytest.warns(UserWarning, match="look the same turned round"):
        method.finish(model)


def test_batches_hold_as_many_of_each_cluster():
    labels = np.repeat(np.arange(6), [2, 5, 9, 9, 9, 30])
    batches = balanced(labels, 4, 5, 40, np.random.default_rng(0))
    drawn = set()
    for batch in batches:
        kinds, counts = np.unique(labels[batch], return_counts=True)
        assert len(kinds) == 4
        assert (counts == 5).all()
        drawn |= set(kinds.tolist())
        for kind in kinds:
            own = batch[labels[batch] == kind]
            assert len(np.unique(own)) == min(5, (labels == kind).sum())  # a cluster of 2 repeats them
    assert drawn == set(range(6))


def test_collapse_tells_the_sizes():
    with pytest.raises(DataError, match=r"fell into 2 clusters \(sizes 18, 2\), a batch needs 4"):
        balanced(np.repeat([0, 1], [18, 2]), 4, 5, 1, np.random.default_rng(0))


def blobs(seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    kinds = torch.arange(80) % 5
    return 4 * torch.randn(5, 7, generator=rng)[kinds] + 0.2 * torch.randn(80, 7, generator=rng), kinds


def test_clusters_are_the_blobs_and_stay():
    X, kinds = blobs()
    labels = kmeans(X, 5, 0)
    assert len({(int(a), int(b)) for a, b in zip(kinds, labels, strict=True)}) == 5
    assert torch.equal(kmeans(X, 5, 1, labels=labels), labels)
    assert torch.equal(kmeans(X, 5, 0), labels)


def test_clusters_are_as_tight_as_scikit_learns():
    from sklearn.cluster import KMeans

    X = torch.rand(200, 3, generator=torch.Generator().manual_seed(2))
    labels = kmeans(X, 8, 0)
    inertia = sum(float((X[labels == c] - X[labels == c].mean(0)).square().sum()) for c in range(8))
    assert inertia <= 1.02 * KMeans(8, n_init=10, random_state=0).fit(X.numpy()).inertia_
    assert len(labels.unique()) == 8


def test_no_cluster_stays_empty():
    X = torch.cat([torch.zeros(30, 2), torch.rand(10, 2)])
    assert len(kmeans(X, 6, 0).unique()) == 6


def test_a_second_look_keeps_the_names():
    method, model, _ = learner(clusters=5)
    X, _ = blobs()
    model.clusters = torch.full((80,), -1)
    model.looked.fill_(-1)
    method.look(model, X, 0)
    first = model.clusters.clone()
    model.looked.fill_(0)
    method.look(model, torch.cat([X, X], 1), 0)  # of another width, as z is
    assert torch.equal(model.clusters, first)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"clusters": 13}, "clusters=13 of 24 images leaves fewer than 2 each"),
        ({"batch_size": 25}, "batch_size=25 holds 8 clusters"),
        ({"clusters": 2}, "batch_size=12 holds 4 clusters of each=3, expected 2 to clusters=2"),
    ],
)
def test_too_few_images(options: dict[str, int], told: str):
    method = UdmlSs(Options(**{"clusters": 4, "batch_size": 12, "each": 3, **options}))
    with pytest.raises(UsageError, match=told):
        method.attach(Tiny(), 24)


@pytest.mark.parametrize("wrong", [{"clusters": 1}, {"width": 0}, {"each": 1}])
def test_options_out_of_range(wrong: dict[str, int]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Options(**wrong)
