import json
from pathlib import Path

import numpy as np
import pytest
import torch

from foveal.backbones.adapter import Backbone, load_backbone, normalise
from foveal.core.errors import UsageError
from foveal.core.threads import cpu_threads
from foveal.features import session as module
from foveal.features.session import feature_session


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path))
    return tmp_path


def pixels(backbone: Backbone, n: int, seed: int = 0) -> np.ndarray:
    size = backbone.preprocessing.size
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def with_torch(backbone: Backbone, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return backbone.eval()(normalise(torch.from_numpy(images), backbone.preprocessing)).numpy()


@pytest.fixture(scope="module")
def small() -> Backbone:
    torch.manual_seed(0)
    return load_backbone("test_efficientnet", pretrained=False, size=32)


NETWORKS = [
    ("test_efficientnet", 32),
    ("test_resnet", 64),
    ("test_convnext", 64),
    ("test_vit", 64),
    ("test_vit2", 64),
    ("test_vit_relpos", 64),
    ("test_maxvit", 64),
    ("vit_tiny_r_s16_p8_224", 64),
    ("swin_tiny_patch4_window7_224", 56),
]


@pytest.mark.parametrize(("name", "size"), NETWORKS)
def test_features_are_those_of_torch(name, size):
    backbone = load_backbone(name, pretrained=False, size=size)
    session = feature_session(backbone, device="cpu", threads=1)
    images = pixels(backbone, 5)
    expected = with_torch(backbone, images)
    got = session(images)
    assert session.engine == "onnxruntime cpu", session.note
    assert got.dtype == np.float32
    assert np.abs(got - expected).max() <= 1e-3 * np.abs(expected).max()


def test_batches_of_any_size_agree(small):
    session = feature_session(small, device="cpu", threads=2)
    images = pixels(small, 11)
    whole = session(images)
    assert whole.shape == (11, small.width)
    for n in (1, 3, 4, 5, 11):
        assert np.allclose(session(images[:n]), whole[:n], rtol=1e-4, atol=1e-5)
    assert session.threads == 2


def test_the_graph_is_exported_once_and_torch_is_left_as_it_was(small, own_cache: Path, monkeypatch):
    small.train()
    before = small.fingerprint()
    feature_session(small, device="cpu")
    assert small.training
    assert all(m.training for m in small.modules())
    assert small.fingerprint() == before
    assert len(list(own_cache.glob("graphs/*.onnx"))) == 1
    monkeypatch.setattr(module, "to_onnx", None)
    assert feature_session(small, device="cpu").engine == "onnxruntime cpu"


def test_another_weight_is_another_graph(own_cache: Path):
    backbone = load_backbone("test_resnet", pretrained=False, size=32)
    first = feature_session(backbone, device="cpu")(pixels(backbone, 1))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(1.1)
    second = feature_session(backbone, device="cpu")(pixels(backbone, 1))
    assert not np.allclose(first, second)
    assert np.allclose(second, with_torch(backbone, pixels(backbone, 1)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("content", [b"", b"half a graph"])
def test_damaged_graph_is_exported_again(small, own_cache: Path, content: bytes):
    expected = feature_session(small, device="cpu")(pixels(small, 2))
    (graph,) = own_cache.glob("graphs/*.onnx")
    graph.write_bytes(content)
    assert np.array_equal(feature_session(small, device="cpu")(pixels(small, 2)), expected)
    assert len(graph.read_bytes()) > 1000


def test_torch_takes_over_when_the_runtime_disagrees(small, own_cache: Path, monkeypatch):
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    session = feature_session(small, device="cpu")
    assert session.engine == "torch cpu"
    assert "ONNX Runtime differs from torch by" in session.note
    assert np.allclose(session(pixels(small, 3)), with_torch(small, pixels(small, 3)), atol=1e-6)
    assert not list(own_cache.glob("graphs/*.onnx"))


def test_torch_takes_over_when_export_fails_and_it_is_not_tried_again(small, own_cache: Path, monkeypatch):
    calls = []

    def fails(*args: object) -> None:
        calls.append(args)
        raise RuntimeError("no such operator\nand a long trace")

    monkeypatch.setattr(module, "to_onnx", fails)
    for _ in range(2):
        session = feature_session(small, device="cpu")
        assert session.engine == "torch cpu"
        assert session.note == "RuntimeError: no such operator"
    assert len(calls) == 1
    (refusal,) = own_cache.glob("graphs/*.json")
    stored = json.loads(refusal.read_text())
    refusal.write_text(json.dumps({**stored, "versions": ["older"]}))
    feature_session(small, device="cpu")
    assert len(calls) == 2


def test_torch_session_keeps_the_thread_count(small):
    before = torch.get_num_threads()
    session = module.TorchSession(small, torch.device("cpu"), 1)
    session(pixels(small, 2))
    assert torch.get_num_threads() == before


def test_devices(small, monkeypatch):
    with pytest.raises(UsageError, match="device 'tpu': expected auto, cpu or cuda"):
        feature_session(small, device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="sees no GPU on this machine: use --device cpu"):
        feature_session(small, device="cuda")


def test_threads_follow_the_machine_and_the_environment(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    available = cpu_threads()
    assert available >= 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cpu_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "10000")
    assert cpu_threads() == available


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_features_on_a_gpu_are_those_of_the_cpu(small):
    images = pixels(small, 5)
    session = feature_session(small, device="cuda")
    assert session.engine == "torch cuda"
    expected = with_torch(small, images)
    assert np.abs(session(images) - expected).max() <= 1e-3 * np.abs(expected).max()


def test_a_session_of_fractions_agrees_with_torch_between_whole_pixels(small: Backbone):
    session = feature_session(small, device="cpu", threads=2, fractions=True)
    assert session.engine == "onnxruntime cpu"
    between = np.random.default_rng(0).uniform(0, 255, (9, 32, 32, 3)).astype(np.float32)
    expected = with_torch(small, between)
    assert np.abs(session(between) - expected).max() < 1e-3 * np.abs(expected).max()
    whole = pixels(small, 3)
    plain = feature_session(small, device="cpu", threads=2)
    assert np.array_equal(session(whole.astype(np.float32)), plain(whole))
