import copy

import pytest
import torch
import torch.nn.functional as F
from tests.methods.adapt.small_backbones import images, small_cnn, small_vit, steps

from foveal.core.errors import UsageError
from foveal.core.method import trainable
from foveal.core.options import parse_options
from foveal.methods.adapt.full import Full, Options


def test_everything_learns_batch_statistics_included() -> None:
    method = Full(Options(lr=1e-2))
    model = method.attach(small_cnn(), 3)
    before = copy.deepcopy(model.state_dict())
    assert len(list(trainable(model))) == len(list(model.parameters()))
    steps(method, model, 4)
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert not same


def test_two_rates_and_no_decay_on_vectors() -> None:
    method = Full(Options(lr=1e-3, head_lr_multiplier=7.0, weight_decay=0.1))
    model = method.attach(small_vit(), 3)
    groups = method.parameter_groups(model, method.recipe())
    of = {id(p): group for group in groups for p in group["params"]}
    assert len(of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = of[id(parameter)]
        assert group["lr"] == pytest.approx(7e-3 if name.startswith("head.") else 1e-3)
        assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_the_weighted_cross_entropy(smoothing: float) -> None:
    method = Full(Options(label_smoothing=smoothing))
    model = method.attach(small_vit(), 3).eval()
    torch.nn.init.normal_(model.head.weight)
    labels, weights = torch.tensor([0, 2, 2]), torch.tensor([2.0, 1.0, 0.5])
    own = method.loss(model, {"images": images(), "labels": labels, "class_weights": weights})["loss"]
    target = F.one_hot(labels, 3) * (1 - smoothing) + smoothing / 3
    naive = -(target * weights * model(images()).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(own, naive)


def test_the_start_prefers_no_class() -> None:
    model = Full().attach(small_cnn(), 4).eval()
    assert torch.equal(model(images()), torch.zeros(3, 4))


def test_wrong_options_are_named_at_once() -> None:
    with pytest.raises(UsageError, match=r"epochs=0: .*augment=wild: .*speed: unknown"):
        parse_options(Options, {"epochs": "0", "augment": "wild", "speed": "1"}, "full")
