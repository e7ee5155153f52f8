"""The contract of every video method that the catalogue finds, on a CNN, a plain ViT, a windowed ViT and a hybrid.

Either the whole contract holds, or the method refuses the backbone with a clear message.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.contract.capabilities import FAMILIES, as_documented, backbone_of, hooks
from torch import Tensor

from foveal.core import catalogue
from foveal.core.errors import BackboneError, UsageError
from foveal.core.families.video import ClipClassifier, Video
from foveal.core.preprocessing import Preprocessing
from foveal.core.seeds import seed_everything
from foveal.data.clips import Clips, MemoryClip
from foveal.features.clips import judge_clips
from foveal.features.graph import to_onnx
from foveal.train.clips import LabelledClips
from foveal.train.loop import train

SIZE, FRAMES = 64, 3
CLASSES = ("left", "right")


def some_clips() -> Clips:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 5, SIZE, SIZE, 3), dtype=np.uint8)
    return Clips(
        name="noise",
        ids=[str(index) for index in range(8)],
        clips=[MemoryClip(clip) for clip in pixels],
        counts=np.full(8, 5),
        digests=[str(index) for index in range(8)],
        labels=np.arange(8) % 2,
        classes=CLASSES,
    )


def taught(method: Video, family: str, work: Path) -> ClipClassifier:
    clips, net = some_clips(), backbone_of(family, SIZE)
    seed_everything(1)
    model = method.attach(net, CLASSES)
    feed = LabelledClips(clips, np.arange(len(clips)), method, net.preprocessing, torch.ones(2))
    return train(method, model, feed, 0, recipe=method.recipe(), device="cpu", work=work).model


def answers(method: Video, model: ClipClassifier) -> Tensor:
    judged = judge_clips(method, model, some_clips().clips, Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3), device="cpu")
    assert not judged.errors
    return judged.logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", catalogue.names("video"))
def test_contract(name: str, family: str, tmp_path: Path):
    method = catalogue.create(name, frames=FRAMES, epochs=1, batch_size=4)
    assert isinstance(method, Video)
    classes = list(CLASSES)
    net = backbone_of(family, SIZE)
    try:
        model = method.attach(net, classes)
    except (BackboneError, UsageError) as refusal:
        assert len(str(refusal)) > 30, f"refusal says too little: {refusal}"
        assert hooks(net) == 0
        assert all(
            torch.equal(a, b)
            for a, b in zip(net.state_dict().values(), backbone_of(family, SIZE).state_dict().values(), strict=True)
        )
        as_documented(name, family, "refuses")
        return
    assert classes == list(CLASSES)
    assert model.frames == FRAMES
    assert hooks(model) == 0
    numbers = method.sample(5, 0.5)
    assert len(numbers) == FRAMES
    assert numbers.max() < 5
    first = taught(method, family, tmp_path / "first")
    assert hooks(first) == 0
    found = answers(method, first)
    assert found.shape == (8, 2)
    assert torch.isfinite(found).all()
    assert found.std() > 0
    assert torch.equal(answers(method, taught(method, family, tmp_path / "second")), found), (
        "the same seed, another model"
    )

    save_file(
        {key: value.contiguous().clone() for key, value in first.state_dict().items()}, tmp_path / "w.safetensors"
    )
    loaded = method.finish(method.attach(backbone_of(family, SIZE), CLASSES))
    loaded.load_state_dict(load_file(tmp_path / "w.safetensors"))
    assert torch.equal(answers(method, loaded), found), "saved and loaded, another model"

    x = torch.randn(2, FRAMES, 3, SIZE, SIZE)
    kept, state = x.clone(), copy.deepcopy(first.state_dict())
    with torch.no_grad():
        exact = first.eval()(x)
        assert torch.allclose(first(x[:1]), exact[:1], atol=1e-4), "clips see each other"
    assert torch.equal(x, kept)
    assert all(torch.equal(value, state[key]) for key, value in first.state_dict().items())
    with pytest.raises(UsageError, match=rf"expected \[B, {FRAMES}, 3, H, W\]"):
        first(x[:, :1])
    as_documented(name, family, "works")


@pytest.mark.parametrize("name", catalogue.names("video"))
@pytest.mark.parametrize("family", ["cnn", "vit"])
def test_it_exports(name: str, family: str, tmp_path: Path):
    import onnxruntime

    method = catalogue.create(name, frames=FRAMES)
    assert isinstance(method, Video)
    model = method.attach(backbone_of(family, SIZE), CLASSES).eval()
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, FRAMES, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = model(x).numpy()
    to_onnx(model, [x], tmp_path / "m.onnx", inputs=["clips"], outputs=["logits"], dynamic={})
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"clips": x.numpy()})
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-3, rtol=1e-3)
