"""The contract of every language method of the catalogue, on a CNN, a plain ViT, a windowed ViT and a hybrid."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from tests.contract.capabilities import FAMILIES, as_documented, backbone_of, hooks

from foveal.backbones.causal_text import CausalText, describe_text, rebuild_text
from foveal.core import catalogue
from foveal.core.errors import BackboneError, UsageError
from foveal.core.families.language import Language
from foveal.data.captioned import digit_pairs
from foveal.features.graph import to_onnx
from foveal.features.towers import encode_images, encode_texts
from foveal.ship.bundle import save_weights
from foveal.train.loop import train
from foveal.train.pairs import PairFeed

SIZE = 64
HALF = (0.5, 0.5, 0.5)
METHODS = catalogue.names("language")
LIGHT = {"text": "scratch", "dim": 8, "epochs": 2, "batch_size": 6, "lr": 1e-3}
"""Options that set how much work is done, where a method has one of the name."""


def light(name: str) -> Language:
    fields = {field.name for field in dataclasses.fields(catalogue.get(name).Options)}
    method = catalogue.create(name, **{key: value for key, value in LIGHT.items() if key in fields})
    assert isinstance(method, Language)
    return method


def start(name: str, family: str) -> tuple[Language, Any]:
    method, backbone = light(name), backbone_of(family, SIZE)
    torch.manual_seed(1)
    return method, method.attach(backbone, CausalText(16, 1, context=32))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str, family: str, tmp_path: Path):
    pairs = digit_pairs(12, 2, 4, 0)
    assert pairs.images.splits is not None
    texts_before = copy.deepcopy(pairs.texts)
    try:
        method, towers = start(name, family)
    except (BackboneError, UsageError) as refusal:
        assert len(str(refusal)) > 30, f"refusal says too little: {refusal}"
        as_documented(name, family, "refuses")
        return
    before = copy.deepcopy(towers.state_dict())
    p = towers.image.preprocessing
    learnt, held = pairs.subset(pairs.images.splits == "train"), pairs.subset(pairs.images.splits != "train")

    def trained(model: Any, work: str) -> Any:
        feed = PairFeed(learnt, p, model.text, method.crop())
        return train(method, model, feed, 0, recipe=method.recipe(), device="cpu", work=tmp_path / work).model

    model, again = trained(towers, "one"), trained(start(name, family)[1], "two")
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in again.state_dict().items()), "same seed, other weights"
    assert any(not torch.equal(value, after[key]) for key, value in before.items() if key.startswith("image.")), (
        "the image tower did not learn"
    )
    assert hooks(model) == 0
    assert pairs.texts == texts_before

    vectors = encode_images(model, held.images, p, device="cpu")
    words = encode_texts(model, ["one then two", "three then four"], device="cpu")
    assert torch.allclose(vectors.norm(dim=1), torch.ones(len(held)), atol=1e-5)
    assert float((vectors @ words.T).abs().max()) <= 1 + 1e-5

    save_weights(model, tmp_path / "weights.safetensors")
    text = rebuild_text(describe_text(model.text), model.text.tokenizer)
    loaded: Any = method.finish(method.attach(backbone_of(family, SIZE), text))
    loaded.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(encode_images(loaded, held.images, p, device="cpu"), vectors)
    assert torch.equal(encode_texts(loaded, ["one then two", "three then four"], device="cpu"), words)

    classifier = model.classifier(words)
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    graph = tmp_path / "labels.onnx"
    to_onnx(classifier, (pixels,), graph, ["images"], ["logits"], {"images": {0: "N"}, "logits": {0: "N"}})
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": pixels.numpy()})
    with torch.inference_mode():
        assert np.allclose(np.asarray(found), classifier(pixels).numpy(), atol=1e-3)
    as_documented(name, family, "works")


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_left_after_a_crash(name: str, tmp_path: Path):
    method, towers = start(name, "cnn")
    pairs = digit_pairs(12, 2, 4, 0)
    feed = PairFeed(pairs, towers.image.preprocessing, towers.text, method.crop())

    def crash(images: Any) -> Any:
        raise ArithmeticError

    towers.image.model.forward_head = crash
    with pytest.raises(ArithmeticError):
        train(method, towers, feed, 0, recipe=method.recipe(), device="cpu", work=tmp_path)
    assert hooks(towers) == 0
