"""The contract of every curate method that the catalogue finds, with features of a CNN, a plain ViT, a windowed ViT and
a hybrid where it reads features."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from tests.contract.capabilities import FAMILIES, as_documented, hooks

from foveal.backbones.adapter import Backbone, Plan, build, load_backbone, normalise
from foveal.core import catalogue
from foveal.core.errors import UsageError
from foveal.core.families.curate import Curate, Selection
from foveal.core.preprocessing import Preprocessing

SIZE = 64
METHODS = catalogue.names("curate")


def backbone_of(family: str) -> Backbone:
    torch.manual_seed(0)
    if family == "windowed":
        args = {"img_size": SIZE, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}
        plan = Plan(
            "swin", "swin_tiny_patch4_window7_224", args, Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3), 32, "random"
        )
        return Backbone(plan, build(plan)).eval()
    name = {"cnn": "test_efficientnet", "vit": "test_vit", "hybrid": "test_coatnet"}[family]
    return load_backbone(name, pretrained=False, size=SIZE).eval()


def images() -> np.ndarray:
    """Six pictures, five copies of each with a little noise: uint8 [30, SIZE, SIZE, 3]."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(30):
        coarse = np.random.default_rng(index % 6).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(float)
        made.append((picture + rng.normal(0, 1, picture.shape)).clip(0, 255).astype(np.uint8))
    return np.stack(made)


def variants(name: str) -> list[Curate]:
    """The method as it is, and reading features where it can."""
    methods = [catalogue.create(name)]
    if any(field.name == "by" for field in dataclasses.fields(catalogue.get(name).Options)):
        methods.append(catalogue.create(name, by="features"))
    assert all(isinstance(each, Curate) for each in methods)
    return methods  # type: ignore[return-value]


def same(a: Selection, b: Selection) -> bool:
    return (a.exemplar == b.exemplar).all() and (a.distance == b.distance).all() and list(a.reasons) == list(b.reasons)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str, family: str):
    backbone = backbone_of(family)
    pixels = images()
    groups = np.arange(30) % 2
    for method in variants(name):
        if method.reads() == "features":
            with torch.no_grad():
                seen = backbone(normalise(torch.from_numpy(pixels), backbone.preprocessing)).numpy()
        else:
            seen = np.stack([method.look(Image.fromarray(each)) for each in pixels])
        before, numbers = seen.copy(), groups.copy()
        selection = method.select(seen, groups, None)
        n = len(pixels)
        assert selection.exemplar.shape == selection.distance.shape == selection.score.shape == (n,)
        assert selection.kept[selection.exemplar].all(), "an image is stood for by one that was dropped"
        assert (groups[selection.exemplar] == groups).all(), "an image is stood for by one of another group"
        assert (selection.distance[selection.kept] == 0).all()
        assert np.isfinite(selection.distance).all()
        assert np.isfinite(selection.score).all()
        assert 2 <= selection.kept.sum() < n
        assert all(selection.reasons)
        assert len(selection.reasons) == n
        assert same(method.select(seen, groups, None), selection), "the same call chose others"
        assert (seen == before).all()
        assert (groups == numbers).all()
        fewer = method.select(seen, groups, 0.5)
        assert fewer.kept.sum() <= n // 2
        with pytest.raises(UsageError, match="cannot be met"):
            method.select(seen, np.arange(n), 0.5)
    assert hooks(backbone) == 0
    as_documented(name, family, "works")
