"""The contract of every accelerate method that the catalogue finds, on a CNN, a plain ViT, a windowed ViT and a hybrid.

Either the whole contract holds, or the method refuses the backbone with a clear message.
"""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from tests.contract.capabilities import FAMILIES, as_documented, backbone_of, hooks
from tests.contract.test_adapt import CLASSES, SIZE, check_export, pixels_of
from torch import nn

from foveal.backbones.adapter import normalise
from foveal.backbones.tokens import Marked
from foveal.core import catalogue
from foveal.core.errors import BackboneError, UsageError
from foveal.core.families.shrink import Accelerate
from foveal.core.method import Classifier
from foveal.evaluate.beside import share_of, stored_bytes

METHODS = catalogue.names("accelerate")


def create(name: str) -> Accelerate:
    method = catalogue.create(name)
    assert isinstance(method, Accelerate)
    return method


def classifier(family: str) -> Classifier:
    net = backbone_of(family, SIZE)
    torch.manual_seed(1)
    return Classifier(net, nn.Linear(net.width, CLASSES)).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str, family: str, tmp_path: Path):
    method, model = create(name), classifier(family)
    before, modules = copy.deepcopy(model.state_dict()), [type(each) for each in model.modules()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # fewer tokens than an option asks for
            made = method.shrink(model, None, None)
    except (BackboneError, UsageError) as refusal:
        assert len(str(refusal)) > 30, f"refusal says too little: {refusal}"
        assert model.backbone.arch in str(refusal)
        assert hooks(model) == 0
        as_documented(name, family, "refuses")
        return
    assert [type(each) for each in model.modules()] == modules, "the argument's structure changed"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert hooks(model) == hooks(made.module) == 0
    if method.targets:
        assert {key: value.shape for key, value in made.module.state_dict().items()} == {
            key: value.shape for key, value in before.items()
        }, "a method that does less keeps the weights"
        assert share_of("macs", made.module, model, SIZE) < 1
    else:
        assert share_of("macs", made.module, model, SIZE) == 1, "as much work, in fewer steps"
        assert len(made.module.backbone.blocks) < len(model.backbone.blocks)
        assert stored_bytes(made.module) <= stored_bytes(model)

    p = model.backbone.preprocessing
    x = normalise(pixels_of(p), p)
    rebuilt = create(name).rebuild(classifier(family), json.loads(json.dumps(made.plan)))
    rebuilt.load_state_dict(made.module.state_dict())
    again = create(name).shrink(classifier(family), None, None).module
    with torch.inference_mode():
        logits = made.module(x)
        assert logits.shape == (len(x), CLASSES)
        assert torch.equal(rebuilt.eval()(x), logits), "rebuilt from its plan it answers otherwise"
        assert torch.equal(again(x), logits), "the same model gave another one"
        assert torch.allclose(made.module(x.flip(0)).flip(0), logits, atol=1e-5), "images see each other"
        assert torch.allclose(copy.deepcopy(made.module)(x), logits, atol=0)

    budgets = method.frontier(model)
    costs = [share_of("macs", each, model, SIZE) for each in budgets.values()]
    assert bool(costs) == bool(method.targets)
    assert costs == sorted(costs, reverse=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    check_gathered_equals_masked(made.module, x)
    check_export(made.module, p, tmp_path)
    as_documented(name, family, "works")


def check_gathered_equals_masked(model: Classifier, x: torch.Tensor) -> None:
    """Tokens that left, and tokens that stayed with nobody attending to them, are the same to the others."""
    net = model.backbone
    if net.token_hook is None:
        return
    twin = copy.deepcopy(net)
    twin.token_hook = Marked(twin.token_hook)
    with torch.inference_mode():
        gathered, masked = net.tokens(x), twin.tokens(x)
    assert masked.shape[1] >= gathered.shape[1]
    assert torch.allclose(masked[:, : gathered.shape[1]], gathered, atol=1e-4)
