import io
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor, nn

from foveal.backbones.adapter import DEFAULT, Backbone, load_backbone, normalise
from foveal.core import catalogue
from foveal.core.errors import FovealError, UsageError
from foveal.core.method import Adapt, Classifier
from foveal.data.images import decode, to_pixels
from foveal.evaluate.calibration import Calibrated
from foveal.evaluate.ood import Energy, JointEnergy, Mahalanobis
from foveal.ship import export as module
from foveal.ship.export import export_onnx

pytestmark = pytest.mark.usefixtures("cache")
CLASSES = ["ant", "bee", "Käfer"]


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """JPEG pictures of several sizes and shapes, as a camera and a codec leave them."""
    rng = np.random.default_rng(0)
    made: list[Image.Image] = []
    for size in [(300, 300), (451, 300), (97, 211), (640, 480), (50, 37), (400, 30)]:
        coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize(size)
        buffer = io.BytesIO()
        coarse.save(buffer, "JPEG", quality=85)
        made.append(decode(buffer.getvalue()))
    return made


@pytest.fixture(scope="module")
def get():
    made: dict[tuple[str, int], Backbone] = {}

    def build(name: str, size: int) -> Backbone:
        torch.manual_seed(0)
        return made.setdefault((name, size), load_backbone(name, pretrained=False, size=size))

    return build


def calibrated(backbone: Backbone, head: nn.Module | None = None, ood: nn.Module | None = None, task="single-label"):
    torch.manual_seed(1)
    head = nn.Linear(backbone.width, len(CLASSES)) if head is None else head
    return Calibrated(Classifier(backbone, head), 1.7, Energy() if ood is None else ood, task).eval()


def export(model: Calibrated, path: Path, photos: list[Image.Image]) -> dict:
    preprocessing = model.classifier.backbone.preprocessing
    return export_onnx(model, preprocessing, path, images=photos, classes=CLASSES, threshold=0.25)


def with_torch(model: Calibrated, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    preprocessing = model.classifier.backbone.preprocessing
    pixels = torch.from_numpy(to_pixels(image, preprocessing).copy())[None]
    with torch.inference_mode():
        probabilities, score = model(normalise(pixels, preprocessing))
    return probabilities.numpy(), score.numpy()


def run(path: Path, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path))
    assert [each.name for each in session.get_inputs()] == ["image"]
    assert [each.name for each in session.get_outputs()] == ["probabilities", "unknown_score"]
    first, second = session.run(None, {"image": images})
    return np.asarray(first), np.asarray(second)


@pytest.mark.parametrize(
    ("name", "size"),
    [("test_efficientnet", 64), ("test_vit", 64), ("vit_tiny_r_s16_p8_224", 64), ("test_convnext", 64)],
)
def test_the_file_answers_as_torch(get, photos, tmp_path, name, size):
    model = calibrated(get(name, size))
    record = export(model, tmp_path / "m.onnx", photos)
    assert record["max_abs_difference"] <= 1e-4
    assert record["images"] == len(photos)
    assert record["opset"] == 18
    assert record["bytes"] == (tmp_path / "m.onnx").stat().st_size
    for photo in photos:
        expected, score = with_torch(model, photo)
        probabilities, unknown = run(tmp_path / "m.onnx", np.asarray(photo)[None])
        assert probabilities.shape == (1, 3)
        assert unknown.shape == (1,)
        assert np.abs(probabilities - expected).max() <= 1e-4
        assert np.allclose(unknown, score, rtol=1e-3, atol=1e-4)
        assert abs(probabilities.sum() - 1) < 1e-5


def test_default_backbone_on_real_photos(tmp_path):
    photos = [Image.fromarray(photo) for photo in (data.chelsea(), data.coffee(), data.astronaut(), data.rocket())]
    photos += [photos[0].crop((100, 100, 137, 150)), photos[1].resize((1800, 1201))]
    model = calibrated(load_backbone(DEFAULT, offline=True))
    assert export(model, tmp_path / "m.onnx", photos)["max_abs_difference"] <= 1e-5


def test_batches_of_images_of_one_size(get, photos, tmp_path):
    model = calibrated(get("test_efficientnet", 64))
    export(model, tmp_path / "m.onnx", photos[:1])
    images = np.random.default_rng(0).integers(0, 256, (5, 90, 120, 3), dtype=np.uint8)
    probabilities, unknown = run(tmp_path / "m.onnx", images)
    for image, row, score in zip(images, probabilities, unknown, strict=True):
        expected, expected_score = with_torch(model, Image.fromarray(image))
        assert np.abs(row - expected[0]).max() <= 1e-4
        assert abs(score - expected_score[0]) <= 1e-3 * max(1, abs(score))


def test_multi_label_gives_independent_probabilities(get, photos, tmp_path):
    model = calibrated(get("test_efficientnet", 64), ood=JointEnergy(2.0), task="multi-label")
    assert export(model, tmp_path / "m.onnx", photos)["max_abs_difference"] <= 1e-4
    expected, _ = with_torch(model, photos[0])
    probabilities, _ = run(tmp_path / "m.onnx", np.asarray(photos[0])[None])
    assert np.abs(probabilities - expected).max() <= 1e-4
    assert abs(probabilities.sum() - 1) > 1e-3


def test_metadata_hold_what_is_needed_to_read_the_answer(get, photos, tmp_path):
    model = calibrated(get("test_efficientnet", 64))
    export(model, tmp_path / "m.onnx", photos[:1])
    found = {each.key: each.value for each in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert json.loads(found["classes"]) == CLASSES
    assert found["task"] == "single-label"
    assert float(found["unknown_threshold"]) == 0.25
    assert json.loads(found["preprocessing"])["size"] == 64


def test_exporting_changes_nothing_in_the_model(get, photos, tmp_path):
    model = calibrated(get("test_efficientnet", 64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    export(model, tmp_path / "m.onnx", photos[:1])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def features(backbone: Backbone, n: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % len(CLASSES)
    return torch.randn(n, backbone.width, generator=generator) + y[:, None], y


FROZEN = [
    name
    for name in catalogue.names("adapt")
    if issubclass(cls := catalogue.get(name), Adapt) and cls.reads_features() and "text" not in cls.spec.needs
]


@pytest.mark.parametrize("name", FROZEN)
def test_the_head_of_every_frozen_method_exports(get, photos, tmp_path, name):
    backbone = get("test_efficientnet", 64)
    X, y = features(backbone)
    method = catalogue.create(name)
    assert isinstance(method, Adapt)
    head = method.fit_features(X, y, torch.ones(len(X)), 0)
    mahalanobis = Mahalanobis.fit(X.numpy(), y.numpy())
    record = export(calibrated(backbone, head, mahalanobis), tmp_path / "m.onnx", photos)
    assert record["max_abs_difference"] <= 1e-4
    assert record["unknown_max_difference"] <= 1e-3


def test_a_difference_above_the_limit_is_an_error_with_its_number(get, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    with pytest.raises(FovealError, match=r"differs from torch by \d\.\de[-+]\d\d in probability"):
        export(calibrated(get("test_efficientnet", 64)), tmp_path / "m.onnx", photos[:1])
    assert not list(tmp_path.iterdir())


def test_nan_is_a_difference(get, photos, tmp_path):
    backbone = get("test_efficientnet", 64)
    head = nn.Linear(backbone.width, 3)
    nn.init.constant_(head.bias, float("nan"))
    with pytest.raises(FovealError, match="differs from torch by nan"):
        export(calibrated(backbone, head), tmp_path / "m.onnx", photos[:1])


def test_no_images_to_check_on(get, tmp_path):
    with pytest.raises(UsageError, match="at least one image"):
        export(calibrated(get("test_efficientnet", 64)), tmp_path / "m.onnx", [])


class Sorted(nn.Module):
    """A head that ONNX has no word for."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.linalg.svd(features[:, :9].reshape(-1, 3, 3))[1]


def test_what_onnx_cannot_express_is_said(get, photos, tmp_path):
    with pytest.raises(FovealError, match="cannot be expressed in ONNX"):
        export(calibrated(get("test_efficientnet", 64), Sorted()), tmp_path / "m.onnx", photos[:1])
    assert not list(tmp_path.iterdir())
