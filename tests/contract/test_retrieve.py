"""The contract of every retrieve method of the catalogue, on a CNN, a plain ViT, a windowed ViT and a hybrid."""

import copy
import dataclasses
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.contract.capabilities import FAMILIES, as_documented, hooks
from tests.contract.test_curate import backbone_of

from foveal.backbones.adapter import Backbone, build, normalise
from foveal.core import catalogue
from foveal.core.bundle import sha256
from foveal.core.errors import BackboneError, UsageError
from foveal.core.families.retrieve import Embedding, Retrieve
from foveal.data.dataset import Dataset, Memory
from foveal.data.images import to_pixels
from foveal.features.session import feature_session
from foveal.ship.embedder import Embedder, embedder_of
from foveal.ship.library import WEIGHTS, create_library
from foveal.train.loop import train
from foveal.train.pool import PoolImages

METHODS = catalogue.names("retrieve")
LIGHT = {"clusters": 4, "width": 8, "epochs": 2, "every": 1, "batch_size": 8, "each": 2, "turned": 2, "lr": 1e-3}
"""Options that set how much work is done, where a method has one of the name."""


def light(name: str) -> Retrieve:
    fields = {field.name for field in dataclasses.fields(catalogue.get(name).Options)}
    method = catalogue.create(name, **{key: value for key, value in LIGHT.items() if key in fields})
    assert isinstance(method, Retrieve)
    return method


def pool() -> Dataset:
    """Sixteen pictures of four kinds. Their labels are NaN: whoever reads them fails."""
    files = []
    for index in range(16):
        coarse = np.random.default_rng(index % 4).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        noise = np.random.default_rng(index).integers(0, 40, (6, 6, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse // 2 + noise).resize((64, 64), Image.Resampling.BICUBIC).save(buffer, "PNG")
        files.append(buffer.getvalue())
    ids = [f"{index:02d}.png" for index in range(16)]
    return Dataset("pool", ids, np.full(16, np.nan), ("x",), "single-label", None, Memory(files))


def fitted(
    method: Retrieve, backbone: Backbone, dataset: Dataset, work: Path, budget: float | None = None
) -> Embedding:
    own = Backbone(backbone.plan, build(backbone.plan))
    own.load_state_dict(backbone.state_dict())
    torch.manual_seed(0)
    model = method.attach(own, len(dataset))
    feed = PoolImages(dataset, model, method, own.preprocessing, method.recipe())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # two epochs teach nothing
        return train(method, model, feed, 0, recipe=method.recipe(), device="cpu", work=work, budget_s=budget).model


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str, family: str, tmp_path: Path):
    backbone, dataset = backbone_of(family), pool()
    before = copy.deepcopy(backbone.state_dict())
    try:
        embedding = fitted(light(name), backbone, dataset, tmp_path / "a")
    except (BackboneError, UsageError) as refusal:
        assert len(str(refusal)) > 30, f"refusal says too little: {refusal}"
        as_documented(name, family, "refuses")
        return
    assert hooks(embedding) == 0
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert any(not torch.equal(value, before[key]) for key, value in embedding.backbone.state_dict().items())

    fitted(light(name), backbone, dataset, tmp_path / "b", budget=1e-9)  # stopped after a step
    again = fitted(light(name), backbone, dataset, tmp_path / "b")
    ours, theirs = embedding.state_dict(), again.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours), "a run that was stopped ended elsewhere"

    pixels = np.stack([to_pixels(dataset.image(row), backbone.preprocessing) for row in range(4)])
    with torch.no_grad():
        expected = embedding(normalise(torch.from_numpy(pixels), backbone.preprocessing)).numpy()
    assert np.allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)
    assert isinstance(embedding.backbone, Backbone)
    embedder = Embedder(embedding.backbone, embedding.head.requires_grad_(False))
    (tmp_path / "library").mkdir()
    embedder.save(tmp_path / "library" / WEIGHTS)
    about = {**embedder.describe(), "weights": sha256(tmp_path / "library" / WEIGHTS)}
    if embedder.backbone.plan.args.keys() <= {"img_size"}:
        loaded = embedder_of(create_library(tmp_path / "library", about), offline=True)
        stored = loaded.head.state_dict() if loaded.head is not None else {}
        assert all(torch.equal(value, stored[key]) for key, value in embedding.head.state_dict().items())
        embedder = loaded
    vectors = embedder.vectors(feature_session(embedder.backbone, device="cpu")(pixels))
    assert np.abs(vectors - expected).max() < 2e-3, "the fast session answers otherwise than torch"
    as_documented(name, family, "works")
