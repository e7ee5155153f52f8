"""Heat maps of a Bundle's answers, in the photos' own pixels."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import foveal
from foveal.backbones.adapter import load_backbone
from foveal.backbones.wrapper import OpenModel
from foveal.core import catalogue
from foveal.core.errors import UsageError
from foveal.core.method import Adapt, Classifier
from foveal.core.preprocessing import Preprocessing
from foveal.data.images import seen_box, to_pixels
from foveal.evaluate.calibration import Calibrated
from foveal.evaluate.ood import choose_ood
from foveal.methods.explain.sobol_attribution import Options, SobolAttribution
from foveal.ship.explain import explain_images, open_model_of, placed, scorer_of, squares

LIGHT = "sobol-attribution:grid=3,points=4"
SQUARE = Preprocessing(64, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def bundle(colours: foveal.Bundle) -> foveal.Bundle:
    return colours


@pytest.mark.parametrize("size", [(90, 70), (70, 90), (500, 333), (64, 64), (30, 1000)])
def test_the_box_that_is_seen_is_what_to_pixels_keeps(size: tuple[int, int]):
    """A ramp along each axis shows where the square's first and last pixels come from."""
    width, height = size
    left, top, right, bottom = seen_box(size, SQUARE)
    assert 0 <= left < right <= width + 1e-9
    assert 0 <= top < bottom <= height + 1e-9
    for axis, (low, high, length) in enumerate(((left, right, width), (top, bottom, height))):
        ramp = np.linspace(0, 255, length, dtype=np.float32)
        grey = np.broadcast_to(ramp if axis == 0 else ramp[:, None], (height, width))
        kept = to_pixels(Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB"), SQUARE)[..., 0].astype(float)
        means = kept.mean(0) if axis == 0 else kept.mean(1)
        step = (high - low) / 64
        expected = ((np.array([low, high]) + step * np.array([0.5, -0.5])) - 0.5) / max(1, length - 1) * 255
        assert np.abs(means[[0, -1]] - np.clip(expected, 0, 255)).max() < 4


@pytest.mark.parametrize("size", [(90, 70), (640, 480), (33, 40), (64, 64), (20, 900), (1, 1)])
def test_a_map_comes_to_lie_where_the_model_looked(size: tuple[int, int]):
    square = np.zeros((64, 64), np.float32)
    square[16:32, 32:64] = 1
    whole = placed(square, size, SQUARE)
    assert whole.shape == (size[1], size[0])
    assert whole.dtype == np.float32
    left, top, right, bottom = seen_box(size, SQUARE)
    x = (np.arange(size[0]) + 0.5 - left) / (right - left) * 64
    y = (np.arange(size[1]) + 0.5 - top) / (bottom - top) * 64
    inside = ((y > 17) & (y < 31))[:, None] & ((x > 33) & (x < 63))
    outside = ((y < 15) | (y > 33))[:, None] | ((x < 31) | (x > 65))
    if min(size) > 40:
        assert whole[inside].min() > 0.8
        assert whole[outside].max() < 0.2
    unseen = ((y < -0.6) | (y > 64.6))[:, None] | ((x < -0.6) | (x > 64.6))
    assert (whole[unseen] == 0).all()
    assert placed(np.ones((64, 64), np.float32), size, SQUARE).max() == pytest.approx(1)


def test_explanations_carry_the_answer_the_target_and_the_scores(bundle: foveal.Bundle, photos: Path):
    paths = [photos / "red" / "00.jpg", photos / "blue" / "01.jpg"]
    done: list[tuple[int, int]] = []
    found = list(explain_images(bundle, paths, LIGHT, progress=lambda *step: done.append(step)))
    for each, row in zip(found, bundle.predict(paths), strict=True):
        assert each.row == row
        assert each.target == row["label"]
        assert each.probability == pytest.approx(row["probability"])
        assert each.map is not None
        assert each.map.shape == (90, 110)
        assert each.map.max() > 0
        assert each.scores is not None
        assert set(each.scores) == {"map", "random", "centre", "channel-norm"}
        assert each.overlay().size == (110, 90)
    assert done[-1][0] == done[-1][1]
    assert all(0 <= first[0] <= second[0] for first, second in pairwise(done))


def test_the_fast_session_gives_the_map_that_torch_gives(bundle: foveal.Bundle, photos: Path):
    image = squares(Image.open(photos / "green" / "03.jpg").convert("RGB"), bundle.preprocessing)
    fast = scorer_of(bundle, "cpu")
    assert not isinstance(fast, OpenModel), "the slow way was taken"
    slow = OpenModel(bundle.model, bundle.preprocessing, answer=lambda images: bundle.model(images)[0])
    assert torch.allclose(fast(image), slow(image), atol=1e-4)
    method, target = SobolAttribution(Options(grid=3, points=4)), torch.tensor([1])
    ours, theirs = (method.explain(model, image, target) for model in (fast, slow))
    assert (ours - theirs).abs().max() < 0.01 * theirs.max()
    probabilities = open_model_of(bundle, "cpu")(image).softmax(1)
    assert torch.allclose(probabilities, slow(image), atol=1e-5)


def test_another_class_has_another_map(bundle: foveal.Bundle, photos: Path):
    maps = [
        next(explain_images(bundle, photos / "red" / "02.jpg", LIGHT, target=target, score=False))
        for target in ("red", "blue")
    ]
    assert maps[1].target == "blue"
    assert maps[0].scores is None
    assert not np.allclose(maps[0].map, maps[1].map)  # type: ignore[arg-type]


def test_gradients_can_flow_after_predict_looked_first(bundle: foveal.Bundle, photos: Path):
    opened = foveal.load(bundle.path)
    opened.predict(photos / "red" / "00.jpg")
    size = opened.preprocessing.size
    x = torch.rand(1, 3, size, size, requires_grad=True)
    open_model_of(opened, "cpu")(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["vpt", "lora", "full"])
def test_models_trained_through_the_backbone_are_explained_as_they_answer(method: str, cache: Path):
    """VPT reads prompted tokens, so its features come from no session; what is explained is still the whole model."""
    torch.manual_seed(0)
    backbone = load_backbone("test_vit", pretrained=False, size=64)
    chosen = catalogue.create(method)
    assert isinstance(chosen, Adapt)
    classifier = chosen.finish(chosen.attach(backbone, 3)).eval()
    torch.nn.init.normal_(classifier.head.weight)
    _, unknown = garbage_score(classifier)
    model = Calibrated(classifier, 1.5, unknown, "single-label").eval()
    stub: Any = SimpleNamespace(model=model, preprocessing=backbone.preprocessing)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    opened = open_model_of(stub, "cpu")
    with torch.no_grad():
        expected, _ = model(opened.normalised(x))
        assert torch.allclose(scorer_of(stub, "cpu")(x), expected, atol=1e-3)
        assert torch.allclose(opened(x).softmax(1), expected, atol=1e-5)
    assert opened.feature_map(x).shape == (2, 64, 4, 4)


def garbage_score(classifier: Classifier) -> tuple[dict[str, Any], torch.nn.Module]:
    """Any unknown score; its threshold plays no part here."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(12, classifier.head.in_features)).astype(np.float32)
    logits = rng.normal(size=(12, 3)).astype(np.float32)
    score, record = choose_ood(features, np.arange(12) % 3, features, logits, features + 9, logits)
    return record, score


def test_captums_metrics_take_the_attributions(bundle: foveal.Bundle, photos: Path):
    from captum.metrics import infidelity

    image = squares(Image.open(photos / "green" / "03.jpg").convert("RGB"), bundle.preprocessing)
    model = scorer_of(bundle, "cpu")
    found = SobolAttribution(Options(grid=3, points=4)).on(model).attribute(image, target=1)

    def perturb(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shown = (inputs + 0.05 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
        return inputs - shown, shown

    value = infidelity(model, perturb, image, found, target=1, n_perturb_samples=2)
    assert value.shape == (1,)
    assert torch.isfinite(value).all()


def test_an_image_that_cannot_be_read_keeps_its_row(bundle: foveal.Bundle, photos: Path, tmp_path: Path):
    (tmp_path / "bad.jpg").write_text("no image")
    bad, good = explain_images(bundle, [tmp_path / "bad.jpg", photos / "red" / "00.jpg"], "eigen-cam", score=False)
    assert bad.map is None
    assert bad.row["error"]
    with pytest.raises(UsageError, match="has no map"):
        bad.overlay()
    assert good.target == "red"


def test_wrong_choices_are_told_before_anything_is_computed(bundle: foveal.Bundle, photos: Path):
    with pytest.raises(UsageError, match="linear is a method of family adapt: expected one that explains, eigen-cam"):
        explain_images(bundle, photos, "linear")
    with pytest.raises(UsageError, match="no class 'rad': did you mean red"):
        explain_images(bundle, photos, target="rad")
    with pytest.raises(UsageError, match="no method 'sobol-atribution': did you mean sobol-attribution"):
        explain_images(bundle, photos, "sobol-atribution")
