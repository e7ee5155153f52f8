import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from foveal.backbones.adapter import load_backbone
from foveal.core.errors import BundleError, MissingExtra, UsageError
from foveal.core.method import Classifier
from foveal.data.images import to_pixels
from foveal.evaluate.calibration import Calibrated
from foveal.evaluate.ood import Energy
from foveal.ship.export import export_onnx
from foveal.ship.runtime import VARIANTS, Runtime, open_runtime

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    backbone = load_backbone("test_efficientnet", pretrained=False, size=64)
    head = torch.nn.Linear(backbone.width, 3)
    model = Calibrated(Classifier(backbone, head), 1.3, Energy(), "single-label").eval()
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((90, 70), (64, 200))]
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_onnx(model, backbone.preprocessing, path, images=photos, classes=["a", "b", "c"], threshold=0.5)
    return path, photos


@pytest.fixture
def bundle(exported, tmp_path):
    """A folder with the exported model, and a function that writes what the export chose."""
    (tmp_path / "model.onnx").write_bytes(exported[0].read_bytes())

    def chose(name):
        (tmp_path / "cost.json").write_text(json.dumps({"onnx": {"chosen": name} if name else {}}))
        return tmp_path

    return chose


def squares_of(runtime, photos):
    return np.stack([to_pixels(photo, runtime.preprocessing) for photo in photos])


def test_answers_as_the_file_does(exported):
    path, photos = exported
    runtime = Runtime(path)
    assert (runtime.classes, runtime.task, runtime.threshold) == (("a", "b", "c"), "single-label", 0.5)
    probabilities, score = runtime(squares_of(runtime, photos))
    whole = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for place, photo in enumerate(photos):
        expected = whole.run(None, {"image": np.asarray(photo)[None]})
        np.testing.assert_allclose(probabilities[place], expected[0][0], atol=1e-6)
        np.testing.assert_allclose(score[place], expected[1][0], rtol=1e-5)


@pytest.mark.parametrize(("name", "tolerance"), [("openvino-fp32", 1e-4), ("openvino-bf16", 0.1)])
def test_openvino_answers_alike_from_several_threads(exported, name, tolerance):
    path, photos = exported
    runtime, reference = Runtime(path, 1, VARIANTS[name]), Runtime(path)
    squares = squares_of(runtime, photos)
    expected, expected_score = reference(squares)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda place: runtime(squares[place % 2 :][:1]), range(40)))
    for place, (probabilities, score) in enumerate(found):
        np.testing.assert_allclose(probabilities[0], expected[place % 2], atol=tolerance)
        np.testing.assert_allclose(score[0], expected_score[place % 2], atol=10 * tolerance)
    assert runtime.engine.startswith("openvino 20")
    assert runtime.precision == name.removeprefix("openvino-")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07"])
def test_refuses_what_is_not_an_export(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx is not a model that `foveal export` wrote"):
        Runtime(tmp_path / "model.onnx")


@pytest.mark.parametrize("name", [None, "fp32", "openvino-fp32"])
def test_a_bundle_opens_as_chosen(bundle, name):
    runtime = open_runtime(bundle(name), threads=2)
    assert (runtime.variant, runtime.threads, runtime.note) == (name or "fp32", 2, "")


def test_without_the_engine_or_the_file_the_fp32_model_is_opened_and_says_why(bundle, monkeypatch):
    runtime = open_runtime(bundle("int8"))
    assert (runtime.variant, runtime.precision) == ("fp32", "fp32")
    assert "instead of int8" in runtime.note
    assert "model.int8.onnx" in runtime.note
    monkeypatch.setitem(sys.modules, "openvino", None)
    runtime = open_runtime(bundle("openvino-bf16"))
    assert runtime.variant == "fp32"
    assert "pip install 'foveal[openvino]'" in runtime.note
    with pytest.raises(MissingExtra, match="openvino"):
        open_runtime(bundle("fp32"), variant="openvino-bf16")


def test_a_variant_asked_for_is_opened_or_refused(bundle):
    assert open_runtime(bundle("int8"), variant="fp32").note == ""
    with pytest.raises(BundleError, match=r"model\.int8\.onnx"):
        open_runtime(bundle("fp32"), variant="int8")
    with pytest.raises(UsageError, match="expected one of fp32, int8"):
        open_runtime(bundle("fp32"), variant="int4")


def test_a_bundle_without_an_exported_model_says_what_to_run(tmp_path):
    with pytest.raises(BundleError, match=r"has no model\.onnx: run `foveal export"):
        open_runtime(tmp_path)
