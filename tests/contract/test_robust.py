"""The contract of every robust method that the catalogue finds, on a CNN, a plain ViT, a windowed ViT and a hybrid.

Either the whole contract holds, or the method refuses the network with a clear message.
"""

import copy
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from tests.contract.capabilities import FAMILIES, as_documented, backbone_of, hooks
from torch import Tensor, nn

from foveal.backbones.pair import state_hash
from foveal.backbones.wrapper import Encoder, OpenModel
from foveal.core import catalogue
from foveal.core.errors import BackboneError, UsageError
from foveal.core.families.robust import Perturbation, Robust
from foveal.core.method import Classifier
from foveal.core.preprocessing import Preprocessing
from foveal.data.dataset import Dataset, Memory
from foveal.data.images import to_pixels
from foveal.data.worlds import garbage
from foveal.features.graph import to_onnx
from foveal.train.loop import train
from foveal.train.unlabelled import UnitImages

SIZE, IMAGES = 64, 8
METHODS = [catalogue.get(name) for name in catalogue.names("robust")]
EXAMINERS = [each.name for each in METHODS if issubclass(each, Robust) and each.examines()]
ATTACKS = [each.name for each in METHODS if each.name not in EXAMINERS]
LIGHT = {"candidates": 4, "width": 2, "steps": 2, "patches": 4000, "filters": 6}
"""Options that set how much work is done, where a method has one of the name."""


def light(name: str) -> Robust:
    fields = {field.name for field in dataclasses.fields(catalogue.get(name).Options)}
    method = catalogue.create(name, **{key: value for key, value in LIGHT.items() if key in fields})
    assert isinstance(method, Robust)
    return method


def classifier(family: str) -> tuple[Classifier, Preprocessing]:
    backbone = backbone_of(family, SIZE)
    return Classifier(backbone, nn.Linear(backbone.width, 3)).eval(), backbone.preprocessing


def images() -> Dataset:
    encoded: list[bytes] = []
    for picture in garbage(IMAGES, SIZE, 1):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    ids = [f"{index}.png" for index in range(IMAGES)]
    return Dataset("pictures", ids, np.zeros(IMAGES, np.int64), ("a",), "single-label", None, Memory(encoded))


DATA = images()


def to_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def learnt(name: str, encoder: Encoder, p: Preprocessing, work: Path, stop_after: int | None = None) -> Perturbation:
    """What `audit` does with a method; `stop_after` steps it is cut off as by a kill."""

    def cut(event: dict[str, Any]) -> None:
        if event.get("event") == "step" and event["step"] == stop_after:
            raise KeyboardInterrupt

    method = light(name)
    torch.manual_seed(3)
    recipe = dataclasses.replace(method.recipe(), epochs=2, batch_size=4)
    return train(
        method, method.attack(encoder, SIZE), UnitImages(DATA, np.arange(IMAGES), p), 3,
        recipe=recipe, device="cpu", work=work, on_event=cut,
    ).model  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ATTACKS)
def test_contract(name: str, family: str, tmp_path: Path):
    module, p = classifier(family)
    before, flags = copy.deepcopy(module.state_dict()), [each.requires_grad for each in module.parameters()]
    encoder = Encoder(module, p)
    hashed = state_hash(encoder)
    try:
        made = learnt(name, encoder, p, tmp_path / "work")
    except (BackboneError, UsageError) as refusal:
        assert len(str(refusal)) > 30, f"refusal says too little: {refusal}"
        as_documented(name, family, "refuses")
        return
    assert isinstance(made, Perturbation)
    assert state_hash(encoder) == hashed, "the encoder changed"
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert [each.requires_grad for each in module.parameters()] == flags
    assert all(each.grad is None for each in [*module.parameters(), *encoder.parameters()])
    assert hooks(module) == hooks(encoder) == 0

    again = learnt(name, encoder, p, tmp_path / "again")
    assert torch.equal(made.delta, again.delta), "the same seed gave another attack"
    with pytest.raises(KeyboardInterrupt):
        learnt(name, encoder, p, tmp_path / "cut", stop_after=3)
    assert torch.equal(learnt(name, encoder, p, tmp_path / "cut").delta, made.delta), "resumed, it ended elsewhere"

    x = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    attacked = made(x)
    assert torch.equal(x, kept)
    assert float(attacked.min()) >= 0
    assert float(attacked.max()) <= 1
    if not made.patch:
        assert float((attacked - x).abs().max()) <= float(made.budget) + 1e-6
    assert made.delta.abs().max() > 0
    assert torch.equal(attacked[:1], made(x[:1])), "images see each other"
    check_saved(made, x, attacked, tmp_path)
    as_documented(name, family, "works")


def check_saved(made: Perturbation, x: Tensor, attacked: Tensor, folder: Path) -> None:
    """Its state alone rebuilds it, and its ONNX form answers the same."""
    loaded = Perturbation(torch.zeros_like(made.delta), torch.zeros_like(made.mask), 0.0)
    loaded.load_state_dict(made.state_dict())
    assert torch.equal(loaded(x), attacked)
    to_onnx(made, (x,), folder / "attack.onnx", ["images"], ["attacked"], {"images": {0: "n"}, "attacked": {0: "n"}})
    session = onnxruntime.InferenceSession(str(folder / "attack.onnx"))
    assert np.allclose(session.run(None, {"images": x[:2].numpy()})[0], attacked[:2].numpy(), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", EXAMINERS)
def test_contract_of_examinations(name: str, family: str):
    module, p = classifier(family)
    before, flags = copy.deepcopy(module.state_dict()), [each.requires_grad for each in module.parameters()]
    x = torch.stack([to_tensor(to_pixels(DATA.image(row), p)) for row in range(IMAGES)])
    kept = x.clone()
    try:
        found = light(name).examine(OpenModel(module, p), x, 3)
    except (BackboneError, UsageError) as refusal:
        assert len(str(refusal)) > 30, f"refusal says too little: {refusal}"
        as_documented(name, family, "refuses")
        return
    assert torch.equal(x, kept)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert [each.requires_grad for each in module.parameters()] == flags
    assert all(each.grad is None for each in module.parameters())
    assert hooks(module) == 0
    assert len(found.verdict) > 30
    told = json.dumps(found.numbers, allow_nan=False)
    again = light(name).examine(OpenModel(module, p), x, 3)
    assert json.dumps(again.numbers) == told, "the same seed found something else"
    assert all(torch.equal(value, again.tensors[key]) for key, value in found.tensors.items())
    for section in found.sections:
        assert all(set(section.columns) | set(section.lines) <= set(row) for row in section.rows)
        for pixels in section.pictures.values():
            assert pixels.dtype == np.uint8
            assert pixels.shape[2:] == (3,)
    as_documented(name, family, "works")


@pytest.mark.parametrize("name", EXAMINERS)
def test_a_crash_in_an_examined_network_leaves_nothing_behind(name: str):
    module, p = classifier("cnn")
    flags = [each.requires_grad for each in module.parameters()]
    module.head = nn.Linear(1, 1)
    with pytest.raises(RuntimeError):
        light(name).examine(OpenModel(module.eval(), p), torch.rand(2, 3, SIZE, SIZE), 0)
    assert hooks(module) == 0
    assert [each.requires_grad for each in module.parameters()] == flags


@pytest.mark.parametrize("name", [*ATTACKS, *EXAMINERS])
def test_what_a_method_does_not_do_it_says(name: str):
    if name in EXAMINERS:
        with pytest.raises(UsageError, match=f"{name} does not attack: `examine` is what it has"):
            light(name).attack(nn.Identity(), SIZE)
    else:
        with pytest.raises(UsageError, match=f"{name} examines nothing: it attacks"):
            light(name).examine(nn.Identity(), torch.rand(1, 3, 8, 8), 0)
    if type(light(name)).defend is Robust.defend:
        with pytest.raises(UsageError, match=f"{name} does not defend"):
            light(name).defend(nn.Identity())


@pytest.mark.parametrize("name", ATTACKS)
def test_a_crash_in_the_encoder_leaves_nothing_behind(name: str, tmp_path: Path):
    module, p = classifier("cnn")

    class Breaks(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise ArithmeticError

    encoder = Encoder(Breaks().eval(), p)
    with pytest.raises(ArithmeticError):
        learnt(name, encoder, p, tmp_path)
    assert hooks(module) == hooks(encoder) == 0
