"""srd-ossl against a second implementation of its loss, and what must hold of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone, load_backbone
from foveal.backbones.pair import Pair, state_hash
from foveal.core.errors import BackboneError, DataError, FovealError, UsageError
from foveal.core.method import Classifier
from foveal.methods.distill.srd_ossl import Connector, Options, SrdOssl, mean_square, softened

CLASSES, SIZE = 4, 64


def classifier(arch: str, seed: int, classes: int = CLASSES) -> Classifier:
    torch.manual_seed(seed)
    backbone = load_backbone(arch, pretrained=False, size=SIZE)
    return Classifier(backbone, nn.Linear(backbone.width, classes)).eval()


@pytest.fixture
def teacher() -> Classifier:
    return classifier("test_resnet", 0)


@pytest.fixture
def student() -> Classifier:
    return classifier("test_efficientnet", 1)


def batch(labelled: int = 4, unlabelled: int = 2) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(2)
    count = labelled + unlabelled
    images = torch.randn(count, 3, SIZE, SIZE, generator=rng)
    return {
        "images": images,
        "teacher_images": images,
        "labels": torch.randint(0, CLASSES, (count,), generator=rng),
        "labelled": torch.arange(count) < labelled,
        "class_weights": torch.tensor([0.5, 1.0, 2.0, 1.5]),
    }


def naive_loss(pair: Pair, rows: dict[str, Tensor], beta: float, w_f: float, alpha: float, T: float) -> Tensor:
    """The paper's equations, sum by sum."""
    student, teacher = pair.student, pair.teacher.network
    x, weights = rows["images"], rows["class_weights"]
    f_s = student.backbone.model.forward_features(x)
    z_s = student(x)
    with torch.no_grad():
        f_t = teacher.backbone(x)
        z_t = teacher(x)
    W, b = teacher.head.weight, teacher.head.bias
    conv, norm = pair.connector.conv, pair.connector.norm
    total = torch.zeros(())
    known = [i for i in range(len(x)) if rows["labelled"][i]]
    for i in known:
        y = int(rows["labels"][i])
        total = total - weights[y] * torch.log_softmax(z_s[i], 0)[y] / len(known)
    mapped = torch.einsum("dc,bchw->bdhw", conv.weight[:, :, 0, 0], f_s)
    mean, var = mapped.mean((0, 2, 3), keepdim=True), mapped.var((0, 2, 3), unbiased=False, keepdim=True)
    scale, shift = norm.weight[:, None, None], norm.bias[:, None, None]
    mapped = (mapped - mean) / (var + norm.eps).sqrt() * scale + shift
    g = mapped.clamp_min(0).sum((2, 3)) / (mapped.shape[2] * mapped.shape[3])
    for i in range(len(x)):
        total = total + beta * w_f * sum((g[i, c] - f_t[i, c]) ** 2 for c in range(g.shape[1])) / g.numel()
        z_ts = [sum(W[k, c] * g[i, c] for c in range(g.shape[1])) + b[k] for k in range(CLASSES)]
        total = total + beta * sum((z_ts[k] - z_t[i, k]) ** 2 for k in range(CLASSES)) / z_t.numel()
        p, q = torch.softmax(z_t[i] / T, 0), torch.softmax(z_s[i] / T, 0)
        total = total + alpha * T**2 * (p * (p / q).log()).sum() / len(x)
    return total


def test_it_agrees_with_the_equations_and_their_gradients(student: Classifier, teacher: Classifier):
    method = SrdOssl(Options(beta=0.7, feature_weight=3.0, alpha=0.4, temperature=2.0))
    pair = method.pair(student, teacher)
    pair.connector.train()
    rows = batch()
    loss = method.loss(pair, rows)["loss"]
    expected = naive_loss(pair, rows, 0.7, 3.0, 0.4, 2.0)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    parameters = [p for p in pair.parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss, parameters)
    theirs = torch.autograd.grad(expected, parameters)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-5)


def test_equal_features_cost_nothing_and_the_teachers_classifier_is_applied_by_hand(teacher: Classifier):
    own = copy.deepcopy(teacher)
    pair = Pair(own, teacher, nn.Identity())
    seen = pair(batch()["images"], batch()["images"])
    assert torch.allclose(seen["features"], seen["teacher_features"], atol=1e-6)
    by_hand = seen["features"] @ teacher.head.weight.T + teacher.head.bias
    assert torch.allclose(seen["crossed_logits"], by_hand, atol=1e-6)
    assert float(mean_square(seen["features"], seen["teacher_features"]).detach()) < 1e-10
    assert float(mean_square(seen["crossed_logits"], seen["teacher_logits"]).detach()) < 1e-10
    assert float(softened(seen["teacher_logits"], seen["teacher_logits"], 4.0)) == pytest.approx(0, abs=1e-6)


def test_the_connector_of_64_to_128_channels_has_8448_parameters():
    assert sum(p.numel() for p in Connector(64, 128).parameters()) == 8448
    assert (Connector(3, 5)(torch.randn(2, 3, 4, 4)) >= 0).all()
    assert (Connector(3, 5, rectified=False)(torch.randn(2, 3, 4, 4)) < 0).any()


def test_what_gets_a_gradient_from_the_representation_terms(student: Classifier, teacher: Classifier):
    before = state_hash(teacher)
    method = SrdOssl()
    pair = method.pair(student, teacher).train()
    parts = method.loss(pair, batch())
    (parts["features"] + parts["representation"]).backward()
    assert all(p.grad is None for p in pair.teacher.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is None or not p.grad.any() for p in student.head.parameters())
    assert pair.connector.conv.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in student.backbone.parameters())
    assert not any(module.training for module in pair.teacher.modules())
    assert state_hash(pair.teacher.network) == before == state_hash(teacher)
    assert method.finish(pair) is student


def test_a_teacher_that_changed_is_told(student: Classifier, teacher: Classifier):
    pair = SrdOssl().pair(student, teacher)
    next(pair.teacher.buffers()).add_(1)
    with pytest.raises(FovealError, match="the teacher changed while its student learnt"):
        SrdOssl().finish(pair)


def test_unlabelled_rows_do_not_move_the_cross_entropy(student: Classifier, teacher: Classifier):
    method, rows = SrdOssl(), batch()
    pair = method.pair(student, teacher).eval()
    first = method.loss(pair, rows)
    other = {**rows, "images": rows["images"].clone(), "labels": rows["labels"].clone()}
    other["images"][~rows["labelled"]] += 1
    other["labels"][~rows["labelled"]] = 0
    second = method.loss(pair, other)
    assert torch.equal(first["cross_entropy"], second["cross_entropy"])
    assert not torch.equal(first["representation"], second["representation"])
    by_hand = F.cross_entropy(student(rows["images"])[:4], rows["labels"][:4], rows["class_weights"], reduction="none")
    assert float(first["cross_entropy"].detach()) == pytest.approx(float(by_hand.mean().detach()), rel=1e-6)


def test_without_beta_it_is_the_cross_entropy_bit_for_bit(student: Classifier, teacher: Classifier):
    rows = batch(labelled=6, unlabelled=0)
    alone, plain = copy.deepcopy(student).train(), copy.deepcopy(student).train()
    method = SrdOssl(Options(beta=0.0))
    pair = method.pair(alone, teacher).train()
    assert pair.connector is None
    steps = [torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1) for each in (pair, plain)]
    for _ in range(2):
        torch.manual_seed(0)
        method.loss(pair, rows)["loss"].backward()
        torch.manual_seed(0)
        per_image = F.cross_entropy(plain(rows["images"]), rows["labels"], rows["class_weights"], reduction="none")
        per_image.mean().backward()
        for step in steps:
            step.step()
            step.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), plain.state_dict().values(), strict=True))


def test_the_order_of_the_teachers_channels_means_nothing(student: Classifier, teacher: Classifier):
    order = torch.randperm(teacher.head.in_features, generator=torch.Generator().manual_seed(3))
    method, rows = SrdOssl(), batch()
    pair = method.pair(student, teacher).eval()
    turned = copy.deepcopy(pair)
    with torch.no_grad():
        turned.connector.conv.weight.copy_(pair.connector.conv.weight[order])
        turned.teacher.network.head.weight.copy_(pair.teacher.network.head.weight[:, order])
    features = turned.teacher.network.features
    turned.teacher.network.features = lambda images: features(images)[:, order]
    ours, theirs = method.loss(pair, rows), method.loss(turned, rows)
    for part in ("features", "representation"):
        assert float(ours[part].detach()) == pytest.approx(float(theirs[part].detach()), rel=1e-5)


@pytest.mark.parametrize("arch", ["test_vit", "test_coatnet", "test_efficientnet"])
def test_any_teacher_and_student(arch: str, teacher: Classifier):
    """Grids of other sizes, class tokens and signed features: everything a student has learns from the terms."""
    other = classifier(arch, 4)
    method = SrdOssl()
    for student_, teacher_ in ((copy.deepcopy(other), teacher), (classifier("test_resnet", 5), other)):
        pair = method.pair(student_, teacher_).train()
        method.loss(pair, batch())["loss"].backward()
        assert all(p.grad is not None for p in pair.parameters() if p.requires_grad)
    assert isinstance(pair.connector.act, nn.Identity) == (arch == "test_vit" or other_is_signed(other))


def other_is_signed(model: Classifier) -> bool:
    with torch.no_grad():
        return bool((model.features(torch.randn(8, 3, SIZE, SIZE)) < 0).any())


def test_finding_the_last_map_leaves_the_students_statistics_alone(student: Classifier, teacher: Classifier):
    before = state_hash(student)
    SrdOssl().pair(student.train(), teacher)
    assert state_hash(student) == before
    assert student.training


def test_several_labels_per_image(student: Classifier, teacher: Classifier):
    rows = batch()
    rows["labels"] = F.one_hot(rows["labels"], CLASSES).to(torch.uint8)
    parts = SrdOssl().loss(SrdOssl().pair(student, teacher).eval(), rows)
    by_hand = F.binary_cross_entropy_with_logits(
        student(rows["images"])[:4], rows["labels"][:4].float(), pos_weight=rows["class_weights"]
    )
    assert float(parts["cross_entropy"].detach()) == pytest.approx(float(by_hand.detach()), rel=1e-5)
    method = SrdOssl(Options(alpha=0.5))
    with pytest.raises(UsageError, match="several labels need alpha=0"):
        method.loss(method.pair(student, teacher), rows)


def test_bad_input(student: Classifier, teacher: Classifier):
    deep = Classifier(teacher.backbone, nn.Sequential(nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, CLASSES))).eval()
    with pytest.raises(BackboneError, match="answers through Sequential, expected a single linear layer"):
        SrdOssl().pair(student, deep)
    with pytest.raises(UsageError, match="is in training mode"):
        SrdOssl().pair(student, copy.deepcopy(teacher).train())
    with pytest.raises(UsageError, match="needs a teacher: foveal distill TEACHER DATA"):
        SrdOssl().pair(student, None)
    with pytest.raises(UsageError, match="the teacher has 4 classes and the data 3"):
        SrdOssl(Options(alpha=0.5)).pair(classifier("test_efficientnet", 1, classes=3), teacher)
    few = classifier("test_efficientnet", 1, classes=2)
    with pytest.raises(DataError, match="for a student of 2: expected a student made for the classes of the data"):
        SrdOssl().loss(SrdOssl().pair(few, teacher), batch())
    pair = SrdOssl().pair(student, teacher)
    with pytest.raises(UsageError, match="needs teacher_images"):
        pair(batch()["images"])
    assert isinstance(pair.student.backbone, Backbone)
