"""A ViT made parallel and tuned: what is trained, what is merged, and what its plan gives back."""

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from tests.methods.adapt.small_backbones import images, random_backbone, small_cnn, small_vit
from torch import Tensor, nn

from foveal.architectures.three_things_vit import merge_branches, parallelize
from foveal.core.errors import BackboneError, UsageError
from foveal.core.families.shrink import TaskData
from foveal.core.method import Classifier, classification_loss
from foveal.methods.accelerate.expedit import Expedit
from foveal.methods.accelerate.expedit import Options as ExpeditOptions
from foveal.methods.accelerate.three_things_vit import Options, ThreeThingsVit


def classifier(backbone: Any = None) -> Classifier:
    backbone = backbone or small_vit(depth=4)
    torch.manual_seed(2)
    return Classifier(backbone, nn.Linear(backbone.width, 3)).eval()


class Data(TaskData):
    """Six images, plain gradient steps, and what the method asked for."""

    def __init__(self) -> None:
        self.batch = {"images": images(6), "labels": torch.arange(6) % 3, "class_weights": torch.ones(3)}
        self.calls: list[tuple[int, float]] = []
        self.tuned: Classifier | None = None

    def batches(self, images: int, size: int) -> Iterator[Mapping[str, Tensor]]:
        yield self.batch

    def tune(self, model: Classifier, steps: int, lr: float) -> Classifier:
        self.calls.append((steps, lr))
        optimizer = torch.optim.SGD(model.parameters(), lr)
        for _ in range(steps):
            optimizer.zero_grad()
            classification_loss(model(self.batch["images"]), self.batch).backward()
            optimizer.step()
        self.tuned = copy.deepcopy(model).eval()
        return model.eval()

    def progress(self, done: int, total: int) -> None: ...


def test_without_images_it_is_the_surgery_alone():
    model = classifier()
    made = ThreeThingsVit().shrink(model, None, None)
    whole = parallelize(model.backbone.model)
    with torch.no_grad():
        expected = model.head(whole(images()))
        torch.testing.assert_close(made.module(images()), expected, atol=1e-3, rtol=1e-4)
        assert torch.equal(made.module(images()), model.head(merge_branches(whole)(images())))
        assert not torch.allclose(made.module(images()), model(images()), atol=1e-2)
    assert made.notes == {"blocks": "4 x 1 -> 2 x 2", "merged": True, "tuned": 0}
    assert len(model.backbone.blocks) == 4


def test_all_of_the_parallel_network_is_tuned_then_merged():
    model, data = classifier(small_vit(depth=4).requires_grad_(False)), Data()
    before = copy.deepcopy(model.state_dict())
    made = ThreeThingsVit(Options(k=4, steps=5, lr=1e-3)).shrink(model, data, None)
    assert data.calls == [(5, 1e-3)]
    assert data.tuned is not None
    with torch.no_grad():
        torch.testing.assert_close(made.module(images()), data.tuned(images()), atol=1e-3, rtol=1e-4)
        batch = data.batch
        losses = [
            float(classification_loss(each(batch["images"]), batch))
            for each in (ThreeThingsVit(Options(k=4)).shrink(model, None, None).module, made.module)
        ]
    assert losses[1] < losses[0]
    start = parallelize(model.backbone.model, 4).state_dict()
    moved = [not torch.equal(value, start[key]) for key, value in data.tuned.backbone.model.state_dict().items()]
    assert all(moved)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.backbone.parameters())


@pytest.mark.parametrize("merge", [True, False])
def test_rebuilt_from_its_plan(merge: bool):
    method, model = ThreeThingsVit(Options(steps=2, lr=1e-3, merge=merge)), classifier()
    made = method.shrink(model, Data(), None)
    plan = json.loads(json.dumps(made.plan))
    rebuilt = ThreeThingsVit().rebuild(classifier(small_vit(depth=4, seed=9)), plan)
    rebuilt.load_state_dict(made.module.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(images()), made.module(images()))
    with pytest.raises(UsageError, match="the plan of three-things-vit is for 4 blocks: this model has 6"):
        method.rebuild(classifier(small_vit(depth=6)), plan)
    with pytest.raises(BackboneError, match="4 blocks, which cannot stand 3 by 3"):
        method.rebuild(classifier(), {**plan, "k": 3})


def test_what_it_refuses():
    with pytest.raises(BackboneError, match="test_efficientnet has blocks of Sequential"):
        ThreeThingsVit().shrink(classifier(small_cnn()), None, None)
    with pytest.raises(BackboneError, match="vit_tiny_patch16_224 has 5 blocks, which cannot stand 2 by 2: k may be 5"):
        ThreeThingsVit().shrink(classifier(small_vit(depth=5)), None, None)
    fewer = Expedit(ExpeditOptions(after=1, height=2, width=2)).shrink(classifier(), None, None).module
    with pytest.raises(BackboneError, match="already changed between its blocks: three-things-vit comes first"):
        ThreeThingsVit().shrink(fewer, None, None)
    data = Data()
    normed = random_backbone(
        "vit_tiny_patch16_224", 32, 0, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, qk_norm=True
    )
    with pytest.raises(BackboneError, match="norms or gates of their own inside cannot be merged"):
        ThreeThingsVit(Options(steps=1)).shrink(classifier(normed), data, None)
    assert data.calls == [], "it was tuned before it was refused"
    assert len(ThreeThingsVit(Options(steps=1, merge=False)).shrink(classifier(normed), data, None).notes) == 3


def test_expedit_comes_after():
    parallel = ThreeThingsVit().shrink(classifier(), None, None).module
    fewer = Expedit(ExpeditOptions(after=1, height=2, width=2, nearest=4)).shrink(parallel, None, None).module
    with torch.no_grad():
        assert fewer(images()).shape == (3, 3)
        assert not torch.allclose(fewer(images()), parallel(images()))
