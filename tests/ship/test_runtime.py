import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from foveal.backbones.adapter import load_backbone
from foveal.core.errors import BundleError
from foveal.core.method import Classifier
from foveal.data.images import to_pixels
from foveal.evaluate.calibration import Calibrated
from foveal.evaluate.ood import Energy
from foveal.ship.export import export_onnx
from foveal.ship.runtime import Runtime

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def exported(tmp_path):
    torch.manual_seed(0)
    backbone = load_backbone("test_efficientnet", pretrained=False, size=64)
    head = torch.nn.Linear(backbone.width, 3)
    model = Calibrated(Classifier(backbone, head), 1.3, Energy(), "single-label").eval()
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((90, 70), (64, 200))]
    path = tmp_path / "model.onnx"
    export_onnx(model, backbone.preprocessing, path, images=photos, classes=["a", "b", "c"], threshold=0.5)
    return path, photos


def test_answers_as_the_file_does(exported):
    path, photos = exported
    runtime = Runtime(path)
    assert (runtime.classes, runtime.task, runtime.threshold) == (("a", "b", "c"), "single-label", 0.5)
    squares = np.stack([to_pixels(photo, runtime.preprocessing) for photo in photos])
    probabilities, score = runtime(squares)
    whole = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for place, photo in enumerate(photos):
        expected = whole.run(None, {"image": np.asarray(photo)[None]})
        np.testing.assert_allclose(probabilities[place], expected[0][0], atol=1e-6)
        np.testing.assert_allclose(score[place], expected[1][0], rtol=1e-5)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07"])
def test_refuses_what_is_not_an_export(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx is not a model that `foveal export` wrote"):
        Runtime(tmp_path / "model.onnx")
