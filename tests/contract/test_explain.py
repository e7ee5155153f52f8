"""The contract of every explain method that the catalogue finds, on a CNN, a plain ViT, a windowed ViT and a hybrid.

Either the whole contract holds, or the method refuses the backbone with a clear message.
"""

import copy
import dataclasses
import warnings

import pytest
import torch
from tests.contract.capabilities import FAMILIES, as_documented, backbone_of, hooks
from torch import Tensor, nn

from foveal.backbones.wrapper import BATCH, OpenModel, Scorer
from foveal.core import catalogue
from foveal.core.errors import BackboneError, DataError, FovealError, UsageError
from foveal.core.method import Classifier, Explain
from foveal.core.preprocessing import Preprocessing

SIZE, CLASSES = 64, 3
METHODS = catalogue.names("explain")
LIGHT = {"points": 4, "grid": 4, "samples": 8, "masks": 16, "steps": 4}
"""Options that set how much work is done, where a method has one of the name."""


def light(name: str) -> Explain:
    fields = {field.name for field in dataclasses.fields(catalogue.get(name).Options)}
    method = catalogue.create(name, **{key: value for key, value in LIGHT.items() if key in fields})
    assert isinstance(method, Explain)
    return method


def classifier(family: str) -> tuple[Classifier, Preprocessing]:
    backbone = backbone_of(family, SIZE)
    return Classifier(backbone, nn.Linear(backbone.width, CLASSES)).eval(), backbone.preprocessing


def images(count: int) -> Tensor:
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear")


def explain(method: Explain, model: Scorer, x: Tensor, target: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # random networks: undecided signs, constant scores
        return method.explain(model, x, target)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str, family: str):
    method = light(name)
    module, preprocessing = classifier(family)
    sizes: list[int] = []

    def answer(normalised: Tensor) -> Tensor:
        sizes.append(len(normalised))
        return module(normalised)

    model = OpenModel(module, preprocessing, answer=answer)
    x, target = images(3), torch.tensor([0, 2, 1])
    kept, before = (x.clone(), target.clone()), copy.deepcopy(module.state_dict())
    flags = [each.requires_grad for each in module.parameters()]
    try:
        maps = explain(method, model, x, target)
    except (BackboneError, UsageError) as refusal:
        assert len(str(refusal)) > 30, f"refusal says too little: {refusal}"
        assert hooks(module) == 0
        as_documented(name, family, "refuses")
        return
    assert maps.shape == (3, SIZE, SIZE)
    assert torch.isfinite(maps).all()
    assert not maps.requires_grad
    assert maps.flatten(1).std(1).max() > 0, "every map is flat"
    assert torch.equal(explain(light(name), model, x, target), maps), "the same seed gave another map"

    def untouched() -> None:
        assert hooks(module) == 0
        assert not any(each.training for each in module.modules())
        assert [each.requires_grad for each in module.parameters()] == flags
        assert all(each.grad is None for each in module.parameters())
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
        assert torch.equal(x, kept[0])
        assert torch.equal(target, kept[1])

    untouched()
    for row in range(3):
        alone = explain(method, model, x[row : row + 1], target[row : row + 1])[0]
        assert torch.allclose(alone, maps[row], atol=1e-3 * float(maps[row].abs().max())), "images see each other"

    sizes.clear()
    explain(method, model, images(BATCH + 8), torch.zeros(BATCH + 8, dtype=torch.int64))
    assert max(sizes) <= BATCH, "more images reach the network at once as more are explained"
    if "gradients" not in method.spec.needs:
        assert sum(sizes) == method.passes() * (BATCH + 8)

    calls = 0

    def crash(normalised: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        module.backbone(normalised)
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        explain(method, OpenModel(module, preprocessing, answer=crash), x, target)
    assert calls == 1
    untouched()
    with torch.no_grad():
        if "gradients" not in method.spec.needs:
            assert torch.equal(explain(method, model, x, target), maps)
    as_documented(name, family, "works")


@pytest.mark.parametrize("name", METHODS)
def test_what_needs_nothing_works_on_scores_alone(name: str):
    method = light(name)
    scorer = Scorer(lambda x: x.mean((2, 3)))
    if method.spec.needs:
        with pytest.raises((FovealError, AttributeError)):
            explain(method, scorer, images(1), torch.tensor([0]))
    else:
        assert explain(method, scorer, images(1), torch.tensor([0])).shape == (1, SIZE, SIZE)


@pytest.mark.parametrize("name", METHODS)
def test_images_of_another_range_are_refused(name: str):
    module, preprocessing = classifier("cnn")
    model = OpenModel(module, preprocessing)
    for wrong in (images(1) * 255, (images(1) - 0.5) / 0.1):
        with pytest.raises(DataError, match="expected 0 to 1"):
            explain(light(name), model, wrong, torch.tensor([0]))
    assert hooks(module) == 0


@pytest.mark.parametrize("name", METHODS)
def test_attribute_is_called_as_captums(name: str):
    module, preprocessing = classifier("cnn")
    model = OpenModel(module, preprocessing)
    x, method = images(2), light(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ours = method.on(model).attribute(x, target=1)
        assert ours.shape == x.shape
        assert torch.equal(ours[:, 0], explain(method, model, x, torch.tensor([1, 1])))
        assert torch.equal(method.on(model).attribute(x, torch.tensor([1, 1])), ours)
        best = model(x).argmax(1)
        assert torch.equal(method.on(model).attribute(x), method.on(model).attribute(x, best))
        with pytest.raises(UsageError, match="3 targets for 2 images"):
            method.on(model).attribute(x, torch.tensor([1, 1, 1]))
