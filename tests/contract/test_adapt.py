"""The contract of every adapt method that the catalogue finds, on a CNN, a plain ViT, a windowed ViT and a hybrid.

Either the whole contract holds, or the method refuses the backbone with a clear message.
"""

import copy
import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.contract.capabilities import FAMILIES, as_documented, backbone_of, hooks
from torch import Tensor

from foveal.backbones.adapter import Backbone, normalise
from foveal.core import catalogue
from foveal.core.errors import BackboneError, UsageError
from foveal.core.method import Adapt, Classifier, trainable
from foveal.core.preprocessing import Preprocessing
from foveal.data.dataset import Dataset, Memory
from foveal.data.worlds import garbage
from foveal.evaluate.calibration import Calibrated
from foveal.evaluate.ood import choose_ood
from foveal.ship.bundle import save_weights
from foveal.ship.export import export_onnx
from foveal.train.classify import train_classifier

SIZE, CLASSES, IMAGES = 64, 3, 18
METHODS = catalogue.names("adapt")


def images() -> Dataset:
    """Procedural images whose class can be seen in their colour."""
    labels = np.arange(IMAGES) % CLASSES
    encoded: list[bytes] = []
    for picture, label in zip(garbage(IMAGES, 72, 1), labels, strict=True):
        tinted = picture // 2
        tinted[..., label] += 120
        buffer = io.BytesIO()
        Image.fromarray(tinted).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    ids = [f"{index:02d}.png" for index in range(IMAGES)]
    return Dataset("tinted", ids, labels, ("blue", "green", "red"), "single-label", None, Memory(encoded))


DATA = images()
ROWS = np.arange(IMAGES)


def pixels_of(preprocessing: Preprocessing) -> Tensor:
    from foveal.data.images import to_pixels

    return torch.from_numpy(np.stack([to_pixels(DATA.image(row), preprocessing) for row in ROWS]))


def make(method: Adapt, base: Backbone, work: Path, stop_after: int | None = None) -> Classifier:
    """What `fit` does with a method, on eighteen images; `stop_after` steps it is cut off as by a kill."""
    y = torch.from_numpy(DATA.labels)
    if method.reads_features():
        with torch.inference_mode():
            X = base(normalise(pixels_of(base.preprocessing), base.preprocessing))
        X = X.clone()
        before = X.clone()
        weights = torch.ones(IMAGES)
        head = method.fit_features(X, y, weights, seed=3)
        assert torch.equal(X, before), "fit_features changed X"
        assert torch.equal(weights, torch.ones(IMAGES)), "fit_features changed the weights"
        return Classifier(base, head).eval()

    def cut(event: dict[str, Any]) -> None:
        if event.get("event") == "step" and event["step"] == stop_after:
            raise KeyboardInterrupt

    torch.manual_seed(3)
    model = method.attach(base, CLASSES)
    recipe = dataclasses.replace(method.recipe(), epochs=2, batch_size=6)
    return train_classifier(
        method, model, DATA, base.preprocessing, DATA.labels, ROWS, ROWS[:0], torch.ones(CLASSES), 3,
        recipe=recipe, device="cpu", work=work, on_event=cut,
    ).model  # fmt: skip


def rebuild(method: Adapt, family: str, weights: dict[str, Tensor]) -> Classifier:
    empty = backbone_of(family, SIZE)
    if method.reads_features():
        head = method.head(
            {name.removeprefix("head."): value.shape for name, value in weights.items() if name.startswith("head.")}
        )
        model = Classifier(empty, head)
    else:
        model = method.finish(method.attach(empty, CLASSES))
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str, family: str, tmp_path: Path):
    method = catalogue.create(name)
    assert isinstance(method, Adapt)
    given = backbone_of(family, SIZE)
    before = copy.deepcopy(given.state_dict())
    try:
        made = make(method, copy.deepcopy(given), tmp_path / "work")
    except (BackboneError, UsageError) as refusal:
        assert not method.reads_features(), "a frozen-feature method must take every backbone"
        assert len(str(refusal)) > 30, f"refusal says too little: {refusal}"
        assert given.arch in str(refusal) or name in str(refusal)
        as_documented(name, family, "refuses")
        return
    assert all(torch.equal(value, before[key]) for key, value in given.state_dict().items())
    assert hooks(made) == 0

    again = make(catalogue.create(name), backbone_of(family, SIZE), tmp_path / "again")
    x = normalise(pixels_of(given.preprocessing), given.preprocessing)
    with torch.inference_mode():
        logits = made(x)
        assert torch.equal(again(x), logits), "the same seed gave another result"
        assert logits.shape == (IMAGES, CLASSES)
        assert torch.isfinite(logits).all()
        assert torch.allclose(made.head(made.features(x)), logits, atol=1e-5)

        loaded = rebuild(method, family, {key: value.clone() for key, value in made.state_dict().items()})
        assert torch.equal(loaded(x), logits), "saving and loading changed the answers"

    if not method.reads_features():
        with pytest.raises(KeyboardInterrupt):
            make(catalogue.create(name), backbone_of(family, SIZE), tmp_path / "cut", stop_after=4)
        resumed = make(catalogue.create(name), backbone_of(family, SIZE), tmp_path / "cut")
        for key, value in made.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), f"resumed training ended with another {key}"
        check_gradients(method, family)
    check_export(made, given.preprocessing, tmp_path)
    as_documented(name, family, "works")


def check_gradients(method: Adapt, family: str) -> None:
    """Exactly what `trainable` names gets a gradient; frozen parts keep their batch-norm statistics."""
    model = method.attach(backbone_of(family, SIZE), CLASSES)
    declared = {key for key, _ in trainable(model)}
    batch = {
        "images": normalise(pixels_of(model.backbone.preprocessing), model.backbone.preprocessing),
        "labels": torch.from_numpy(DATA.labels),
        "class_weights": torch.ones(CLASSES),
    }
    model.train()
    method.loss(model, batch)["loss"].backward()
    assert {key for key, p in model.named_parameters() if p.grad is not None} == declared


def check_export(made: Classifier, preprocessing: Preprocessing, folder: Path) -> None:
    """The ONNX model answers as the torch model, from uint8 images."""
    x = normalise(pixels_of(preprocessing), preprocessing)
    junk = normalise(torch.from_numpy(garbage(8, preprocessing.size, 5)), preprocessing)
    with torch.inference_mode():
        features, strange = made.features(x), made.features(junk)
        score, record = choose_ood(
            features.numpy(), DATA.labels, features.numpy(), made.head(features).numpy(),
            strange.numpy(), made.head(strange).numpy(),
        )  # fmt: skip
        model = Calibrated(made, 1.3, score).eval()
        expected, unknown = model(x)
    save_weights(model, folder / "model.safetensors")
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()
    pictures = [DATA.image(int(row)) for row in ROWS]
    export_onnx(
        model,
        preprocessing,
        folder / "model.onnx",
        images=pictures,
        classes=DATA.classes,
        threshold=record["threshold"],
    )
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    batch = np.stack([np.asarray(picture) for picture in pictures])
    probabilities, scores = session.run(None, {session.get_inputs()[0].name: batch})
    assert np.abs(probabilities - expected.numpy()).max() < 1e-4
    assert np.allclose(scores, unknown.numpy(), rtol=1e-3, atol=1e-3)
