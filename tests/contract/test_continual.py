"""The contract of every continual method that the catalogue finds, on a CNN, a plain ViT, a windowed ViT and a hybrid.

Either the whole contract holds, or the method refuses the network with a clear message.
"""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tests.contract.capabilities import FAMILIES, as_documented, backbone_of, hooks
from torch import Tensor, nn

from foveal.backbones.adapter import normalise
from foveal.core import catalogue
from foveal.core.errors import BackboneError, UsageError
from foveal.core.families.continual import Continual, Stage
from foveal.core.method import Classifier
from foveal.core.preprocessing import Preprocessing
from foveal.data.dataset import Dataset, Memory
from foveal.data.images import to_pixels
from foveal.data.samples import png
from foveal.data.worlds import garbage
from foveal.features.graph import to_onnx
from foveal.train.stream import learn

SIZE, OLD, NEW, IMAGES = 64, 2, 2, 16
METHODS = catalogue.names("continual")
LIGHT = {"width": 32, "augment": "none", "epochs": 2, "balance": 1, "batch_size": 8}
"""Options that set how much work is done, where a method has one of the name."""


def light(name: str) -> Continual:
    fields = {field.name for field in dataclasses.fields(catalogue.get(name).Options)}
    method = catalogue.create(name, **{key: value for key, value in LIGHT.items() if key in fields})
    assert isinstance(method, Continual)
    return method


def classifier(family: str) -> tuple[Classifier, Preprocessing]:
    backbone = backbone_of(family, SIZE)
    return Classifier(backbone, nn.Linear(backbone.width, OLD)).eval(), backbone.preprocessing


def images() -> Dataset:
    labels = np.arange(IMAGES) % (OLD + NEW)
    pictures = garbage(IMAGES, SIZE, 1) // 2
    for picture, label in zip(pictures, labels, strict=True):
        picture[..., label % 3] += 120
    ids = [f"{index:02d}.png" for index in range(IMAGES)]
    source = Memory([png(picture) for picture in pictures])
    return Dataset("tinted", ids, labels, tuple("abcd"), "single-label", None, source)


DATA = images()


def pixels_of(p: Preprocessing) -> Tensor:
    return normalise(torch.from_numpy(np.stack([to_pixels(DATA.image(row), p) for row in range(IMAGES)])), p)


def make(name: str, old: Classifier, p: Preprocessing, work: Path, stop: int | None = None) -> Classifier:
    """What `update` does with a method; after `stop` steps it is cut off as by a kill."""
    method, seen = light(name), {"steps": 0}

    def cut(event: dict[str, Any]) -> None:
        seen["steps"] += event["event"] == "step"
        if seen["steps"] == stop:
            raise KeyboardInterrupt

    torch.manual_seed(3)
    grown = method.grow(old, NEW)
    return learn(
        method, old, grown, DATA, DATA.labels, np.arange(IMAGES), p, 3,
        work=work, per_class=3, device="cpu", on_event=cut,
    )[0]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str, family: str, tmp_path: Path):
    old, p = classifier(family)
    before, flags = copy.deepcopy(old.state_dict()), [each.requires_grad for each in old.parameters()]
    method = light(name)
    x = pixels_of(p)
    try:
        torch.manual_seed(3)
        grown = method.grow(old, NEW)
    except (BackboneError, UsageError) as refusal:
        assert len(str(refusal)) > 30, f"refusal says too little: {refusal}"
        as_documented(name, family, "refuses")
        return
    with torch.no_grad():
        logits = old(x)
        assert torch.equal(grown.eval()(x)[:, :OLD], logits), "growing moved the old answers"
        assert grown(x).shape == (IMAGES, OLD + NEW)

    made, again = (make(name, old, p, tmp_path / place) for place in ("work", "again"))
    assert all(torch.equal(value, before[key]) for key, value in old.state_dict().items()), "the old model changed"
    assert [each.requires_grad for each in old.parameters()] == flags
    assert hooks(old) == hooks(made) == 0
    with torch.no_grad():
        answers = made(x)
        assert torch.isfinite(answers).all()
        assert not torch.equal(answers[:, OLD:], grown(x)[:, OLD:]), "nothing was learnt"
        assert torch.allclose(made.head(made.features(x)), answers, atol=1e-5)
        assert made.head(torch.zeros(1, made.width)).shape == (1, OLD + NEW)
        if method.given(grown, x[:1]) is not None:
            assert torch.equal(answers[:, :OLD], logits), "a method that freezes what is old moved it"

        assert torch.equal(again(x), answers), "the same seed gave another result"
        plan = json.loads(json.dumps(method.plan(old, grown)))
        assert method.added(plan) == NEW
        loaded = light(name).rebuild(classifier(family)[0], plan)
        loaded.load_state_dict({key: value.clone() for key, value in made.state_dict().items()})
        assert torch.equal(loaded.eval()(x), answers), "saving and loading changed the answers"

    with pytest.raises(KeyboardInterrupt):
        make(name, old, p, tmp_path / "cut", stop=3)
    resumed = make(name, old, p, tmp_path / "cut")
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in made.state_dict().items())

    to_onnx(made, (x[:2],), tmp_path / "model.onnx", ["images"], ["logits"], {"images": {0: "n"}, "logits": {0: "n"}})
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    assert np.abs(session.run(None, {"images": x.numpy()})[0] - answers.numpy()).max() < 1e-4
    as_documented(name, family, "works")


@pytest.mark.parametrize("name", METHODS)
def test_classes_may_come_again_and_again(name: str):
    model, p = classifier("vit")
    x = pixels_of(p)
    method = light(name)
    for more in (1, 3):
        with torch.no_grad():
            before = model(x)
            model = method.grow(model, more).eval()
            assert torch.equal(model(x)[:, : before.shape[1]], before)
    assert model(x).shape == (IMAGES, OLD + 4)
    with pytest.raises(UsageError, match="0 new classes"):
        method.grow(model, 0)


@pytest.mark.parametrize("name", METHODS)
def test_stages_have_names_and_recipes(name: str):
    stages = light(name).stages()
    assert len({stage.name for stage in stages}) == len(stages) >= 1
    assert all(isinstance(stage, Stage) and stage.recipe.epochs >= 1 for stage in stages)
