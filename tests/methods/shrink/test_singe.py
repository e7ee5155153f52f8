import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from tests.methods.adapt.small_backbones import images, random_backbone, small_cnn, small_vit
from torch import Tensor, nn

from foveal.backbones.channels import groups, remove, resize, sizes
from foveal.core.errors import BackboneError, FovealError, UsageError
from foveal.core.families.shrink import Target, TaskData
from foveal.core.method import Classifier
from foveal.evaluate.beside import numbers, share_of
from foveal.methods.shrink.powerquant import Options as PowerOptions
from foveal.methods.shrink.powerquant import Powerquant
from foveal.methods.shrink.singe import Options, Singe, kept_units, path, relevance

CLASSES = 4


class Mlp(nn.Module):
    """Two layers, taught digits for a moment."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(64, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))

    def parts(self) -> list[tuple[nn.Parameter, Tensor]]:
        each = torch.arange(12)[:, None]
        return [(self.fc1.weight, each), (self.fc1.bias, each)]


X, y = (torch.from_numpy(each) for each in load_digits(return_X_y=True))
BATCH = {"x": X[:100].float() / 16, "y": y[:100]}


@pytest.fixture(scope="module")
def mlp() -> Mlp:
    model = Mlp()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(model)(BATCH).backward()
        optimizer.step()
    return model


def loss_of(model: nn.Module):
    return lambda batch: F.cross_entropy(model(batch["x"]), batch["y"])


def scored(model: Mlp, **given: Any) -> Tensor:
    return relevance(loss_of(model), model.parts(), [BATCH], **{"steps": 5, "mu": 0.8, **given})


def without(model: Mlp, neuron: int) -> float:
    cut = copy.deepcopy(model)
    with torch.no_grad():
        cut.fc1.weight[neuron] = 0
        cut.fc1.bias[neuron] = 0
        return float(loss_of(cut)(BATCH))


def test_it_agrees_with_the_definition_one_step_and_neuron_at_a_time(mlp: Mlp):
    expected = torch.zeros(12)
    for here, there in [(0.8**s, 0.8 ** (s + 1) if s < 5 else 0.0) for s in range(6)]:
        scaled = copy.deepcopy(mlp)
        with torch.no_grad():
            scaled.fc1.weight.mul_(here)
            scaled.fc1.bias.mul_(here)
        loss_of(scaled)(BATCH).backward()
        for i in range(12):
            for now, then in ((scaled.fc1.weight, mlp.fc1.weight), (scaled.fc1.bias, mlp.fc1.bias)):
                expected[i] += now.grad[i].norm() * ((here - there) * then[i]).norm()
    assert torch.allclose(scored(mlp), expected, rtol=1e-4)


def test_one_step_to_nothing_is_gradient_times_magnitude(mlp: Mlp):
    gradients = torch.autograd.grad(loss_of(mlp)(BATCH), [mlp.fc1.weight, mlp.fc1.bias])
    expected = gradients[0].norm(dim=1) * mlp.fc1.weight.norm(dim=1) + (gradients[1] * mlp.fc1.bias).abs()
    assert torch.allclose(scored(mlp, steps=1, mu=0.0), expected, rtol=1e-4)


def test_signed_alone_and_fine_it_is_what_removal_costs(mlp: Mlp):
    full, neuron = float(loss_of(mlp)(BATCH)), int(scored(mlp).argmax())
    truth = full - without(mlp, neuron)
    errors = [
        abs(float(scored(mlp, steps=steps, mu=mu, signed=True, alone=neuron)[neuron]) - truth)
        for steps, mu in ((4, 0.5), (40, 0.9), (400, 0.99))
    ]
    assert errors[-1] < 0.02 * abs(truth)
    assert errors[2] < errors[0]


def test_what_matters_to_nobody_scores_zero_and_weights_stay(mlp: Mlp):
    model = copy.deepcopy(mlp)
    with torch.no_grad():
        model.fc2.weight[:, 3] = 0
        model.fc1.weight[5] = 0
        model.fc1.bias[5] = 0
    before = copy.deepcopy(model.state_dict())
    scores = scored(model)
    assert scores[3] == scores[5] == 0
    assert bool((scores >= 0).all())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    turned = copy.deepcopy(model)
    with torch.no_grad():
        turned.fc1.weight.copy_(model.fc1.weight[order])
        turned.fc1.bias.copy_(model.fc1.bias[order])
        turned.fc2.weight.copy_(model.fc2.weight[:, order])
    assert torch.allclose(scored(turned), scores[order], rtol=1e-3, atol=1e-6)


def test_bad_paths_no_images_and_losses_that_are_no_number(mlp: Mlp):
    assert path(2, 0.5) == [(1.0, 0.5), (0.5, 0.25), (0.25, 0.0)]
    for steps, mu in ((0, 0.5), (3, 1.0), (3, -0.1)):
        with pytest.raises(UsageError, match=rf"{steps} steps with mu {mu}"):
            path(steps, mu)
    with pytest.raises(UsageError, match="no images to score channels on"):
        relevance(loss_of(mlp), mlp.parts(), [], 2, 0.5)
    broken, before = copy.deepcopy(mlp), mlp.fc1.weight.detach().clone()
    with torch.no_grad():
        broken.fc2.weight[0, 0] = torch.nan
    with pytest.raises(FovealError, match="the loss is nan while channels are scored"):
        scored(broken)
    assert torch.equal(broken.fc1.weight, before)


@pytest.mark.parametrize(
    ("units", "rate", "round_to", "kept"),
    [
        (64, 0.5, 8, 32),
        (64, 0.9, 8, 8),
        (64, 0.99, 8, 8),
        (12, 0.5, 8, 6),
        (2, 0.9, 8, 1),
        (24, 0.0, 8, 24),
        (20, 0.0, 8, 20),
    ],
)
def test_no_layer_is_emptied_and_counts_are_rounded(units: int, rate: float, round_to: int, kept: int):
    assert kept_units(units, rate, round_to) == kept


class Data(TaskData):
    """Random images, and plain gradient steps."""

    def batches(self, images_: int, size: int) -> Iterator[Mapping[str, Tensor]]:
        yield {"images": images(6), "labels": torch.arange(6) % CLASSES, "class_weights": torch.ones(CLASSES)}

    def tune(self, model: Classifier, steps: int, lr: float) -> Classifier:
        optimizer = torch.optim.SGD(model.parameters(), lr)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(images(6)), torch.arange(6) % CLASSES).backward()
            optimizer.step()
        return model

    def progress(self, done: int, total: int) -> None:
        assert 0 < done <= total


def classifier(kind: str) -> Classifier:
    concatenating = {"block_config": (2, 2), "growth_rate": 8}
    make = {
        "cnn": small_cnn,
        "vit": lambda: small_vit(depth=2),
        "dense": lambda: random_backbone("densenet121", 32, 0, **concatenating),
    }
    backbone = make[kind]()
    torch.manual_seed(3)
    return Classifier(backbone, nn.Linear(backbone.width, CLASSES)).eval()


QUICK = Options(rate=0.5, steps=2, images=6, between=0, after=1, lr=1e-6)


@pytest.mark.parametrize("kind", ["cnn", "vit", "dense"])
def test_removing_silent_channels_changes_no_answer(kind: str):
    model, x = classifier(kind), images()
    rest = groups(model)
    while rest:
        group = rest.pop(0)
        units = list(range(0, group.units, 2))
        with torch.no_grad():
            for parameter, index in group.parameters(model):
                parameter[index[units].flatten()] = 0
            for member in group.members:
                norm = model.get_submodule(member.module)
                if isinstance(norm, nn.BatchNorm2d):
                    norm.running_mean[member.index[units].flatten()] = 0
        expected = model(x)
        rest = remove(model, group, units, rest)
        assert torch.allclose(model(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())), group.name


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_a_pruned_model_is_rebuilt_trains_on_and_counts_as_its_sizes_say(kind: str):
    model, x = classifier(kind), images()
    before = copy.deepcopy(model.state_dict())
    step = Singe(QUICK).shrink(model, Data(), None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert numbers(step.module) < 0.8 * numbers(model)
    again = Singe().rebuild(classifier(kind), json.loads(json.dumps(step.plan)))
    assert numbers(again) == numbers(step.module)
    again.load_state_dict(step.module.state_dict())
    assert torch.equal(again(x), step.module(x))
    assert again.backbone.width == again.head.in_features
    by_hand = 0
    for name, module in model.named_modules():
        said = step.plan["sizes"].get(name, {})
        if isinstance(module, nn.Linear | nn.Conv2d):
            out, inner = said.get("out", len(module.weight)), said.get("in", module.weight.shape[1])
            by_hand += out * inner * int(np.prod(module.weight.shape[2:])) + (out if module.bias is not None else 0)
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            by_hand += 2 * said.get("out", len(module.weight))
    own = sum(value.numel() for name, value in model.named_parameters() if name.endswith(("cls_token", "pos_embed")))
    assert numbers(step.module) == by_hand + own
    start = copy.deepcopy(again.state_dict())
    Data().tune(again.requires_grad_(True), 1, 1e-2)
    assert not torch.equal(again.head.weight, start["head.weight"])


def test_rate_zero_changes_nothing_and_a_target_is_reached():
    model, x = classifier("cnn"), images()
    same = Singe(Options(rate=0.0)).shrink(model, Data(), None)
    assert torch.equal(same.module(x), model(x))
    assert same.plan["sizes"] == {}

    def target(share: float) -> Target:
        return Target("macs", share, lambda candidate: share_of("macs", candidate, model, 32))

    half = Singe(QUICK).shrink(model, Data(), target(0.5)).module
    assert 0.3 < share_of("macs", half, model, 32) <= 0.5
    with pytest.raises(UsageError, match=r"macs=0.001 is out of reach: without 95% of its channels"):
        Singe(QUICK).shrink(model, Data(), target(0.001))
    with pytest.raises(UsageError, match="singe scores channels on labelled training images"):
        Singe().shrink(model, None, None)


def test_features_keep_their_width_below_a_head_that_cannot_be_cut():
    backbone = small_cnn()
    model = Classifier(backbone, nn.Sequential(nn.Linear(backbone.width, CLASSES))).eval()
    step = Singe(QUICK).shrink(model, Data(), None)
    assert step.module.backbone(images()).shape[1] == backbone.width
    assert not [name for name in step.plan["sizes"] if name.startswith("head")]


def test_coded_weights_have_no_channels_to_remove():
    coded = Powerquant(PowerOptions(exponent=1.0)).shrink(classifier("vit"), None, None).module
    with pytest.raises(BackboneError, match="remove channels first, then code"):
        Singe(QUICK).shrink(coded, Data(), None)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"nowhere": {"out": 1}}, "the plan resizes nowhere"),
        ({"head": {"in": 10**9}}, r"the plan gives head in 1000000000: expected 1 to 64"),
        ({"head": {"in": 0}}, "the plan gives head in 0"),
        ({"head": {"in": True}}, "the plan gives head in True"),
        ({"head": {"weight": 3}}, "the plan resizes head"),
    ],
)
def test_a_plan_only_makes_smaller(plan: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        resize(classifier("vit"), plan)
    assert sizes(classifier("vit"), classifier("vit")) == {}
