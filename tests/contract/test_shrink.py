"""The contract of every shrink method that the catalogue finds, on a CNN, a plain ViT, a windowed ViT and a hybrid.

Either the whole contract holds, or the method refuses the backbone with a clear message.
"""

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from tests.contract.capabilities import FAMILIES, as_documented, backbone_of, hooks
from tests.contract.test_adapt import CLASSES, DATA, SIZE, check_export, pixels_of
from torch import Tensor, nn

from foveal.backbones.adapter import normalise
from foveal.core import catalogue
from foveal.core.errors import BackboneError, UsageError
from foveal.core.families.shrink import Shrink, TaskData
from foveal.core.method import Classifier, classification_loss
from foveal.evaluate.beside import stored_bytes

METHODS = catalogue.names("shrink")
LIGHT = {"images": 6, "steps": 2, "between": 1, "after": 1, "rate": 0.4, "bits": 4}
"""Options that set how much work is done, where a method has one of the name."""


class Data(TaskData):
    """The battery's images, and plain gradient steps."""

    def __init__(self, x: Tensor, crash: bool = False) -> None:
        self.batch = {"images": x, "labels": torch.from_numpy(DATA.labels), "class_weights": torch.ones(CLASSES)}
        self.crash, self.read = crash, 0

    def batches(self, images: int, size: int) -> Iterator[Mapping[str, Tensor]]:
        self.read += 1
        yield {name: value if name == "class_weights" else value[:images] for name, value in self.batch.items()}
        if self.crash:
            raise ArithmeticError

    def tune(self, model: Classifier, steps: int, lr: float) -> Classifier:
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr)
        for _ in range(steps):
            optimizer.zero_grad()
            classification_loss(model(self.batch["images"]), self.batch).backward()
            optimizer.step()
        return model.eval()

    def progress(self, done: int, total: int) -> None:
        assert 0 < done <= total


def light(name: str) -> Shrink:
    fields = {field.name for field in dataclasses.fields(catalogue.get(name).Options)}
    method = catalogue.create(name, **{key: value for key, value in LIGHT.items() if key in fields})
    assert isinstance(method, Shrink)
    return method


def classifier(family: str) -> Classifier:
    net = backbone_of(family, SIZE)
    torch.manual_seed(1)
    return Classifier(net, nn.Linear(net.width, CLASSES)).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str, family: str, tmp_path: Path):
    method, model = light(name), classifier(family)
    p = model.backbone.preprocessing
    x = normalise(pixels_of(p), p)
    before, modules = copy.deepcopy(model.state_dict()), [type(each) for each in model.modules()]

    def untouched() -> None:
        assert [type(each) for each in model.modules()] == modules, "the argument's structure changed"
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert not model.training
        assert hooks(model) == 0

    try:
        made = method.shrink(model, Data(x), None)
    except (BackboneError, UsageError) as refusal:
        assert len(str(refusal)) > 30, f"refusal says too little: {refusal}"
        assert model.backbone.arch in str(refusal)
        untouched()
        as_documented(name, family, "refuses")
        return
    untouched()
    assert hooks(made.module) == 0
    assert stored_bytes(made.module) < 0.9 * stored_bytes(model)
    json.dumps(dict(made.notes), allow_nan=False)

    plan = json.loads(json.dumps(made.plan))
    rebuilt = light(name).rebuild(classifier(family), plan)
    rebuilt.load_state_dict(made.module.state_dict())
    again = light(name).shrink(classifier(family), Data(x), None).module
    with torch.inference_mode():
        logits = made.module(x)
        assert logits.shape == (len(x), CLASSES)
        assert torch.isfinite(logits).all()
        assert torch.equal(rebuilt.eval()(x), logits), "rebuilt from its plan it answers otherwise"
        assert torch.equal(again(x), logits), "the same model gave another one"
        assert torch.equal(copy.deepcopy(made.module)(x), logits)
    assert made.module.backbone.width == made.module.features(x).shape[1]

    data = Data(x, crash=True)
    if "gradients" in method.spec.needs:
        with pytest.raises(ArithmeticError):
            light(name).shrink(model, data, None)
        assert data.read == 1
        untouched()
    check_export(made.module, p, tmp_path)
    as_documented(name, family, "works")
