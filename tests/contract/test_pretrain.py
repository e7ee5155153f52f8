"""The contract of every pretrain method that the catalogue finds, on a CNN, a plain ViT, a windowed ViT and a hybrid.

Either the whole contract holds, or the method refuses the backbone with a clear message.
"""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.contract.capabilities import FAMILIES, as_documented, backbone_of, hooks
from tests.train.helpers import tiny_dataset
from torch import Tensor

from foveal.backbones.adapter import Backbone
from foveal.core import catalogue
from foveal.core.errors import BackboneError, FovealError, UsageError
from foveal.core.families.pretrain import Pretrain
from foveal.core.seeds import seed_everything
from foveal.train.events import Event, TrainResult
from foveal.train.loop import train
from foveal.train.views import ViewFeed

SIZE = 64
METHODS = catalogue.names("pretrain")
LIGHT = {"epochs": 1, "batch_size": 4, "decoder_width": 32}
"""Options that set how much work is done, where a method has one of the name."""
DATASET = tiny_dataset(12)


def light(name: str) -> Pretrain:
    fields = {field.name for field in dataclasses.fields(catalogue.get(name).Options)}
    method = catalogue.create(name, **{key: value for key, value in LIGHT.items() if key in fields})
    assert isinstance(method, Pretrain)
    return method


def feed(method: Pretrain, net: Backbone) -> ViewFeed:
    return ViewFeed(DATASET, net.preprocessing, method.views(), "tiny")


def run(method: Pretrain, family: str, work: Path, stop_at: int = 0) -> TrainResult:
    net = backbone_of(family, SIZE)
    seed_everything(3)
    model = method.attach(net)

    def tell(event: Event) -> None:
        if stop_at and event.get("step") == stop_at:
            raise KeyboardInterrupt

    return train(method, model, feed(method, net), 1, recipe=method.recipe(), device="cpu", work=work, on_event=tell)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    method = light(name)
    net = backbone_of(family, SIZE)
    start = copy.deepcopy(net.state_dict())
    try:
        model = method.attach(net)
    except (BackboneError, UsageError) as refusal:
        assert len(str(refusal)) > 30, f"refusal says too little: {refusal}"
        assert hooks(net) == 0
        assert all(torch.equal(value, start[key]) for key, value in net.state_dict().items())
        as_documented(name, family, "refuses")
        return
    assert all(torch.equal(value, start[key]) for key, value in net.state_dict().items()), "attaching changed weights"
    assert hooks(model) == 0

    views = images(8).view(4, 2, 3, SIZE, SIZE)[:, :1].expand(-1, method.views().count, -1, -1, -1).contiguous()
    kept = views.clone()
    torch.manual_seed(0)
    parts = method.loss(model.train(), {"views": views})
    assert torch.equal(views, kept)
    assert parts["loss"].ndim == 0
    assert torch.isfinite(parts["loss"])
    parts["loss"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters()), "the backbone learns nothing"
    assert hooks(model) == 0

    with torch.no_grad():
        for caption, shown in method.pictures(model.eval(), images(2)).items():
            assert caption
            assert shown.shape == (2, 3, SIZE, SIZE)
            assert torch.isfinite(shown).all()

    with monkeypatch.context() as patch:

        def crash(*_: object, **__: object) -> None:
            raise ArithmeticError

        last = [module for module in net.modules() if not list(module.children())][-1]
        inside = next(module for module in net.modules() if isinstance(module, torch.nn.Conv2d))
        for each in (inside, last):
            patch.setattr(each, "forward", crash)
        with pytest.raises(ArithmeticError):
            method.loss(model, {"views": views})
    assert hooks(model) == 0

    first = run(method, family, tmp_path / "first").model
    assert hooks(first) == 0
    assert all(p.requires_grad for p in first.parameters())
    plain = backbone_of(family, SIZE)
    plain.load_state_dict(first.state_dict(), strict=True)
    with torch.no_grad():
        for batch in (3, 1):
            assert torch.equal(plain.eval()(images(batch)), first(images(batch)))
    assert any(not torch.equal(value, start[key]) for key, value in first.state_dict().items())

    def same(other: Backbone) -> bool:
        mine = first.state_dict()
        return all(torch.equal(value, mine[key]) for key, value in other.state_dict().items())

    assert same(run(method, family, tmp_path / "second").model), "the same seed gave other weights"
    with pytest.raises(KeyboardInterrupt):
        run(method, family, tmp_path / "killed", stop_at=2)
    monkeypatch.setattr("foveal.train.loop.SAVE_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run(method, family, tmp_path / "killed", stop_at=3)
    assert same(run(method, family, tmp_path / "killed").model), "resumed it came to other weights"
    as_documented(name, family, "works")


@pytest.mark.parametrize("name", METHODS)
def test_views_are_images_of_the_backbones_size(name: str):
    method, net = light(name), backbone_of("cnn", SIZE)
    views = method.views()
    low, high = views.area
    assert 0 < low <= high <= 1
    example = feed(method, net).example(0, np.random.default_rng(0))["views"]
    assert example.shape == (views.count, SIZE, SIZE, 3)
    assert example.dtype == np.uint8


@pytest.mark.parametrize("name", METHODS)
def test_another_family_s_options_are_refused(name: str):
    with pytest.raises(FovealError, match="unknown"):
        catalogue.create(name, nonsense=1)
