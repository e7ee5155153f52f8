from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foveal.backbones.adapter import load_backbone, rebuild_backbone
from foveal.core.method import Classifier
from foveal.evaluate.cost import cost, counted, macs

pytestmark = pytest.mark.usefixtures("cache")


class Bank(nn.Module):
    """A head with a matrix product and no parameters."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(rows, width))

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.bank.T  # type: ignore[operator]


class Fake:
    engine, threads = "counted", 3

    def __init__(self, width: int) -> None:
        self.width = width
        self.sizes: list[int] = []

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        self.sizes.append(len(pixels))
        return np.zeros((len(pixels), self.width), np.float32)


def test_multiply_accumulates_in_closed_form():
    convolution = nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1)
    depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8)
    model = nn.Sequential(convolution, depthwise, nn.Flatten(), nn.Linear(8 * 16 * 16, 4))
    expected = 8 * 3 * 9 * 16 * 16 + 8 * 25 * 16 * 16 + 8 * 16 * 16 * 4
    assert counted(model, (1, 3, 32, 32)) == expected


def test_attention_is_counted():
    backbone = load_backbone("test_vit", pretrained=False, size=64)
    d, tokens, patches = backbone.token_width, 17, 16
    hidden = backbone.blocks[0].mlp.fc1.out_features  # type: ignore[union-attr]
    block = tokens * (4 * d * d + 2 * d * hidden) + 2 * tokens * tokens * d
    expected = patches * 3 * 16 * 16 * d + len(backbone.blocks) * block
    assert abs(counted(backbone.eval(), (1, 3, 64, 64)) - expected) <= 0.01 * expected


def test_an_unbuilt_backbone_is_counted_once_and_then_stays_unbuilt():
    built = load_backbone("test_efficientnet", pretrained=False, size=64)
    tensors = dict(built.model.state_dict())
    for head in (nn.Linear(built.width, 5), Bank(40, built.width)):
        expected = macs(Classifier(built, head).eval(), 64)
        first, second = (Classifier(rebuild_backbone(built.describe(), tensors), head).eval() for _ in range(2))
        assert macs(first, 64) == macs(second, 64) == expected
        assert not second.backbone.built


def test_everything_is_measured_in_the_session_and_says_where(tmp_path: Path):
    backbone = load_backbone("test_efficientnet", pretrained=False, size=32)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 123)
    session = Fake(backbone.width)
    head = nn.Linear(backbone.width, 2)
    classifier = Classifier(backbone, head).eval()
    found = cost(classifier, backbone.preprocessing, 514, tmp_path, session=session)
    stored = sum(value.numel() for value in classifier.state_dict().values())
    assert found["parameters"] == {"total": stored, "trained": 514}
    assert found["bytes"] == 123
    assert found["macs"] == counted(classifier, (1, 3, 32, 32))
    (latency,), (throughput,) = found["latency"], found["throughput"]
    assert (latency["batch"], latency["threads"], latency["engine"]) == (1, 3, "counted")
    assert latency["milliseconds"] > 0
    assert throughput["images_per_second"] > 0
    assert set(session.sizes) == {1, throughput["batch"]}


def test_without_a_session_torch_is_timed_and_the_model_is_left_as_it_was():
    backbone = load_backbone("test_vit", pretrained=False, size=64)
    classifier = Classifier(backbone, nn.Linear(backbone.width, 2)).eval()
    before = backbone.fingerprint()
    found = cost(classifier, backbone.preprocessing, 0, device="cpu")
    assert found["latency"][0]["engine"] == "torch cpu"
    assert found["latency"][0]["threads"] == torch.get_num_threads()
    assert found["bytes"] is None
    assert backbone.fingerprint() == before
    assert not any(module.training or module._forward_hooks for module in classifier.modules())


def test_parameters_that_learn_are_counted_and_left_learning():
    class Prompted(nn.Module):
        """A parameter widened to the batch and handed to a layer, as prompts of a transformer are."""

        def __init__(self) -> None:
            super().__init__()
            self.prompts = nn.Parameter(torch.zeros(2, 4))
            self.layer = nn.Linear(4, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.prompts.expand(len(x), -1, -1))

    module = Prompted()
    assert counted(module, (1, 1)) == 2 * 4 * 8
    assert all(parameter.requires_grad for parameter in module.parameters())
