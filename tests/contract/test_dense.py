"""The contract of every dense method that the catalogue finds, on a CNN, a plain ViT, a windowed ViT and a hybrid.

Either the whole contract holds, or the method refuses the backbone with a clear message.
"""

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tests.contract.capabilities import FAMILIES, as_documented, backbone_of, hooks
from torch import Tensor, nn

from foveal.backbones.adapter import normalise
from foveal.core import catalogue
from foveal.core.errors import BackboneError, UsageError
from foveal.core.families.dense import Dense
from foveal.core.options import options_to_dict, parse_options
from foveal.core.preprocessing import Preprocessing
from foveal.data.photos import warped
from foveal.data.points import Points, in_memory
from foveal.features.graph import to_onnx
from foveal.train.landmarks import LandmarkFeed
from foveal.train.loop import train

SIZE, METHODS = 64, catalogue.names("dense")
LIGHT = {"epochs": 1, "batch_size": 4}


@pytest.fixture(scope="module")
def points() -> Points:
    return in_memory(*warped(8, SIZE, 0))


def light(name: str) -> Dense:
    fields = {field.name for field in dataclasses.fields(catalogue.get(name).Options)}
    method = catalogue.create(name, **{key: value for key, value in LIGHT.items() if key in fields})
    assert isinstance(method, Dense)
    return method


def attached(name: str, family: str) -> tuple[nn.Module, Preprocessing]:
    backbone = backbone_of(family, SIZE)
    torch.manual_seed(1)
    return light(name).attach(backbone, 10), backbone.preprocessing


def trained(name: str, family: str, points: Points, work: Path) -> nn.Module:
    method, (model, preprocessing) = light(name), attached(name, family)
    feed = LandmarkFeed(points, preprocessing, views=method.views())
    return train(method, model, feed, seed=0, recipe=method.recipe(), device="cpu", work=work).model


class Located(nn.Module):
    """The network and its reading, as one module: normalised images -> points, scores."""

    def __init__(self, method: Dense, model: nn.Module) -> None:
        super().__init__()
        self.method, self.model = method, model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.method.locate(self.model, images)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str, family: str, points: Points, tmp_path: Path):
    method = light(name)
    try:
        model, preprocessing = attached(name, family)
    except (BackboneError, UsageError) as refusal:
        assert len(str(refusal)) > 30, f"refusal says too little: {refusal}"
        as_documented(name, family, "refuses")
        return
    images = torch.randint(0, 256, (2, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = normalise(images, preprocessing)
    kept = x.clone()
    untrained = method.locate(model.eval(), x)[0].detach()
    first = trained(name, family, points, tmp_path / "first")
    again = trained(name, family, points, tmp_path / "again")
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), f"the same seed gave another {key}"
    with torch.no_grad():
        places, sure = method.locate(first, x)
    assert places.shape == (2, 10, 2)
    assert sure.shape == (2, 10)
    assert torch.isfinite(places).all()
    assert ((places >= -0.5) & (places <= SIZE - 0.5)).all()
    assert ((sure >= 0) & (sure <= 1)).all()
    assert not torch.equal(places, untrained), "training changed nothing"
    assert torch.equal(x, kept), "its argument changed"
    assert hooks(first) == 0
    assert not first.training

    stored = {key: value.clone() for key, value in first.state_dict().items()}
    other, _ = attached(name, family)
    other.load_state_dict(stored)
    with torch.no_grad():
        assert torch.equal(method.locate(other.eval(), x)[0], places), "saved and loaded it answers otherwise"
        alone = torch.cat([method.locate(first, one)[0] for one in x.split(1)])
        assert torch.allclose(alone, places, atol=1e-2), "images see each other"

    file = tmp_path / "net.onnx"
    to_onnx(Located(method, first).eval(), (x,), file, ["images"], ["points", "scores"], {"images": {0: "N"}})
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    exported = np.asarray(session.run(None, {"images": x[:1].numpy()})[0])
    assert np.abs(exported - places[:1].numpy()).max() < 0.05
    as_documented(name, family, "works")


@pytest.mark.parametrize("name", METHODS)
def test_a_crash_leaves_no_hooks(name: str, points: Points, tmp_path: Path):
    model, preprocessing = attached(name, "cnn")

    class Crash(LandmarkFeed):
        def ready(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            raise ArithmeticError

    method = light(name)
    with pytest.raises(ArithmeticError):
        train(method, model, Crash(points, preprocessing), 0, recipe=method.recipe(), device="cpu", work=tmp_path)
    assert hooks(model) == 0


@pytest.mark.parametrize("name", METHODS)
def test_options_go_to_json_and_back(name: str):
    method = light(name)
    again = parse_options(type(method).Options, options_to_dict(method.options), name)
    assert again == method.options
    assert "landmarks" in method.spec.tasks
