"""The contract of every distill method that the catalogue finds, with a CNN, a plain ViT, a windowed ViT and a hybrid
as students of one teacher.

Either the whole contract holds, or the method refuses the student with a clear message.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.contract.capabilities import FAMILIES, as_documented, backbone_of, hooks
from tests.contract.test_adapt import CLASSES, DATA, ROWS, SIZE, check_export, pixels_of
from torch import nn

from foveal.backbones.adapter import load_backbone, normalise
from foveal.backbones.pair import state_hash
from foveal.core import catalogue
from foveal.core.errors import BackboneError, UsageError
from foveal.core.families.distill import Distill
from foveal.core.method import Classifier
from foveal.train.distill import TaughtImages, train_student

METHODS = catalogue.names("distill")


def create(name: str) -> Distill:
    method = catalogue.create(name)
    assert isinstance(method, Distill)
    return method


def master() -> Classifier:
    torch.manual_seed(7)
    backbone = load_backbone("test_resnet", pretrained=False, size=SIZE)
    return Classifier(backbone, nn.Linear(backbone.width, CLASSES)).eval()


def make(
    method: Distill, family: str, teacher: Classifier | None, work: Path, stop_after: int = 0, unlabelled: bool = True
) -> Classifier:
    """What `distill` does, on eighteen images; `stop_after` steps it is cut off as by a kill."""

    def cut(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == stop_after:
            raise KeyboardInterrupt

    torch.manual_seed(3)
    student = method.attach(backbone_of(family, SIZE), CLASSES)
    recipe = dataclasses.replace(method.recipe(), epochs=2, batch_size=6)
    feed = TaughtImages(
        DATA, DATA.labels, ROWS, student.backbone.preprocessing, torch.ones(CLASSES), recipe,
        teacher=None if teacher is None else teacher.backbone.preprocessing, unlabelled=DATA if unlabelled else None,
    )  # fmt: skip
    pair = method.pair(student, teacher)
    return train_student(method, pair, feed, ROWS[:0], 3, device="cpu", work=work, on_event=cut).model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str, family: str, tmp_path: Path):
    method, teacher = create(name), master()
    before, flags = state_hash(teacher), [each.requires_grad for each in teacher.parameters()]
    try:
        made = make(method, family, teacher, tmp_path / "work")
    except (BackboneError, UsageError) as refusal:
        assert len(str(refusal)) > 30, f"refusal says too little: {refusal}"
        as_documented(name, family, "refuses")
        return
    assert state_hash(teacher) == before, "the teacher changed"
    assert [each.requires_grad for each in teacher.parameters()] == flags
    assert not any(each.training for each in teacher.modules())
    assert hooks(made) == hooks(teacher) == 0
    assert made.state_dict().keys() == create(name).attach(backbone_of(family, SIZE), CLASSES).state_dict().keys()

    x = normalise(pixels_of(made.backbone.preprocessing), made.backbone.preprocessing)
    again = make(create(name), family, teacher, tmp_path / "again")
    with torch.inference_mode():
        logits = made(x)
        assert torch.isfinite(logits).all()
        assert torch.equal(again(x), logits), "the same seed gave another result"
        loaded = create(name).finish(create(name).attach(backbone_of(family, SIZE), CLASSES))
        loaded.load_state_dict(copy.deepcopy(made.state_dict()))
        assert torch.equal(loaded.eval()(x), logits), "saving and loading changed the answers"
    with pytest.raises(KeyboardInterrupt):
        make(create(name), family, teacher, tmp_path / "cut", stop_after=4)
    assert hooks(teacher) == 0
    resumed = make(create(name), family, teacher, tmp_path / "cut")
    for key, value in made.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), f"resumed training ended with another {key}"
    check_export(made, made.backbone.preprocessing, tmp_path)
    as_documented(name, family, "works")


@pytest.mark.parametrize("name", METHODS)
def test_alone_no_teacher_has_a_part(name: str, tmp_path: Path):
    """The baseline is the same whoever would have taught, and another student than the taught one."""
    alone = create(name).alone()
    first = make(alone, "cnn", None, tmp_path / "alone", unlabelled=False)
    beside = make(alone, "cnn", master(), tmp_path / "beside", unlabelled=False)
    taught = make(create(name), "cnn", master(), tmp_path / "taught", unlabelled=False)
    same, other = first.state_dict(), taught.state_dict()
    assert all(torch.equal(value, same[key]) for key, value in beside.state_dict().items())
    assert any(not torch.equal(value, same[key]) for key, value in other.items())


def test_the_feed_mixes_labelled_and_unlabelled():
    """Every labelled image once an epoch, as many unlabelled beside them, these drawn pass after pass."""
    few = DATA.subset(ROWS[:4])
    recipe = dataclasses.replace(create(METHODS[0]).recipe(), augment="strong")
    p = backbone_of("cnn", SIZE).preprocessing
    smaller = dataclasses.replace(p, size=32)
    feed = TaughtImages(
        DATA, DATA.labels, ROWS[2:], p, torch.ones(CLASSES), recipe, teacher=smaller, unlabelled=few
    )  # fmt: skip
    drawn: list[int] = []
    for epoch in range(3):
        batches = feed.batches(6, 1, epoch)
        known = np.concatenate([batch[batch < len(DATA)] for batch in batches])
        assert sorted(known) == ROWS[2:].tolist()
        for batch in batches:
            assert (batch < len(DATA)).sum() == (batch >= len(DATA)).sum()
            drawn += (batch[batch >= len(DATA)] - len(DATA)).tolist()
    assert len(drawn) == 48
    assert np.bincount(drawn).tolist() == [12] * 4
    view = feed.example(int(ROWS[2]), np.random.default_rng(0))
    assert view["images"].shape == (SIZE, SIZE, 3)
    assert view["teacher_images"].shape == (32, 32, 3)
    assert bool(view["labelled"])
    assert not bool(feed.example(len(DATA) + 1, np.random.default_rng(0))["labelled"])
    shrunk = view["images"].reshape(32, 2, 32, 2, 3).mean((1, 3))
    correlation = np.corrcoef(shrunk.ravel(), view["teacher_images"].astype(float).ravel())[0, 1]
    assert correlation > 0.9, "student and teacher see other crops"
